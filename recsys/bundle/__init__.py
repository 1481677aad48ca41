# SPDX-License-Identifier: Apache-2.0
"""One immutable, hashed directory that holds everything that must go live together."""
