"""The command line: one module a command, each imported only when it is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``metalgen`` with `arguments` (None: the process's own), and exit.

    Exit codes: 0 done; 1 done, but something asked for was not found; 2 bad input, with one line
    on standard error; 130 interrupted.
    """
    from metalgen.cli.app import run

    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called: >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (as long as the process)
    sys.exit(run(arguments))
