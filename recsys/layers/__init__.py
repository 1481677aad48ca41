# SPDX-License-Identifier: Apache-2.0
"""Layers that rankers and retrievers share."""
