# SPDX-License-Identifier: Apache-2.0
"""The servers that ours is compared with, each a program of its own: ``python -m benchmarks.serving.peers.NAME PORT HOME WORK``."""
