# SPDX-License-Identifier: Apache-2.0
"""One trainer for rankers and retrievers, with checkpoints that a killed run continues from, bit for bit."""
