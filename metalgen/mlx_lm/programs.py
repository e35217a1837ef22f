"""mlx-lm's own programs, patched: what ``metalgen lm`` runs."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from metalgen.calls import recording as recording_module
from metalgen.calls.recording import Recording, record
from metalgen.errors import ArgumentError
from metalgen.mlx_lm import attention
from metalgen.mlx_lm.counts import stats
from metalgen.mlx_lm.models import FAULTS
from metalgen.mlx_lm.patching import NoMlxLm, patch, seen_models, unpatch

MODULES = {
    "generate": "mlx_lm.generate",
    "chat": "mlx_lm.chat",
    "serve": "mlx_lm.server",
    "batch": "metalgen.mlx_lm.batch",
    "lora": "mlx_lm.lora",
    "fuse": "mlx_lm.fuse",
    "evaluate": "mlx_lm.evaluate",
    "perplexity": "mlx_lm.perplexity",
    "benchmark": "mlx_lm.benchmark",
    "cache_prompt": "mlx_lm.cache_prompt",
}
"""The module of each program; each has a ``main`` that reads ``sys.argv``."""
INTERACTIVE = ("chat", "serve")
"""Programs that end when their user ends them, and cannot be run twice for a comparison."""


@dataclass(frozen=True)
class Settings:
    """The options of ``metalgen lm`` itself.

    Args:
        flash: whether to patch at all.
        block_size: queries and keys of a tile, in place of what tuning chose; None: that.
        compare: run the program without and with metalgen's attention.
        record: a file for the calls that were made; None: none.
        device, chip: as of `metalgen.mlx_lm.patch`.
    """

    flash: bool = True
    block_size: int | None = None
    compare: bool = False
    record: Path | None = None
    device: str | None = None
    chip: str | None = None


After = Callable[[Recording], None]
"""What is done with the calls of a program, if they were recorded, before its last line."""


def run(
    program: str, arguments: Sequence[str], settings: Settings, after: After | None = None
) -> int:
    """Run a program of mlx-lm; returns an exit code.

    Args:
        program: a key of `MODULES`.
        arguments: mlx-lm's own options.
        settings: ours.
        after: called with the calls that were made, which are recorded for it; None: nothing.

    Raises:
        ArgumentError: settings that exclude each other.
        NoMlxLm: mlx-lm, or something that the program needs, is not installed.
    """
    if settings.compare and program in INTERACTIVE:
        raise ArgumentError("compare_attention", "a program that ends by itself", program)
    if settings.compare and not settings.flash:
        raise ArgumentError("compare_attention", "attention that is not disabled", "disabled")
    if not settings.flash and (after is not None or settings.record is not None):
        name = "record" if after is None else "benchmark_attention"
        raise ArgumentError(name, "attention that is not disabled", "disabled")
    main = _main(program)
    if settings.compare:
        return _compare(program, main, arguments, settings, after)
    if not settings.flash:
        code = _call(program, main, arguments)
        _say("attention: mlx-lm's own, as asked (--disable-flash-attention)")
        return code
    with _patched(program, settings, after is not None) as recording:
        code = _call(program, main, arguments)
        if stats().calls or not {"-h", "--help"} & {*arguments}:
            _last_words(recording, settings, after)
    if program == "serve" and stats().calls:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End the process at once.

    The server generates in a thread of its own, which never ends. If the interpreter ended as
    usual, MLX's own threads would be destroyed while they run, and the process would abort.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _main(program: str) -> Callable[[], Any]:
    name = MODULES[program]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        extra = {"lora": "[train]", "evaluate": "[evaluate]"}.get(program, "")
        raise NoMlxLm(
            f"{name} cannot be imported ({error}): pip install 'mlx-lm{extra}'"
        ) from error
    main: Callable[[], Any] = module.main
    return main


@contextlib.contextmanager
def _patched(
    program: str, settings: Settings, recorded: bool = False
) -> Iterator[Recording | None]:
    """mlx-lm patched, its server with a page, and the calls recorded where that was asked for."""
    patch(device=settings.device, chip=settings.chip)
    assert attention.active is not None
    attention.active.block_size = settings.block_size
    recorded = recorded or settings.record is not None
    try:
        with contextlib.ExitStack() as stack:
            if program == "serve":
                from metalgen.mlx_lm.serving import chat_page

                stack.enter_context(chat_page())
            yield stack.enter_context(record(settings.record)) if recorded else None
    finally:
        unpatch()


def _call(program: str, main: Callable[[], Any], arguments: Sequence[str]) -> int:
    """Run a program's ``main`` with its own command line.

    Raises:
        NoMlxLm: the program imports a package, once it runs, that is not installed.
    """
    own, sys.argv = sys.argv, [f"metalgen lm {program}", *arguments]
    try:
        main()
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "metalgen", "mlx_lm"):
            raise
        raise NoMlxLm(
            f"{MODULES[program]} needs {missing}, which is not installed: pip install {missing}"
        ) from error
    except SystemExit as ended:  # of argparse: --help, or a mistake
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = own
        sys.stdout.flush()
    return 0


def _say(text: str) -> None:
    print(f"metalgen: {text}", file=sys.stderr, flush=True)


def _last_words(
    recording: Recording | None, settings: Settings, after: After | None = None
) -> None:
    found = stats().summary
    if recording is not None and after is not None:
        recording_module.active = None  # what is measured now is no call of the program
        after(recording)
    for name in seen_models():
        if name in FAULTS:
            _say(f"note on {name}: {FAULTS[name]}")
    if settings.record is not None:
        _say(f"calls recorded: metalgen tune --recorded {settings.record}")
    _say(found)


class _Tee(io.TextIOBase):
    """Writes to a stream, and keeps what was written."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.kept = stream, io.StringIO()

    def write(self, text: str) -> int:
        self._stream.write(text)
        return self.kept.write(text)

    def flush(self) -> None:
        self._stream.flush()


RATES = {
    "prompt tokens/s": re.compile(
        r"Prompt: \d+ tokens, ([\d.]+) tok|Averages: prompt_tps=([\d.]+)"
    ),
    "generated tokens/s": re.compile(
        r"Generation: \d+ tokens, ([\d.]+) tok|generation_tps=([\d.]+)"
    ),
}
"""Speeds that mlx-lm's programs print."""
MEASURED = re.compile(r"[\d.]+ tokens-per-sec|[Pp]eak.*|\w+_tps=.*|.*sec.*|Trial.*", re.IGNORECASE)
"""What a program prints that differs from run to run."""


def _compare(
    program: str,
    main: Callable[[], Any],
    arguments: Sequence[str],
    settings: Settings,
    after: After | None,
) -> int:
    """Run a program without and with our attention, and print both side by side."""
    rows: list[dict[str, str]] = []
    texts = []
    for flash in (False, True):
        _say("with metalgen's attention:" if flash else "with mlx-lm's own attention:")
        mx.clear_cache()
        mx.reset_peak_memory()
        tee = _Tee(sys.stdout)
        begin = time.perf_counter()
        with contextlib.ExitStack() as stack:
            recording = None
            if flash:
                patched = _patched(program, settings, after is not None)
                recording = stack.enter_context(patched)
            with contextlib.redirect_stdout(tee):
                code = _call(program, main, arguments)
            text = tee.kept.getvalue()
            texts.append(MEASURED.sub("", text))
            row = {"seconds": f"{time.perf_counter() - begin:.2f}"}
            for name, pattern in RATES.items():
                if found := pattern.findall(text):
                    row[name] = next(filter(None, found[-1]))
            row["peak memory"] = f"{mx.get_peak_memory() / 1e9:.3f} GB"
            rows.append(row)
            if flash:
                _last_words(recording, settings, after)
        if code:
            return code
    width = max(len(name) for name in rows[0])
    print(f"{'':{width}}  {'mlx-lm':>12}  {'metalgen':>12}")
    for name in rows[0]:
        print(f"{name:{width}}  {rows[0][name]:>12}  {rows[1].get(name, '-'):>12}")
    print("The output is the same." if texts[0] == texts[1] else "The output DIFFERS.")
    return 0
