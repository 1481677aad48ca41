# SPDX-License-Identifier: Apache-2.0
"""What `dagster dev -m pipelines.orchestration.definitions` loads: the definitions of the recipe that the environment names."""

import json
import os
from pathlib import Path

from dagster import Definitions

from pipelines.orchestration.assets import definitions
from pipelines.orchestration.serve import ENVIRONMENT
from pipelines.recipe import Recipe
from recsys.core.config import load_recipe
from recsys.core.errors import ConfigError


def _from_environment() -> Definitions:
    if ENVIRONMENT not in os.environ:
        raise ConfigError(f"{ENVIRONMENT} is not set: start it with `recsys dagster RECIPE`")
    told = json.loads(os.environ[ENVIRONMENT])
    return definitions(load_recipe(Recipe, told["recipe"], told["overrides"]), Path(told["home"]))


defs = _from_environment()
