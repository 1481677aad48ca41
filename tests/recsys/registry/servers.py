# SPDX-License-Identifier: Apache-2.0
"""Real servers for the registry's tests: PostgreSQL, and a bucket that speaks S3."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PASSWORD = "s3cret-word"
WAIT_SECONDS = 30


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a new server's database ``postgres``, without which nothing of it is left.

    PostgreSQL refuses to run as root, which then lends it the user ``postgres`` of the Debian package.

    Raises:
        RuntimeError: it did not start.
    """
    user = pwd.getpwnam("postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name)
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    secret = folder / "password"
    secret.write_text(PASSWORD)
    for path in (folder, secret):
        os.chown(path, user.pw_uid, user.pw_gid)
    demoted = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    data = folder / "data"
    subprocess.run(
        [_binary("initdb"), "-D", data, "-U", "recsys", "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync", "-E", "UTF8"],
        cwd=folder, check=True, stdout=subprocess.DEVNULL, **demoted,
    )  # fmt: skip
    process = subprocess.Popen(
        [_binary("postgres"), "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder, "-F"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **demoted,
    )  # fmt: skip
    try:
        _wait(process, port)
        yield f"postgresql://recsys:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # SIGTERM would wait for clients
        process.wait(WAIT_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def _binary(name: str) -> str:
    """Of the newest version that is installed; Debian keeps servers off the path."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    command = str(found[-1]) if found else shutil.which(name)
    if command is None:
        raise RuntimeError(f"{name} is not installed: install the package postgresql")
    return command


def _wait(process: "subprocess.Popen[bytes]", port: int) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while subprocess.run([_binary("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode != 0:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"postgres did not start on port {port}: exit status {process.poll()}")
        time.sleep(0.05)
