"""``metalgen check``: execute kernels on the simulator and report every defect."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from metalgen.cli.check_python import check_python
from metalgen.cli.options import Sizes, chip_option, described_options, json_option, print_json
from metalgen.cli.render import change, starting_point
from metalgen.cli.subject import COULD_NOT_RUN, Subject, show
from metalgen.errors import MetalgenError
from metalgen.families import Schedule, check_schedule, is_valid
from metalgen.plurals import counted
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import all_knobs

if TYPE_CHECKING:
    from metalgen.devices import Device

BESIDE_A_FILE = (
    *("file", "arguments", "seed", "time_limit", "counters", "as_json", "module"),
    *("kernel", "launch", "include"),
)


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


class _Check(click.Command):
    """As `python`: what follows `-m MODULE` belongs to the module."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "-m" in args and "--" not in args[: args.index("-m")]:
            at = args.index("-m")
            args = [*args[: at + 2], "--", *args[at + 2 :]]
        return super().parse_args(ctx, args)


@click.command(
    cls=_Check, epilog="Exit code: 0 clean, 1 findings or wrong numbers, 2 could not run."
)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@described_options("small and ragged", "small and ragged")
@chip_option("Start from this chip's best schedule on record, and keep its limits.")
@_schedule_options
@click.option(
    "--all", "every", is_flag=True, help="Check every schedule of the space (see --limit)."
)
@click.option(
    "--limit", type=click.IntRange(1), help="With --all: check only the first N schedules."
)
@click.option(
    "-m", "module", metavar="MODULE", help="Run a module, such as pytest, instead of a file."
)
@click.option("--kernel", metavar="NAME", help="For a .metal file: check only this kernel.")
@click.option(
    "--launch",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="For a .metal file: run a kernel as described by this TOML file.",
)
@click.option(
    "-I",
    "include",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="For a .metal file: another folder to search for includes, after the file's own.",
)
@click.option(
    "--seed", type=int, default=0, help="A seed other than 0 shuffles the order of threads."
)
@click.option(
    "--time-limit",
    type=float,
    metavar="SECONDS",
    help="Seconds that one launch may take. Default: 120.",
)
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
    module: str | None,
    kernel: str | None,
    launch: Path | None,
    include: tuple[Path, ...],
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
    metal = file is not None and module is None and file.suffix == ".metal"
    if not metal and (kernel or launch or include):
        raise click.UsageError("--kernel, --launch, -I: expected with a .metal FILE")
    if module is not None:
        _refuse_beside_a_file(ctx)
        subjects = [check_python(module, (*([str(file)] if file else []), *arguments), seed)]
    elif metal:
        assert file is not None
        _refuse_beside_a_file(ctx)
        subjects = [_check_metal(file, kernel, launch, include, seed)]
    elif file is not None:
        _refuse_beside_a_file(ctx)
        subjects = [check_python(file, arguments, seed)]
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
                show(subjects[-1], counters)
    if as_json:
        code = max((subject.exit_code for subject in subjects), default=COULD_NOT_RUN)
        print_json({"exit_code": code, "subjects": [subject.as_dict() for subject in subjects]})
    elif file is not None or module is not None:
        show(subjects[0], counters)
    ctx.exit(max((subject.exit_code for subject in subjects), default=COULD_NOT_RUN))


def _refuse_beside_a_file(ctx: click.Context) -> None:
    """Raise `click.UsageError` for an option that a file's own kernels have no use for."""
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in BESIDE_A_FILE:
            raise click.UsageError(f"{parameter.opts[0]}: expected none with a FILE")


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
    from metalgen.devices.simulator import SimulatorDevice

    if limits.language != SimulatorDevice.language:
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


def _check_metal(
    file: Path, kernel: str | None, launch: Path | None, include: tuple[Path, ...], seed: int
) -> Subject:
    from metalgen.cli import check_metal
    from metalgen.simulator.api import mlx_include_dir

    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"FILE: {file}: {error}") from None
    folders = [file.parent, *include, mlx_include_dir()]
    if launch is None:
        words, lints, failure = check_metal.compile_all(file, source, kernel, folders)
        return Subject(str(file), [], failure=failure, kernels=words, lints=lints, files=(file,))
    runs, wrong, failure = check_metal.launch(file, source, kernel, launch, folders, seed)
    return Subject(str(file), list(runs), wrong, failure, files=(file,))
