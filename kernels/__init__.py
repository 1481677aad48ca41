# SPDX-License-Identifier: Apache-2.0
"""Kernels, one folder an op: ``reference.py`` is the definition; ``cpu.py`` and ``triton_ops.py`` must agree with it.

Imports torch, triton and fbgemm, and nothing else of this project. Triton is imported only when a Triton kernel is asked for.
"""
