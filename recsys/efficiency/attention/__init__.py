# SPDX-License-Identifier: Apache-2.0
"""Attention that reads a part of a long history."""
