# SPDX-License-Identifier: Apache-2.0
"""The steps of a run. Each step of `pipelines.pipeline` is the module of its name, whose ``run`` reads and writes directories.

They import the recipe's type for the type checker only: what a recipe may hold is not the code of every step.
"""
