"""``metalgen lm``: mlx-lm's programs on metalgen's attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.options import chip_option

if TYPE_CHECKING:
    from metalgen.calls.recording import Recording

PROGRAMS = {
    "generate": "Answer a prompt (mlx_lm.generate).",
    "chat": "Chat in the terminal (mlx_lm.chat).",
    "serve": "Serve OpenAI's interface and a chat page (mlx_lm.server).",
    "batch": "Answer a file of prompts at once, with quantized caches if wanted.",
    "lora": "Train LoRA, DoRA or all weights (mlx_lm.lora).",
    "fuse": "Fuse trained adapters into a model (mlx_lm.fuse).",
    "evaluate": "Run tasks of lm-evaluation-harness (mlx_lm.evaluate).",
    "perplexity": "Measure perplexity (mlx_lm.perplexity).",
    "benchmark": "Measure tokens per second (mlx_lm.benchmark).",
    "cache_prompt": "Save the cache of a prompt (mlx_lm.cache_prompt).",
}
TIMED = 8
"""Kinds of calls that --benchmark-attention times, the costliest."""


class _Programs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(PROGRAMS)


@click.group(cls=_Programs)
def command() -> None:
    """Run mlx-lm's programs with metalgen's attention.

    All options of mlx-lm's program pass through; `metalgen lm PROGRAM --help` shows both. The last
    line says what computed the calls of attention.
    """


def _program(name: str) -> click.Command:
    @click.command(
        name,
        help=PROGRAMS[name],
        short_help=PROGRAMS[name],
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )
    @click.option(
        "--use-flash-attention/--disable-flash-attention",
        "flash",
        default=True,
        help="Compute attention with metalgen (the default), or leave mlx-lm as it is.",
    )
    @click.option(
        "--flash-block-size",
        "block_size",
        type=click.IntRange(min=8),
        metavar="N",
        help="Queries and keys per tile, instead of what tuning chose.",
    )
    @click.option(
        "--benchmark-attention",
        "benchmark",
        is_flag=True,
        help="At the end, measure the calls that were made, against MLX's own.",
    )
    @click.option(
        "--compare-attention",
        "compare",
        is_flag=True,
        help="Run twice, without and with metalgen, and print output, speed and memory.",
    )
    @click.option(
        "--record",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write the calls that were made, for `metalgen tune --recorded FILE`.",
    )
    @click.option(
        "--device",
        type=click.Choice(["metal", "cuda", "simulator", "reference"]),
        help="Device that computes metalgen's attention. Default: this machine's GPU.",
    )
    @chip_option("Chip whose tuning records to use. Default: this machine's.")
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @click.pass_context
    def program(
        ctx: click.Context, /, arguments: tuple[str, ...], benchmark: bool, **settings: Any
    ) -> None:
        from metalgen.mlx_lm.programs import Settings, run

        if {"--help", "-h"} & {*arguments}:
            click.echo(f"{ctx.get_help()}\n\nmlx-lm's own options:\n")
        chosen = Settings(**settings)
        after = _measured(chosen.device) if benchmark else None
        ctx.exit(run(name, arguments, chosen, after))

    return program


def _measured(device_name: str | None) -> Any:
    """What measures the costliest recorded calls."""
    from metalgen.devices import get_device

    device = get_device(device_name)

    def measure(recording: Recording) -> None:
        from metalgen import chips
        from metalgen.bench.running import Setting, run
        from metalgen.bench.work import Preset, Work
        from metalgen.cli.bench import observer, print_end

        if not device.is_gpu:
            click.echo(f"{recording}", err=True)
            click.echo(
                f"metalgen: nothing was measured: device {device.name!r} is not a GPU", err=True
            )
            return
        works = []
        for p in recording.problems[:TIMED]:
            heads = max(p.batch_heads // p.config.heads_per_kv, 1) * p.config.heads_per_kv
            label = f"{recording.calls[p]} calls"
            works.append(Work(p.config, 1, heads, p.q_len, p.kv_len, label=label))
        preset = Preset("recorded", "the costliest calls of the program", tuple(works))
        setting = Setting("measured", device, chips.detect(), quick=True)
        print_end(run(preset, setting, observer(False, preset.unit)))

    return measure


for _name in PROGRAMS:
    command.add_command(_program(_name))
