# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files, one for each published model and the quickstart."""
