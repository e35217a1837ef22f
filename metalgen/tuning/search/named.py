"""Samplers by the names that ``--sampler`` takes."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from metalgen.errors import ArgumentError

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from metalgen.tuning.search.finite import FiniteSpace

DEFAULT_SAMPLER = "finite-gp"
BRUTE_FORCE = "brute-force"
SAMPLERS = (DEFAULT_SAMPLER, "tpe", "gp", "cmaes", "random", BRUTE_FORCE)
"""Names of samplers; `module:Class` names another one."""
NEEDS = {"gp": ("torch", "scipy"), "cmaes": ("cmaes",)}
"""Packages that some of them need, and metalgen does not."""


def check_sampler(name: str) -> None:
    """Raise `ArgumentError` for a name that is no sampler's, or that needs a missing package."""
    if name in SAMPLERS:
        for package in NEEDS.get(name, ()):
            if importlib.util.find_spec(package) is None:
                expected = f"another one, or the package {package}, which {name!r} needs"
                raise ArgumentError("sampler", expected, name)
    else:
        _own_class(name)


def make_sampler(name: str, space: FiniteSpace, seed: int) -> BaseSampler:
    """A sampler that suggests each valid point of a space once.

    Args:
        name: one of `SAMPLERS`; or ``"module:Class"``, a subclass of `optuna.samplers.BaseSampler`
            that is made with ``seed=`` if it takes one, and restricted to the valid points.
        space: where to search.
        seed: of every draw.

    Raises:
        ArgumentError: as `check_sampler`.
    """
    import optuna

    from metalgen.tuning.search.samplers import (
        FiniteGPSampler,
        FiniteSampler,
        RestrictedSampler,
        UniformSampler,
    )

    check_sampler(name)
    if name == DEFAULT_SAMPLER:
        return FiniteGPSampler(space, seed=seed)
    if name in ("random", BRUTE_FORCE):
        return UniformSampler(space, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: BaseSampler
        if name == "tpe":
            sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        elif name == "gp":
            sampler = optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)
        elif name == "cmaes":
            sampler = optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        else:
            own: Callable[..., BaseSampler] = _own_class(name)
            takes_seed = "seed" in inspect.signature(own).parameters
            sampler = own(seed=seed) if takes_seed else own()
    return (
        sampler
        if isinstance(sampler, FiniteSampler)
        else RestrictedSampler(sampler, space, seed=seed)
    )


def _own_class(name: str) -> type[BaseSampler]:
    from optuna.samplers import BaseSampler

    module, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, SAMPLERS, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ArgumentError("sampler", f"{', '.join(SAMPLERS)} or module:Class{hint}", name)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError("sampler", f"a class that can be imported ({error})", name) from error
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise ArgumentError("sampler", "a subclass of optuna.samplers.BaseSampler", name)
    return found
