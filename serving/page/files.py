# SPDX-License-Identifier: Apache-2.0
"""The page's files: all that may be asked for, read once, with the headers that keep a browser to them."""

from dataclasses import dataclass
from importlib import resources

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""What every file of the page is sent with: nothing is loaded from elsewhere, and nothing runs that stands in the markup."""


@dataclass(frozen=True)
class File:
    """One file."""

    content: bytes
    media_type: str


def page_files() -> dict[str, File]:
    """The files by name."""
    folder = resources.files("serving.page").joinpath("static")
    return {file.name: File(file.read_bytes(), _TYPES[file.name.rpartition(".")[2]]) for file in folder.iterdir()}
