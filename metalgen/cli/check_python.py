"""``metalgen check FILE.py``, ``metalgen check -m MODULE``: run Python with its kernels checked."""

from __future__ import annotations

import contextlib
import runpy
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalgen.cli.subject import Subject
from metalgen.errors import MetalgenError

if TYPE_CHECKING:
    from metalgen.simulator import Launch, Recorder


def check_python(file: Path | str, arguments: tuple[str, ...], seed: int) -> Subject:
    """Run a Python file, or the module of this name, with all its kernels checked."""
    from metalgen.simulator import install, record

    if isinstance(file, Path) and not file.is_file():
        raise click.UsageError(f"FILE: expected a Python file, but {str(file)!r} is none")
    failure, known = "", set(sys.modules)
    with record(checked=True, seed=seed) as runs, install(), _as_main(file, arguments):
        try:
            # What the file prints goes beside the report, so that --json stays one document.
            with contextlib.redirect_stdout(sys.stderr):
                if isinstance(file, Path):
                    runpy.run_path(str(file), run_name="__main__")
                else:
                    runpy.run_module(file, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            if stop.code not in (None, 0):
                failure = f"{file}: exit code {stop.code}"
        except MetalgenError as error:
            failure = f"{file}:{_line_in(file, error)}: {error}"
        except SyntaxError as error:
            failure = f"{error.filename or file}:{error.lineno or '?'}: SyntaxError: {error.msg}"
        except Exception as error:
            failure = f"{file}:{_line_in(file, error)}: {type(error).__name__}: {error}"
    if not failure and not len(runs):
        failure = f"{file}: the program ran no kernel of mx.fast.metal_kernel"
    imported = (getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - known)
    files = [
        *([file] if isinstance(file, Path) else []),
        *sorted(_shown(Path(path)) for path in imported if path and path.endswith(".py")),
    ]
    return Subject(str(file), _distinct(runs), failure=failure, files=tuple(files))


def _shown(path: Path) -> Path:
    """A path from here where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@contextlib.contextmanager
def _as_main(file: Path | str, arguments: tuple[str, ...]) -> Iterator[None]:
    argv, path = sys.argv[:], sys.path[:]
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(file.resolve().parent) if isinstance(file, Path) else "")
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _line_in(file: Path | str, error: BaseException) -> int | str:
    """Return the line of ``file`` that the error came through last."""
    if isinstance(file, str):
        return "?"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    return lines[-1] or "?" if lines else "?"


def _distinct(runs: Recorder) -> list[Launch]:
    """Return all launches; of those with equal findings of one kernel only the first."""
    seen = set()
    kept = []
    for launch in runs:
        places = tuple((f.kind, f.file, f.line) for f in launch.findings or ())
        key = (launch.kernel, launch.source, places)
        if not places or key not in seen:
            kept.append(launch)
        seen.add(key)
    return kept
