# SPDX-License-Identifier: Apache-2.0
"""Rankers and retrievers that scale, and the road from events to an answered request."""
