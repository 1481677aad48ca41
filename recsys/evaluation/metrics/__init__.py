# SPDX-License-Identifier: Apache-2.0
"""Metrics: pure NumPy in float64, one file each, with their formula, their treatment of ties and their empty cases."""
