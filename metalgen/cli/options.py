"""Options that several commands share, and how they print."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from metalgen.families.sizes import Problem
from metalgen.features.fields import DTYPES
from metalgen.problem.config import AttentionConfig

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Sizes:
    """How large a call is: batch entries, query heads of each, queries, keys."""

    batch: int
    heads: int
    q_len: int
    kv_len: int

    def problem(self, config: AttentionConfig) -> Problem:
        """The tuning problem of a config at these sizes."""
        return Problem(config, self.batch * self.heads, self.q_len, self.kv_len)


def config_options(function: Function) -> Function:
    """Options that say what attention to compute; the command gets ``config`` and ``sizes``.

    ``config`` is an `AttentionConfig` and ``sizes`` a `Sizes`; both are checked.
    """
    return described_options("1024", "as many as queries")(function)


def described_options(q_len: str, kv_len: str) -> Callable[[Function], Function]:
    """`config_options`, with the defaults of the lengths as this command's help calls them."""
    return functools.partial(_config_options, q_len, kv_len)


def _config_options(q_default: str, kv_default: str, function: Function) -> Function:
    @click.option(
        "--head-dim",
        type=int,
        default=64,
        show_default=True,
        metavar="D",
        help="Width of query and key rows.",
    )
    @click.option(
        "--value-head-dim",
        type=int,
        metavar="DV",
        help="Width of value rows. Default: that of keys.",
    )
    @click.option(
        "--dtype",
        type=click.Choice(list(DTYPES)),
        default="float16",
        show_default=True,
        help="Of queries, keys and values.",
    )
    @click.option(
        "--heads-per-kv",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="Query heads that share one KV head.",
    )
    @click.option("--causal", is_flag=True, help="Causal mask, aligned at the lower right.")
    @click.option("--window-left", type=int, metavar="N", help="Keys seen before the query's own.")
    @click.option("--window-right", type=int, metavar="N", help="Keys seen after the query's own.")
    @click.option("--softcap", type=float, metavar="C", help="Scores x become C tanh(x / C).")
    @click.option("--lse", is_flag=True, help="Also return the log-sum-exp.")
    @click.option(
        "--with",
        "fields",
        multiple=True,
        metavar="FIELD[=VALUE]",
        help="Any other field of AttentionConfig, such as alibi or page_size=16.",
    )
    @click.option(
        "--batch", type=int, default=1, show_default=True, metavar="B", help="Batch entries."
    )
    @click.option("--heads", type=int, metavar="H", help="Query heads. Default: about 32.")
    @click.option(
        "--q-len", type=int, default=1024, metavar="LQ", help=f"Queries. Default: {q_default}."
    )
    @click.option("--kv-len", type=int, metavar="LK", help=f"Keys. Default: {kv_default}.")
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        head_dim: int,
        value_head_dim: int | None,
        dtype: str,
        heads_per_kv: int,
        causal: bool,
        window_left: int | None,
        window_right: int | None,
        softcap: float | None,
        lse: bool,
        fields: tuple[str, ...],
        batch: int,
        heads: int | None,
        q_len: int,
        kv_len: int | None,
        **kwargs: Any,
    ) -> Any:
        named = {
            "head_dim": head_dim,
            "dtype": dtype,
            "value_head_dim": value_head_dim,
            "heads_per_kv": heads_per_kv,
            "causal": causal,
            "window_left": window_left,
            "window_right": window_right,
            "softcap": softcap,
            "return_lse": lse,
        }
        config = AttentionConfig.from_dict(named | _fields(fields, named))
        if heads is None:
            heads = heads_per_kv * max(1, 32 // heads_per_kv)
        elif heads < 1 or heads % heads_per_kv:
            raise click.UsageError(
                f"--heads: expected a multiple of --heads-per-kv {heads_per_kv}, but got {heads}"
            )
        for name, value in (("--batch", batch), ("--q-len", q_len), ("--kv-len", kv_len)):
            if value is not None and value < 1:
                raise click.UsageError(f"{name}: expected a positive integer, but got {value}")
        sizes = Sizes(batch, heads, q_len, q_len if kv_len is None else kv_len)
        sizes.problem(config)  # complains about sizes that are too large
        return function(*args, config=config, sizes=sizes, **kwargs)

    return wrapper  # type: ignore[return-value]


def _fields(given: Sequence[str], named: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config from ``NAME`` or ``NAME=VALUE``; a value is JSON, or else a word."""
    known = [field.name for field in dataclasses.fields(AttentionConfig)]
    fields: dict[str, Any] = {}
    for text in given:
        name, given_value, value = text.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.6)
            some = f"such as {', '.join(near)}" if near else f"one of {', '.join(known)}"
            raise click.UsageError(
                f"--with: expected a field of AttentionConfig, {some}, but got {name!r}"
            )
        if name in named or name in fields:
            other = "--lse" if name == "return_lse" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"--with {name}: expected once, or as {other}, but got {text!r}")
        try:
            fields[name] = json.loads(value) if given_value else True
        except ValueError:
            fields[name] = value
    return fields


def json_option(function: Function) -> Function:
    """``--json``: the command gets ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def chip_option(text: str) -> Callable[[Function], Function]:
    """``--chip NAME``: the command gets ``chip``, a name or None."""
    return click.option("--chip", metavar="NAME", help=text, shell_complete=_chips)


def _chips(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from metalgen.chips import all_chips

    return [chip.name for chip in all_chips() if chip.name.lower().startswith(incomplete.lower())]


def print_json(data: object) -> None:
    """Print one JSON document on standard output."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def milliseconds(seconds: float | None) -> str:
    """A time as people read it, such as ``0.378 ms``; a dash for none."""
    return "-" if seconds is None else f"{seconds * 1e3:.3f} ms"


def duration(seconds: float | None) -> str:
    """How long something takes, such as ``45 s`` or ``2 min 05 s``; a dash for unknown."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def ratio(default: float | None, seconds: float | None) -> str:
    """How many times faster than the default, such as ``1.07x``; a dash where that is unknown."""
    return f"{default / seconds:.2f}x" if default and seconds else "-"


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, each column as wide as its widest cell."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def echo_table(rows: Sequence[tuple[str, ...]], indent: str = "") -> None:
    """Print rows as `columns` do; a terminal that is too narrow has the last one below the others.

    What goes to a file or a pipe has a line for each row, however long.
    """
    lines = [indent + line for line in columns(rows)]
    width = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or all(len(line) <= width for line in lines):
        click.echo("\n".join(lines))
        return
    for row, head in zip(rows, columns([row[:-1] for row in rows]), strict=True):
        click.echo(indent + head)
        if row[-1]:
            inner = indent + "    "
            room = max(20, width - len(inner))
            click.echo("\n".join(inner + part for part in textwrap.wrap(row[-1], room)))


def problem_cells(problem: Problem) -> tuple[str, str]:
    """A problem in two cells: its config, and its sizes."""
    return str(problem.config), f"BH={problem.batch_heads} {problem.q_len}x{problem.kv_len}"


def problem_fields(problem: Problem) -> dict[str, Any]:
    """A problem as JSON shows it."""
    return {
        "config": problem.config.to_dict(),
        "family": problem.family,
        "batch_heads": problem.batch_heads,
        "q_len": problem.q_len,
        "kv_len": problem.kv_len,
    }
