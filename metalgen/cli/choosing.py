"""Options of ``metalgen tune`` that say what to tune: a preset, or a shape of one's own."""

from __future__ import annotations

import functools
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
    other options describe, where one of those was given. Both together are an `ArgumentError`.
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
    @config_options
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        preset_name: str,
        backward: bool,
        config: AttentionConfig,
        sizes: Sizes,
        **kwargs: Any,
    ) -> Any:
        from metalgen.tuning.presets import of_gradients

        chosen = _chosen(preset_name, config, sizes)
        return function(*args, chosen=of_gradients(chosen) if backward else chosen, **kwargs)

    return wrapper


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
        expected = f"none beside a shape of one's own ({', '.join(given)})"
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
