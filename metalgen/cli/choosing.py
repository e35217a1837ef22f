"""Options of ``metalgen tune`` that say what to tune: a preset, or a shape of your own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.options import Sizes, config_options
from metalgen.errors import ArgumentError
from metalgen.problem.config import AttentionConfig

if TYPE_CHECKING:
    from metalgen.tuning.presets import Preset


def choosing_options(function: Any) -> Any:
    """``--preset`` and what `config_options` adds; the command gets them as ``chosen``.

    ``chosen`` is a `Preset`: the named one, or one without a name of the one problem that the
    other options describe, where one of those was given, or of what a model or a recording calls.
    Two of them together are an `ArgumentError`.
    """

    @click.option(
        "--preset",
        "preset_name",
        default="default",
        show_default=True,
        metavar="NAME",
        shell_complete=_presets,
        help="What to tune: default, all, a family (qwen3) or a model (llama-3-8b).",
    )
    @click.option(
        "--backward",
        is_flag=True,
        help="Tune the backward kernels of the problems with many queries, instead of the forward.",
    )
    @click.option(
        "--model",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Tune what a model of mlx-lm calls: its folder, or its config.json.",
    )
    @click.option(
        "--recorded",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Tune the calls of a recording (`metalgen lm --record`), the costliest first.",
    )
    @config_options
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        preset_name: str,
        backward: bool,
        model: Path | None,
        recorded: Path | None,
        config: AttentionConfig,
        sizes: Sizes,
        **kwargs: Any,
    ) -> Any:
        from metalgen.tuning.presets import of_gradients

        if model is not None or recorded is not None:
            chosen = _from_files(preset_name, model, recorded)
        else:
            chosen = _chosen(preset_name, config, sizes)
        return function(*args, chosen=of_gradients(chosen) if backward else chosen, **kwargs)

    return wrapper


def _from_files(name: str, model: Path | None, recorded: Path | None) -> Preset:
    from metalgen.tuning.presets import Preset

    context = click.get_current_context()
    others = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in {*_SHAPE, "preset_name"} and _is_given(context, parameter.name)
    ]
    if model is not None and recorded is not None:
        raise ArgumentError("recorded", "none with --model", str(recorded))
    own = "--model" if model is not None else "--recorded"
    if others:
        raise ArgumentError(own.removeprefix("--"), f"none with {', '.join(others)}", name)
    if model is not None:
        from metalgen.mlx_lm.tracing import problems_of

        label, problems = problems_of(model)
    else:
        from metalgen.calls.recording import read_recording

        assert recorded is not None
        label, problems = recorded.stem, read_recording(recorded).problems
        if not problems:
            raise ArgumentError("recorded", "a recording with calls", str(recorded))
    return Preset(None, problems, {problem.key: (label,) for problem in problems})


def _chosen(name: str, config: AttentionConfig, sizes: Sizes) -> Preset:
    from metalgen.tuning.presets import Preset, preset

    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in _SHAPE and _is_given(context, parameter.name)
    ]
    if not given:
        return preset(name)
    if _is_given(context, "preset_name"):
        expected = f"none with a shape of your own ({', '.join(given)})"
        raise ArgumentError("preset", expected, name)
    return Preset(None, (sizes.problem(config),))


def _presets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from metalgen.tuning.presets import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE


def _names() -> frozenset[str]:
    command = click.command()(config_options(lambda **_: None))
    return frozenset(parameter.name or "" for parameter in command.params)


_SHAPE = _names()
"""The parameters that `config_options` adds."""
