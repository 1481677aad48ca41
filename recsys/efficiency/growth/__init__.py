# SPDX-License-Identifier: Apache-2.0
"""Making a trained model larger without changing what it says."""
