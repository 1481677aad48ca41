# SPDX-License-Identifier: Apache-2.0
"""Settings from options and from the environment."""

from pathlib import Path

import pytest

from recsys.core.errors import ConfigError
from serving.settings import Settings


def test_options_come_before_the_environment_and_that_before_defaults() -> None:
    environment = {"RECSYS_SERVE_PORT": "9000", "RECSYS_SERVE_MAX_BATCH_ROWS": "64", "PATH": "/bin"}
    settings = Settings.from_arguments(["--port", "9001", "--home", "here", "--ready-needs-store", "false"], environment)
    assert (settings.port, settings.max_batch_rows, settings.home, settings.ready_needs_store) == (9001, 64, Path("here"), False)
    assert settings.most_waiting_rows == 4 * 64
    assert settings.model == Settings.model_fields["model"].default


def test_the_environment_of_a_worker_gives_the_same_settings() -> None:
    settings = Settings.from_arguments(["--workers", "2", "--max-delay-ms", "1.5", "--home", "here", "--queue-rows", "77"], {})
    assert Settings.from_environment(settings.environment()) == settings
    assert Settings.from_environment(Settings(home=Path("x")).environment()) == Settings(home=Path("x"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RECSYS_SERVE_PROT", "1", "unknown key 'prot'; did you mean 'port'?"),
        ("RECSYS_SERVE_PORT", "many", "port: .*got 'many'"),
        ("RECSYS_SERVE_MAX_BATCH_ROWS", "0", "max_batch_rows: .*greater than or equal to 1, got '0'"),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.from_environment({name: value})


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())
