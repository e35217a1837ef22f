"""``metalgen bench``: what does metalgen do for me, on this machine?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.options import (
    Sizes,
    chip_option,
    config_options,
    echo_table,
    json_option,
    print_json,
)
from metalgen.errors import ArgumentError
from metalgen.plurals import counted
from metalgen.problem.config import AttentionConfig

if TYPE_CHECKING:
    from metalgen.bench.running import Run, Setting
    from metalgen.bench.work import Preset, Work

CACHE_OPTIONS = {
    "batches": ("--kv-batch-sizes", "Batch entries."),
    "live": ("--kv-live-lengths", "Number of keys in the cache."),
    "capacity": ("--kv-max-lengths", "Number of keys that the cache has room for."),
    "pages": ("--kv-page-sizes", "Keys per page."),
    "queries": ("--kv-query-lengths", "Queries per call."),
    "heads": ("--kv-head-counts", "Heads."),
    "head_dims": ("--kv-head-dims", "Head dimensions."),
}
"""Options of the ``kv`` preset, each a list such as ``64,256``, by the fields of `CacheSizes`."""


def _numbers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> Any:
    if text is None:
        return None
    words = text.replace(",", " ").split()
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(f"expected positive integers such as 64,256, but got {text!r}")
    return tuple(map(int, words))


def _cache_options(function: Any) -> Any:
    for field, (option, words) in reversed(CACHE_OPTIONS.items()):
        function = click.option(
            option, f"kv_{field}", callback=_numbers, metavar="A[,B...]", help=f"kv: {words}"
        )(function)
    return function


@click.command()
@click.argument("preset_name", metavar="[PRESET]", required=False)
@config_options
@click.option(
    "--train", is_flag=True, help="With a shape of your own: measure forward and backward together."
)
@_cache_options
@chip_option("Without a GPU: the chip whose times are predicted, such as M3Max.")
@click.option(
    "--device",
    "device_name",
    type=click.Choice(["metal", "cuda", "simulator", "reference"]),
    help="Device that computes. Default: this machine's GPU. simulator: counts, not times.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="PACKAGE",
    help="Also compare with mlx-mfa, torch or flex (PyTorch's FlexAttention), where installed.",
)
@click.option("--quick", is_flag=True, help="Use small sizes and few rounds.")
@click.option(
    "--csv", "csv_path", type=click.Path(path_type=Path), help="Also write the rows to a CSV file."
)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Also draw a picture.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    preset_name: str | None,
    config: AttentionConfig,
    sizes: Sizes,
    train: bool,
    chip: str | None,
    device_name: str | None,
    against: tuple[str, ...],
    quick: bool,
    csv_path: Path | None,
    plot_path: Path | None,
    as_json: bool,
    **cache: Any,
) -> None:
    """Measure attention on this machine, against MLX's own and others.

    PRESET is seeds, mlx, flash-attn, kv, mlx-lm, train or features; without one, a shape of your
    own (--head-dim, --causal, --q-len and so on). Every competitor is checked against float64
    before it is timed; they take turns, and calls wait for one another. Times are medians; ratios
    have 95 % intervals, and are "not separable" where the interval includes 1. Without a GPU, times
    are modelled for --chip, and labelled so; --device simulator counts. Ctrl-C keeps what is done.
    """
    from metalgen.bench.foreign import AGAINST
    from metalgen.bench.pictures import check_picture, draw
    from metalgen.bench.running import run
    from metalgen.bench.tables import csv_text
    from metalgen.report.writing import Kind, check_target, replacing, write_whole

    if unknown := [name for name in against if name not in AGAINST]:
        raise ArgumentError("--against", f"one of {', '.join(AGAINST)}", unknown[0])
    preset = _preset(ctx, preset_name, config, sizes, train, cache)
    setting = _setting(chip, device_name, against, quick)
    table = Kind(b"label,config,kind,", "table", "--csv")
    if csv_path is not None:
        check_target(csv_path, table)
    if plot_path is not None:
        check_picture(plot_path)
    found = run(preset, setting, observer(as_json, preset.unit))
    if csv_path is not None:
        write_whole(csv_path, csv_text(found.measured).encode(), table)
    if plot_path is not None and found.measured:
        machine = found.machine
        title = f"metalgen bench {preset.name}: {machine['computed_by']}, {machine['date']}"
        picture = Kind(b"", "picture", "--plot")
        with replacing(plot_path, picture) as part:
            draw(part, title, found.measured, preset.unit, found.peaks)
    if as_json:
        print_json(found.to_dict())
    else:
        print_end(found)
    if found.interrupted:
        click.echo("metalgen: interrupted; the rows above are complete", err=True)
        ctx.exit(130)
    if found.wrong:
        ctx.exit(1)


def _setting(
    chip_name: str | None, device_name: str | None, against: tuple[str, ...], quick: bool
) -> Setting:
    from metalgen import chips
    from metalgen.bench.running import Setting
    from metalgen.devices import default_device, get_device

    here = chips.detect()
    device = get_device(device_name) if device_name else default_device()
    if device.name == "simulator":
        return Setting("simulated", device, None, against, quick)
    if device.is_gpu or device_name is not None:
        if chip_name is not None:
            raise ArgumentError("--chip", "none when a device measures", chip_name)
        return Setting("measured", device, here, against, quick)
    if chip_name is None:
        expected = "--chip NAME (such as M3Max), because this machine has no GPU to measure on"
        raise ArgumentError("chip", expected, None)
    chip = chips.get_chip(chip_name)
    from metalgen.chips.model import require_figures

    require_figures(chip)
    return Setting("modelled", device, chip, against, quick)


def _preset(
    ctx: click.Context,
    name: str | None,
    config: AttentionConfig,
    sizes: Sizes,
    train: bool,
    cache: dict[str, Any],
) -> Preset:
    from metalgen.bench.presets import CacheSizes, preset
    from metalgen.bench.work import Preset, Work

    shape = [p.opts[0] for p in ctx.command.params if p.name in _SHAPE and _is_given(ctx, p.name)]
    lists = {field.removeprefix("kv_"): value for field, value in cache.items() if value}
    if name is None:
        if lists:
            raise ArgumentError("PRESET", "kv, with sizes of a cache", None)
        work = Work(config, sizes.batch, sizes.heads, sizes.q_len, sizes.kv_len, train=train)
        return Preset("of one shape", "a shape of your own", (work,))
    allowed = {"--dtype"}
    if others := [option for option in shape if option not in allowed] + ["--train"] * train:
        raise ArgumentError("PRESET", f"none with a shape of your own ({others[0]})", name)
    return preset(name, config.dtype, CacheSizes(**lists) if lists else None)


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE


def _names() -> frozenset[str]:
    described = click.command()(config_options(lambda **_: None))
    return frozenset(parameter.name or "" for parameter in described.params)


_SHAPE = _names()
"""The parameters that `config_options` adds."""


def observer(quiet: bool, unit: str) -> Any:
    """Prints each row when it is done; on a terminal also which one is computed now."""
    from metalgen.bench.measuring import Row
    from metalgen.bench.tables import (
        HEADER,
        counted_lines,
        modelled_lines,
        row_lines,
        unit_of,
    )
    from metalgen.bench.unmeasured import ModelledRow

    shown = sys.stderr.isatty()

    def observe(run: Run, work: Work | None) -> None:
        if work is not None:
            if not run.rows and not quiet:
                click.echo(_headline(run))
            if shown:
                line = f"{len(run.rows) + 1}/{len(run.preset.works)}  {work}"
                click.echo(f"\r\x1b[K{line[:78]}", nl=False, err=True)
            return
        if shown:
            click.echo("\r\x1b[K", nl=False, err=True)
        if quiet:
            return
        row = run.rows[-1]
        click.echo(f"\n{row.work}")
        if isinstance(row, Row):
            head = HEADER if len(run.rows) == 1 else ()
            lines = row_lines(row, unit_of(row.work, unit), run.peaks)
            echo_table([head, *lines] if head else lines, "  ")
        elif isinstance(row, ModelledRow):
            echo_table(modelled_lines(row), "  ")
        else:
            echo_table(counted_lines(row), "  ")

    return observe


def _headline(run: Run) -> str:
    machine, setting = run.machine, run.setting
    where = f"{machine['date']}, {machine['computed_by']}, MLX {machine['mlx']}"
    about = f"bench {run.preset.name}: {run.preset.about}; {counted(len(run.preset.works), 'row')}"
    if setting.manner == "modelled":
        assert setting.chip is not None
        return (
            f"{about}\nMODELLED for {setting.chip.name} by the chip model; nothing is measured, "
            "and a ratio of these times is no speed-up."
        )
    if setting.manner == "simulated":
        return f"{about}\nSIMULATED: counts of the Metal source executed on this CPU; no times."
    peaks = run.peaks
    assert peaks is not None
    note = "" if setting.device.is_gpu else " (this CPU, by plain MLX operations)"
    return (
        f"{about}\n{where}, measured on device {setting.device.name}{note}\n"
        f"measured peaks: {peaks.operations / 1e12:.3g} TFLOP/s of a matrix product, "
        f"{peaks.bytes / 1e9:.3g} GB/s of a copy"
    )


def print_end(run: Run) -> None:
    from metalgen.bench.tables import by_size, summary

    rows = run.measured
    lines = summary(rows)
    if len(rows) > 1 and lines:
        click.echo("\nAll rows: time over the baseline's (geometric mean, range)")
        echo_table(lines, "  ")
    if run.preset.name == "seeds" and rows:
        for name in dict.fromkeys(r.name for row in rows for r in row.results if r.ratio):
            click.echo(f"\n{name}: time over the baseline's by size (mean, largest)")
            echo_table(by_size(rows, name), "  ")
        if run.setting.device.is_gpu:
            click.echo("Layers this small measure launches more than arithmetic.")
    for fault in run.wrong:
        click.echo(f"WRONG  {fault}")
