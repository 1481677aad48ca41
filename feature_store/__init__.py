# SPDX-License-Identifier: Apache-2.0
"""Features defined once, as data, and read as of a point in time: offline for training, online for serving, by one evaluation."""
