# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a history or of a request go on."""
