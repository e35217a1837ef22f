"""A chat page for mlx-lm's server, next to its OpenAI interface."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metalgen.mlx_lm.counts import stats

PAGE = Path(__file__).with_name("chat.html")
STATUS = "/metalgen/status"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)
"""The page loads nothing, and speaks to its own server only."""


@contextlib.contextmanager
def chat_page() -> Iterator[None]:
    """Let mlx-lm's server answer ``/`` with the page, and `STATUS` with what runs there."""
    handler: Any = importlib.import_module("mlx_lm.server").APIHandler
    own = handler.do_GET

    def do_GET(self: Any) -> None:
        path = self.path.partition("?")[0]
        if path in ("/", "/index.html"):
            _answer(self, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == STATUS:
            _answer(self, "application/json", json.dumps(_status(self)).encode())
        else:
            own(self)

    handler.do_GET = do_GET
    try:
        yield
    finally:
        handler.do_GET = own


def _answer(handler: Any, kind: str, body: bytes) -> None:
    handler.send_response(200)
    for name, value in (
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Content-Security-Policy", POLICY),
        ("X-Content-Type-Options", "nosniff"),
        ("Cache-Control", "no-store"),
    ):
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def _status(handler: Any) -> dict[str, str]:
    model = str(handler.response_generator.cli_args.model or "")
    name = Path(model).name if Path(model).exists() else model
    return {"model": name or "default", "attention": stats().summary}
