"""``metalgen check``: execute kernels on the simulator and report every defect."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from metalgen.cli.locating import line_in
from metalgen.cli.options import Sizes, chip_option, described_options, json_option, print_json
from metalgen.cli.render import change, starting_point
from metalgen.errors import MetalgenError
from metalgen.families import Schedule, check_schedule, is_valid
from metalgen.plurals import counted
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import all_knobs

if TYPE_CHECKING:
    from metalgen.devices import Device
    from metalgen.simulator import Finding, Launch, Recorder

CLEAN, FINDINGS, COULD_NOT_RUN = 0, 1, 2
BESIDE_A_FILE = ("file", "arguments", "seed", "time_limit", "counters", "as_json")


@dataclasses.dataclass
class Subject:
    """One thing that was checked: a schedule or a file, its launches and what went wrong."""

    title: str
    launches: Sequence[Launch]
    wrong: str = ""
    """How its numbers differ from the float64 reference."""
    failure: str = ""
    """Why it could not run."""
    files: tuple[Path, ...] = ()
    """The Python file that was run, and those that it imported."""

    @property
    def findings(self) -> int:
        return sum(len(launch.findings or ()) for launch in self.launches)

    @property
    def exit_code(self) -> int:
        if self.failure:
            return COULD_NOT_RUN
        return FINDINGS if self.findings or self.wrong else CLEAN

    def place(self, launch: Launch, finding: Finding) -> tuple[Path, int] | None:
        """The Python file and its line that a finding is on, where that can be told."""
        source = launch.findings.sources.get(finding.file or "") if launch.findings else None
        if source is None or not finding.line:
            return None
        program = source.split("\n")
        for file in self.files:
            if line := line_in(_lines(file), program, finding.line):
                return file, line
        return None

    def before(self, launch: Launch, finding: Finding) -> str:
        """The same as text that stands before a finding."""
        place = self.place(launch, finding)
        return f"{place[0]}:{place[1]}: " if place else ""

    def written(self, launch: Launch, finding: Finding) -> dict[str, Any]:
        """The same for JSON, of a file that was run."""
        if not self.files:
            return {}
        place = self.place(launch, finding)
        return {"written": {"file": str(place[0]), "line": place[1]} if place else None}

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "exit_code": self.exit_code,
            "wrong": self.wrong,
            "failure": self.failure,
            "launches": [
                {
                    "kernel": launch.kernel,
                    "grid": launch.grid,
                    "threadgroup": launch.threadgroup,
                    "findings": [
                        finding.as_dict() | self.written(launch, finding)
                        for finding in launch.findings or ()
                    ],
                    "counters": launch.counters.as_dict() if launch.counters else None,
                }
                for launch in self.launches
            ],
        }


def _values(ctx: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> Any:
    """Split ``16,32`` and repeated options into the values that a schedule's field may take."""
    name = str(parameter.name)
    choices = all_knobs()[name].choices
    values = []
    for word in ",".join(given).split(",") if given else ():
        value: Any = int(word) if word.isdigit() and isinstance(choices[0], int) else word
        if value not in choices:
            listed = (
                f"{choices.start} to {choices.stop - 1} in steps of {choices.step}"
                if isinstance(choices, range)
                else ", ".join(map(str, choices))
            )
            raise click.BadParameter(f"expected values among {listed}, but got {word!r}")
        values.append(value)
    return tuple(values)


def _schedule_options(function: Any) -> Any:
    for name in reversed(all_knobs()):
        function = click.option(
            "--" + name.replace("_", "-"),
            multiple=True,
            callback=_values,
            metavar="A[,B...]",
            help=all_knobs()[name].help,
        )(function)
    return function


@click.command(epilog="Exit code: 0 clean, 1 findings or wrong numbers, 2 could not run.")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@described_options("small and ragged", "small and ragged")
@chip_option("Start from this chip's best schedule on record, and keep its limits.")
@_schedule_options
@click.option("--all", "every", is_flag=True, help="Every schedule of the space, see --limit.")
@click.option("--limit", type=click.IntRange(1), help="With --all: the first N schedules.")
@click.option("--seed", type=int, default=0, help="Other than 0: shuffle the order of threads.")
@click.option("--time-limit", type=float, metavar="SECONDS", help="Of one launch. Default: 120.")
@click.option("--counters", is_flag=True, help="Also print what each launch did.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    config: AttentionConfig,
    sizes: Sizes,
    file: Path | None,
    arguments: tuple[str, ...],
    chip: str | None,
    every: bool,
    limit: int | None,
    seed: int,
    time_limit: float | None,
    counters: bool,
    as_json: bool,
    **fields: tuple[Any, ...],
) -> None:
    """Execute a kernel on the simulator, check it for defects and count its work.

    With a Python FILE: runs it (ARGUMENTS are its own, after --), every mx.fast.metal_kernel that
    it calls under the checker. Without one: runs metalgen's own kernel for a config, and compares
    its numbers with float64. Fields of the schedule take several values; every valid combination is
    checked. Lengths are small and ragged unless --q-len or --kv-len says otherwise; up to 64
    queries are the decode kernel's.
    """
    from metalgen.simulator import limits
    from metalgen.simulator.launch_limits import LONGEST

    if time_limit is not None:
        if not 0 < time_limit <= LONGEST:
            expected = "seconds above 0, up to a million"
            raise click.UsageError(f"--time-limit: expected {expected}, but got {time_limit}")
        ctx.with_resource(limits(seconds=time_limit))
    if limit is not None and not every:
        raise click.UsageError(f"--limit: expected with --all, but got {limit} without it")
    if file is not None:
        _refuse_beside_a_file(ctx)
        subjects = [_check_file(file, arguments, seed)]
    else:
        schedules, skipped = _schedules(config, sizes, chip, every, limit, fields)
        if skipped and not as_json:
            count = counted(skipped, "combination")
            click.echo(f"{count} against a rule of the schedule: left out")
        given = [
            ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
            for name in ("q_len", "kv_len")
        ]
        chosen = sizes if any(given) else None
        subjects = []
        for schedule in schedules:
            subjects.append(_check_schedule(config, schedule, chosen, seed))
            if not as_json:
                _print(subjects[-1], counters)
    if as_json:
        code = max((subject.exit_code for subject in subjects), default=COULD_NOT_RUN)
        print_json({"exit_code": code, "subjects": [subject.as_dict() for subject in subjects]})
    elif file is not None:
        _print(subjects[0], counters)
    ctx.exit(max((subject.exit_code for subject in subjects), default=COULD_NOT_RUN))


def _refuse_beside_a_file(ctx: click.Context) -> None:
    """Raise `click.UsageError` for an option that a file's own kernels have no use for."""
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in BESIDE_A_FILE:
            raise click.UsageError(f"{parameter.opts[0]}: expected none beside a FILE")


def _schedules(
    config: AttentionConfig,
    sizes: Sizes,
    chip: str | None,
    every: bool,
    limit: int | None,
    fields: dict[str, tuple[Any, ...]],
) -> tuple[list[Schedule], int]:
    """Return the valid schedules that were asked for, and how many combinations were not valid."""
    start, _, limits = starting_point(config, sizes, chip)
    if limits.language != "metal":
        raise click.UsageError(f"--chip: the simulator executes Metal, and {chip} has none")
    family = sizes.problem(config).family
    if every:
        from metalgen.families import enumerate_valid

        schedules = enumerate_valid(config, limits, family)
        chosen = [
            s for s in schedules if all(getattr(s, n, None) in v for n, v in fields.items() if v)
        ]
        if not chosen:
            raise click.UsageError("--all: no valid schedule has the fields that were given")
        return chosen[:limit], 0
    given = {name: values for name, values in fields.items() if values}
    combinations = [
        change(config, start, dict(zip(given, values, strict=True))) if given else start
        for values in itertools.product(*given.values())
    ]
    valid = [schedule for schedule in combinations if is_valid(config, schedule, limits)]
    if not valid:
        check_schedule(config, combinations[0], limits)  # names the rule
    return valid, len(combinations) - len(valid)


def _has(schedule: Schedule, fields: dict[str, tuple[Any, ...]]) -> bool:
    """Whether a schedule has one of the values that were given for each knob."""
    return all(getattr(schedule, name, None) in values for name, values in fields.items() if values)


def _check_schedule(
    config: AttentionConfig, schedule: Schedule, sizes: Sizes | None, seed: int
) -> Subject:
    from metalgen.calls.verify import verify
    from metalgen.devices import get_device
    from metalgen.simulator import record

    device = get_device("simulator")
    with record(checked=True, seed=seed) as runs:
        try:
            if sizes is None:
                result = verify(device, config, schedule)
                wrong = "" if result.ok else result.detail
            else:
                wrong = _launch(device, config, schedule, sizes)
        except MetalgenError as error:
            return Subject(str(schedule), list(runs), failure=str(error))
    return Subject(str(schedule), list(runs), wrong)


def _launch(device: Device, config: AttentionConfig, schedule: Schedule, sizes: Sizes) -> str:
    """Run a call of these sizes; what is wrong with its numbers."""
    from metalgen.calls.verify import judge
    from metalgen.problem.inputs import needs_inputs
    from metalgen.problem.samples import sample_call

    q, k, v, inputs = sample_call(
        config,
        batch=sizes.batch,
        kv_heads=sizes.heads // config.heads_per_kv,
        q_len=sizes.q_len,
        kv_len=sizes.kv_len,
        ragged=False,
    )
    given = (inputs,) if needs_inputs(config) else ()
    out, lse = device.build(config, schedule)(q, k, v, config.head_dim**-0.5, *given)
    *_, fault = judge(config, q, k, v, inputs, out, lse)
    return f"Lq={sizes.q_len} Lk={sizes.kv_len}: {fault}" if fault else ""


def _check_file(file: Path, arguments: tuple[str, ...], seed: int) -> Subject:
    from metalgen.simulator import install, record

    if not file.is_file():
        raise click.UsageError(f"FILE: expected a Python file, but {str(file)!r} is none")
    failure, known = "", set(sys.modules)
    with record(checked=True, seed=seed) as runs, install(), _as_main(file, arguments):
        try:
            # What the file prints goes beside the report, so that --json stays one document.
            with contextlib.redirect_stdout(sys.stderr):
                runpy.run_path(str(file), run_name="__main__")
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
        failure = f"{file}: it called no mx.fast.metal_kernel"
    imported = (getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - known)
    files = [
        file,
        *sorted(_shown(Path(path)) for path in imported if path and path.endswith(".py")),
    ]
    return Subject(str(file), _distinct(runs), failure=failure, files=tuple(files))


def _shown(path: Path) -> Path:
    """A path from here where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


@functools.cache
def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:  # removed meanwhile
        return []


@contextlib.contextmanager
def _as_main(file: Path, arguments: tuple[str, ...]) -> Iterator[None]:
    argv, path = sys.argv[:], sys.path[:]
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(file.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _line_in(file: Path, error: BaseException) -> int | str:
    """Return the line of ``file`` that the error came through last."""
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


def _print(subject: Subject, counters: bool) -> None:
    words = [counted(len(subject.launches), "launch", "launches")]
    words += [counted(subject.findings, "finding")]
    words += ["wrong numbers"] if subject.wrong else []
    words += ["could not run"] if subject.failure else []
    mark = {CLEAN: "clean", FINDINGS: "FOUND", COULD_NOT_RUN: "ERROR"}[subject.exit_code]
    click.echo(f"{mark}  {subject.title}  ({', '.join(words)})")
    for launch in subject.launches:
        if launch.findings:
            click.echo(f"\n{launch.kernel}, grid {launch.grid}, threadgroup {launch.threadgroup}:")
            click.echo(launch.findings.report(place=functools.partial(subject.before, launch)))
    for text in (subject.wrong, subject.failure):
        if text:
            click.echo(f"\n{text}", err=text is subject.failure)
    if counters:
        from rich.console import Console

        console = Console(file=sys.stdout)
        for launch in subject.launches:
            if launch.counters is not None:
                click.echo(f"\n{launch.kernel}, grid {launch.grid}")
                with console.capture() as drawn:
                    console.print(launch.counters)
                click.echo(drawn.get(), nl=False)
