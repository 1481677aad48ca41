# SPDX-License-Identifier: Apache-2.0
"""Spending computation where it changes the result: which tokens are kept, read, computed in full, or decoded at once."""
