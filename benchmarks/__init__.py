# SPDX-License-Identifier: Apache-2.0
"""One module a question: ``python -m benchmarks NAME [--quick]`` prints a table and, last, one JSON line."""
