# SPDX-License-Identifier: Apache-2.0
"""Which computation each token gets: in full, a cheap likeness of it, or none."""
