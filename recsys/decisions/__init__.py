# SPDX-License-Identifier: Apache-2.0
"""What was decided for each request, written down; its replay; what came of it; and how a user is taken out again."""
