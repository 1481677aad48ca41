# SPDX-License-Identifier: Apache-2.0
"""The contestants of `benchmarks.ranking_training`; nothing here may import more than its own environment holds."""
