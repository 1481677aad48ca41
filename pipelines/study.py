# SPDX-License-Identifier: Apache-2.0
"""What the studies share: a recipe with quick settings, and the page that shows one."""

import html
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydantic import Field

from recsys.core.components import load_plugins
from recsys.core.config import Config, apply_overrides, parse, read_recipe
from recsys.core.errors import ConfigError

QUICK = "-quick"  # after the name of a recipe's folder


class StudyRecipe(Config):
    """What the recipe of a study has besides its plan.

    Attributes:
        name: results stand below a folder of this name.
        plugins: packages that register a user's own components.
        quick: keys and values that ``--quick`` sets, by dotted key.
    """

    name: str
    plugins: tuple[str, ...] = ()
    quick: dict[str, Any] = Field(default_factory=dict)


Recipe = TypeVar("Recipe", bound=StudyRecipe)


def load(cls: type[Recipe], recipe: str, overrides: Sequence[str] = (), *, quick: bool = False) -> Recipe:
    """Read a recipe; ``quick`` applies its own quick settings before the overrides.

    Raises:
        ConfigError: names the key, its value and what was expected.
    """
    data, source = read_recipe(recipe)
    own = data.get("quick") or {}
    if quick and not (isinstance(own, dict) and own):
        raise ConfigError(f"{source}: --quick: the recipe has no section 'quick'")
    settings = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in own.items()] if quick else []
    data = apply_overrides(data, [*settings, *overrides])
    load_plugins(data.get("plugins", ()))
    return parse(cls, data, source=source, overrides=[*settings, *overrides])


_CSS = """
:root { --ink:#1f2933; --muted:#616e7c; --line:#e4e7eb; --soft:#f5f7fa; }
body { font: 15px/1.55 system-ui, "Segoe UI", sans-serif; color: var(--ink); margin: 0 auto; max-width: 1080px; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px } h3 { font-size: 15px; margin: 22px 0 6px } p { max-width: 76ch }
table { border-collapse: collapse; margin: 8px 0 16px; font-variant-numeric: tabular-nums }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid var(--line) } th { color: var(--muted); font-size: 13px }
pre { background: var(--soft); padding: 12px; font-size: 12px; overflow-x: auto }
"""


def page(title: str, body: str, recipe: str) -> str:
    """A page of HTML with what a study found, and its resolved recipe folded away."""
    details = f"<details><summary>Resolved recipe</summary><pre>{html.escape(recipe)}</pre></details>"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n'
        f"</head>\n<body>\n<h1>{html.escape(title)}</h1>\n{body}\n{details}\n</body>\n</html>\n"
    )
