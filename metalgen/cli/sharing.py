"""Options of ``metalgen tune`` that say where to meet other workers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from metalgen.errors import ArgumentError

if TYPE_CHECKING:
    from metalgen.devices import Device

STUDY = "metalgen"
"""The name under which workers meet unless told otherwise."""


@dataclass(frozen=True)
class Sharing:
    """Where to meet other workers; None where the user named nothing.

    ``asked`` says that the storage was named on this command line, not in the environment.
    """

    storage: str | None
    study: str | None
    asked: bool

    def arguments(self, device: Device | None) -> dict[str, Any]:
        """What `metalgen.tuning.runner.tune` takes of them.

        Raises:
            ArgumentError: where nothing is measured, or a study is named without a storage.
        """
        if self.storage is None:
            if self.study is not None:
                raise ArgumentError("study", "none without --storage", self.study)
            return {}
        from metalgen.tuning.study.storage import check_url, masked
        from metalgen.tuning.study.trials import Share

        check_url(self.storage)
        if device is None and not self.asked:
            return {}
        if device is None:
            expected = "none when times are predicted instead of measured"
            raise ArgumentError("storage", expected, masked(self.storage))
        return {"share": Share(self.storage, STUDY if self.study is None else self.study)}


def shown(url: str) -> str:
    """A URL as it may be printed."""
    from metalgen.tuning.study.storage import masked

    return masked(url)


def sharing_options(function: Any) -> Any:
    """``--storage`` and ``--study``; the command gets them as ``sharing``, a `Sharing`."""

    @click.option(
        "--storage",
        metavar="URL",
        envvar="METALGEN_STORAGE",
        help="Measuring: storage of a study shared with other workers: "
        "postgresql://USER@HOST/DB or journal:FILE.",
    )
    @click.option(
        "--study",
        metavar="NAME",
        help=f"Name of the shared study that workers join. Default: {STUDY}.",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, storage: str | None, study: str | None, **kwargs: Any) -> Any:
        source = click.get_current_context().get_parameter_source("storage")
        asked = source == click.core.ParameterSource.COMMANDLINE
        return function(*args, sharing=Sharing(storage, study, asked), **kwargs)

    return wrapper
