# SPDX-License-Identifier: Apache-2.0
"""From Arrow tables to batches: data sets, splits, the encoder, the loader."""
