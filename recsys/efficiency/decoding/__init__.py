# SPDX-License-Identifier: Apache-2.0
"""Decoding with fewer forward passes and the same result."""
