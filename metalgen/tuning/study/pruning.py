"""When a measurement ends early: a schedule's samples are the intermediate values of its trial."""

from __future__ import annotations

from optuna.pruners import BasePruner, PercentilePruner

PERCENTILE = 25.0
"""A schedule is measured on while its best sample so far is below this percentile of the samples of
the same number, of the schedules that were measured whole."""
FIRST = 3
"""The sample, from 0, after which a measurement may end: a single one may be anything."""
STARTUP = 8
"""Schedules that are measured whole before any is pruned: more than there are finalists."""


def make_pruner() -> BasePruner:
    """The pruner of a measured search."""
    return PercentilePruner(PERCENTILE, n_startup_trials=STARTUP, n_warmup_steps=FIRST)
