"""Counts machine code of Metal kernels for M1 and M2, by Mesa's compiler: see README.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import oracle

from metalgen import simulator
from metalgen.chips import get_chip
from metalgen.cli.options import Sizes
from metalgen.cli.render import change, starting_point
from metalgen.database.store import Store
from metalgen.devices.kernel import arguments
from metalgen.devices.simulator import SimulatorDevice
from metalgen.errors import MetalgenError
from metalgen.families import Schedule, default_schedule
from metalgen.features.fields import DTYPES
from metalgen.kinds import get_kind
from metalgen.problem.config import AttentionConfig
from metalgen.problem.samples import Call, sample_call
from metalgen.schedules.limits import APPLE
from metalgen.testing.fuzz import made_up
from metalgen.tuning.runner import tune

TABLE_DIMS = (64, 80, 128, 256)
TABLE_PICKS = tuple((chip, length) for chip in ("M1Max", "M3Max") for length in (4096, 1024))
HEADS = 32
FEATURES: tuple[dict[str, Any], ...] = (
    {"window_left": 100, "causal": True},
    {"softcap": 30.0},
    {"alibi": True},
    {"bias": True},
    {"array_mask": True},
    {"sinks": True},
    {"dropout": 0.1},
    {"varlen": True},
    {"kv_lens": True},
    {"rope": "half"},
    {"return_lse": True},
    {"page_size": 16},
    {"page_size": 64},
    {"kv_bits": 8},
    {"kv_bits": 4},
    {"page_size": 64, "kv_bits": 4},
)
DECODE_FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"page_size": 16},
    {"page_size": 64},
    {"kv_bits": 8},
    {"kv_bits": 4},
    {"page_size": 64, "kv_bits": 4},
)
"""Fields of the configs of the table, with the default schedules of two head sizes."""
COLUMNS = dict.fromkeys("instr mma i/mma tgld tgst devld mov fp int ic sh cf bar est".split(), "")
COLUMNS |= {"dem": "demand", "hreg": "half_registers", "thr": "threads", "spill": ""}
COLUMNS |= {"loopB": "loop_bytes", "tgmem": "threadgroup", "rest": "", "ov": "", "ser": ""}
"""Headings, and what of a row stands under them where that has another name."""


class Kernel(NamedTuple):
    """A complete kernel, as MLX would compile it."""

    name: str
    text: str
    threads: int


class Capture(SimulatorDevice):
    """Keeps the text of each kernel that a call launches, and runs none."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def compile(self, source: Any) -> Callable[..., list[mx.array]]:
        options = {"math_mode": source.math_mode}
        kernel = simulator.metal_kernel(**arguments(source), compile_options=options)

        def call(
            inputs: Any, output_shapes: Any, output_dtypes: Any, threadgroup: Any, **_: Any
        ) -> list[mx.array]:
            text = kernel.generated_source(inputs, output_dtypes).text
            self.kernels.append(Kernel(source.name, text, threadgroup[0]))
            return [mx.zeros(*output) for output in zip(output_shapes, output_dtypes, strict=True)]

        return call


def kernels(config: AttentionConfig, schedule: Schedule, family: str, call: Call) -> list[Kernel]:
    """What a call launches: the attention, and in decode perhaps what joins its splits."""
    capture = Capture()
    q, k, v, inputs = call
    capture.build(config, schedule)(q, k, v, 0.125, inputs)
    return capture.kernels


def kernel(config: AttentionConfig, schedule: Schedule, family: str) -> Kernel:
    """The attention kernel of a call of even lengths."""
    q_len, kv_len = (1, 512) if family == "decode" else (256, 256)
    call = sample_call(config, batch=2, q_len=q_len, kv_len=kv_len, ragged=False)
    return kernels(config, schedule, family, call)[0]


class Entry(NamedTuple):
    """A row to make: what is known of it, and what counts the rest."""

    own: dict[str, Any]
    rest: Callable[[], dict[str, Any]]

    def row(self) -> dict[str, Any]:
        try:
            return self.own | self.rest()
        except oracle.OracleError as error:
            return self.own | {"error": str(error)}


def entry(
    label: str, config: AttentionConfig, schedule: Schedule, family: str = "forward", text: str = ""
) -> Entry:
    """The row of a schedule, counted from its own text or from another one."""
    own = {
        "label": label,
        "family": family,
        "est": get_kind(schedule.kind).registers(config, schedule),
    }
    own |= {"config": config.to_dict(), "fields": schedule.to_dict(), "schedule": str(schedule)}
    found = kernel(config, schedule, family)
    source = oracle.adapt(text or found.text, found.threads)
    width = min(schedule.bd, -(-config.head_dim // 8) * 8)
    staged = schedule.bk * width * DTYPES[config.dtype]
    return Entry(own, lambda: oracle.count(source, staged))


def baseline(head_dim: int, causal: bool) -> Entry:
    keys, wide = oracle.STEEL[head_dim]
    shape = f"{oracle.STEEL_ROWS}x{keys}x{head_dim} sg{oracle.STEEL_TALL}x{wide}"
    own = {"label": f"{name(head_dim, causal)} steel", "schedule": shape}
    return Entry(own, lambda: oracle.steel(head_dim, causal))


def name(head_dim: int, causal: bool) -> str:
    return f"D{head_dim}{'c' if causal else ''}"


def line(row: dict[str, Any]) -> str:
    start = f"{row['label']:24} {row['schedule'].replace(' q:reg k:tg v:tg', ''):39}"
    if "error" in row:
        return f"{start} {row['error']}"
    shown = row | {"i/mma": f"{row['instr'] / row['mma']:.2f}"}
    shown["spill"] = f"{row['spills']}:{row['fills']}"
    return start + "".join(f"{shown.get(of or key, '-'):>6}" for key, of in COLUMNS.items())


def show(entries: list[Entry], path: str | None) -> bool:
    """Print rows as they come, and write them as JSON; whether all of them could be made."""
    print(f"{'kernel':24} {'schedule':39}" + "".join(f"{key:>6}" for key in COLUMNS))
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(Entry.row, entries):
            rows.append(row)
            print(line(row), flush=True)
    if path:
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")
    return not any("error" in row for row in rows)


def pick(config: AttentionConfig, chip: str, family: str, length: int) -> Schedule:
    """The schedule on record for a chip, or else what the chip's model chooses."""
    sizes = Sizes(1, HEADS, 1 if family == "decode" else length, length)
    schedule, place, _ = starting_point(config, sizes, chip)
    if place != "default":
        return schedule
    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder, "picks.db")) as store:
        problem, found, checker = sizes.problem(config), get_chip(chip), SimulatorDevice()
        winner = tune([problem], found, store, checker=checker).outcomes[0].winner
    return winner.schedule if winner else schedule


def choose(config: AttentionConfig, text: str, family: str, length: int) -> Schedule:
    """The schedule that `default`, `tuned:CHIP`, or JSON of fields to change stands for."""
    if text.startswith("tuned:"):
        return pick(config, text.removeprefix("tuned:"), family, length)
    schedule = default_schedule(config, APPLE, family)
    return schedule if text == "default" else change(config, schedule, json.loads(text))


def table() -> Iterator[Entry]:
    """Steel, the default and the picks of each size, and the defaults of features.

    Equal schedules make one row.
    """
    for head_dim in TABLE_DIMS:
        for causal in (False, True):
            yield baseline(head_dim, causal)
            config = AttentionConfig(head_dim=head_dim, causal=causal)
            labels = {default_schedule(config, APPLE): ["default"]}
            for chip, length in TABLE_PICKS:
                found = pick(config, chip, "forward", length)
                labels.setdefault(found, []).append(f"{chip[:2]}/{length // 1024}k")
            for schedule, where in labels.items():
                yield entry(f"{name(head_dim, causal)} {'+'.join(where)}", config, schedule)
    for family, every in (("forward", FEATURES), ("decode", DECODE_FEATURES)):
        for head_dim in (64, 128):
            for fields in every:
                shared = 4 if family == "decode" else 1
                config = AttentionConfig(head_dim=head_dim, heads_per_kv=shared, **fields)
                words = [f"{key}={value}".removesuffix("=True") for key, value in fields.items()]
                label = " ".join([f"D{head_dim}", family.replace("forward", ""), *words])
                schedule = default_schedule(config, APPLE, family)
                yield entry(label.replace("  ", " "), config, schedule, family)


def sweep(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """The texts of so many calls made up at random, and what they are; each text once."""
    seen = set()
    for number in range(seed, seed + count):
        case = made_up(number, APPLE)
        for found in kernels(case.config, case.schedule, case.family, case.call()):
            if found.text not in seen:
                seen.add(found.text)
                yield f"{found.name} of {case}", found.text


def report_checks(texts: Iterator[tuple[str, str]]) -> bool:
    """Print what is wrong with which text, and in how many each warning came; whether none is."""
    total = failed = 0
    warnings: Counter[str] = Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for what, (errors, found) in pool.map(lambda x: (x[0], oracle.check(x[1])), texts):
            total, failed = total + 1, failed + bool(errors)
            warnings.update(set(found))
            if errors:
                print("\n  ".join((what, *errors)), flush=True)
    for warning, times in warnings.most_common():
        print(f"{times:5} warning: {warning}")
    print(f"{total - failed} passed, {failed} failed")
    return not failed


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__)
    add = found.add_argument
    add("--head-dim", type=int, default=64, metavar="D")
    add("--dtype", choices=["float16", "float32"], default="float16")
    add("--causal", action="store_true")
    add("--with", dest="fields", nargs="+", default=[], metavar="FIELD[=VALUE]", help="of a config")
    add("--family", choices=["forward", "decode"], default="forward")
    which = "default, tuned:CHIP, or JSON of fields that differ from the default; several make rows"
    add("--schedule", nargs="+", default=["default"], metavar="WHICH", help=which)
    add("--length", type=int, default=4096, metavar="N", help="keys of a call, for tuned:CHIP")
    add("--print", dest="show_text", action="store_true", help="print the kernel, count nothing")
    add("--text", type=Path, metavar="FILE", help="count this text, such as an edited kernel")
    add("--json", metavar="FILE", help="write the rows there, too")
    add("--baseline", action="store_true", help="rows of MLX's steel attention")
    add("--table", action="store_true", help="steel, picks for M1Max and M3Max, and defaults")
    add("--check", nargs="+", type=Path, metavar="FILE", help="only the strict front end")
    add("--sweep", type=int, metavar="N", help="the same for the kernels of N random calls")
    add("--seed", type=int, default=0, metavar="N", help="where the sweep starts")
    return found


def value(text: str) -> Any:
    """JSON, or else a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> bool:
    given = parser().parse_args()
    if given.check:
        return report_checks((str(path), path.read_text()) for path in given.check)
    if given.sweep:
        return report_checks(sweep(given.sweep, given.seed))
    if given.table:
        return show(list(table()), given.json)
    if given.baseline:
        sizes = [(dim, causal) for dim in TABLE_DIMS for causal in (False, True)]
        return show([baseline(*size) for size in sizes], given.json)
    fields = {"head_dim": given.head_dim, "dtype": given.dtype, "causal": given.causal}
    for field in given.fields:
        key, valued, text = field.partition("=")
        fields[key] = value(text) if valued else True
    config = AttentionConfig.from_dict(fields)
    schedules = [choose(config, which, given.family, given.length) for which in given.schedule]
    if given.show_text:
        print(kernel(config, schedules[0], given.family).text)
        return True
    text = given.text.read_text() if given.text else ""
    label = " ".join([name(given.head_dim, given.causal), *given.fields])
    return show([entry(label, config, each, given.family, text) for each in schedules], given.json)


if __name__ == "__main__":
    try:
        sys.exit(not main())
    except (MetalgenError, oracle.OracleError, OSError, json.JSONDecodeError) as error:
        sys.exit(f"agx.py: {error}")
