# SPDX-License-Identifier: Apache-2.0
"""The application on a port of its own, and a real Chromium to look at it with."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from feature_store.online import OnlineReader
from recsys.bundle.bundle import Bundle
from serving.app import create_app
from serving.engine import Engine, Loaded
from tests.serving.support import KNOWN, Switch, settings, wait_until

SCREENSHOTS = Path(__file__).parents[3] / "build" / "screenshots"
MARKUP = '<img src=x onerror="window.taken=1">&amp;<script>window.taken=2</script>'

Serving = Callable[[Switch], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for the tests of one file: while it is there an event loop runs in this thread, and others cannot be started."""
    found = shutil.which("chromium")
    assert found is not None, "these tests look at the page with Debian's package chromium"
    # Chromium's own sandbox does not run as root, as whom tests in a container run.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page, none of whose scripts may fail, and which the browser never had to keep from anything."""
    context = browser.new_context(viewport={"width": 1240, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(60_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Content Security Policy" in message.text else None)
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    yield page
    context.close()
    assert problems == []


@pytest.fixture(scope="session")
def serving() -> Serving:
    @contextmanager
    def serving(source: Switch) -> Iterator[str]:
        engine = Engine(source, settings(max_batch_rows=64))
        server = uvicorn.Server(uvicorn.Config(create_app(engine, engine.settings), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()

    return serving


@pytest.fixture(scope="session")
def named(bundle: Bundle, online: OnlineReader) -> Callable[..., Loaded]:
    """Loads a version in which one title is markup; with another ``rank_weight`` its scores are others."""

    def named(version: int, rank_weight: float | None = None) -> Loaded:
        own = bundle
        if rank_weight is not None:
            # The recorded answers are those of the bundle's own weight.
            changed = bundle.settings.model_copy(update={"rank_weight": rank_weight})
            own = replace(bundle, manifest=bundle.manifest.model_copy(update={"seed": version}), settings=changed, golden=None)
        loaded = Loaded.of(own, online, name="recsys", version=version, sample=KNOWN[:2])
        return replace(loaded, titles={item: MARKUP if item == "7" else title for item, title in loaded.titles.items()})

    return named
