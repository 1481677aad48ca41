# SPDX-License-Identifier: Apache-2.0
"""A bundle's ranker compiled ahead of time on the host that serves it."""

from recsys.inference.compiled.ranker import CompiledRanker, compile_ranker

__all__ = ["CompiledRanker", "compile_ranker"]
