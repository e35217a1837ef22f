"""Backward kernels are tuned as forward ones are, and calls find what was measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tuning_fakes import SimulatedGpu

import metalgen
from metalgen import AttentionConfig, devices
from metalgen.calls import resolve
from metalgen.chips import get_chip
from metalgen.database.store import Store
from metalgen.errors import ArgumentError
from metalgen.families import default_schedule
from metalgen.families.backward import backward_config
from metalgen.families.sizes import Problem
from metalgen.tuning.presets import Preset, of_gradients, preset
from metalgen.tuning.runner import tune
from metalgen.tuning.timing.measure import Policy

QUICK = Policy(warmup_seconds=0.01, repetitions=2, sample_seconds=1e-4, sets=1, rounds=1)


def test_calls_compute_gradients_by_the_schedules_that_were_measured(
    own_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimulatedGpu()
    monkeypatch.setitem(devices._DEVICES, "metal", device)
    monkeypatch.setattr(device, "unavailable", lambda: None)
    config = AttentionConfig(16, softcap=20.0, return_lse=True)
    chosen = of_gradients(Preset(None, (Problem(config, 1, 128, 128),))).within(device.limits)
    assert [p.family for p in chosen.problems] == ["backward_rows", "backward_keys"]
    assert {p.config for p in chosen.problems} == {backward_config(config)}
    chip = get_chip("M1Max")
    with Store.open(own_database) as store:
        report = tune(chosen.problems, chip, store, device=device, trials=2, jobs=0, policy=QUICK)
    winners = [outcome.winner.schedule for outcome in report.outcomes if outcome.winner]
    assert len(winners) == 2
    resolve.forget_kernels()
    kernel = metalgen.get_kernel(config, heads=1, q_len=128, device="metal", chip="M1Max")
    words = kernel.explain()
    assert all(str(schedule) in words for schedule in winners)
    assert "backward_rows: user database, this chip, measured" in words
    resolve.forget_kernels()


def test_presets_have_problems_of_gradients() -> None:
    """Of prompts, and each config once; what a model has sinks or an output of its own for."""
    found = of_gradients(preset("gpt-oss")).within(get_chip("M3Max").limits)
    assert {p.family for p in found.problems} == {"backward_rows", "backward_keys"}
    assert len({p.key for p in found.problems}) == len(found.problems)
    for problem in found.problems:
        assert problem.q_len > 64 and not problem.config.sinks
        assert found.models[problem.key]
        assert default_schedule(problem.config, get_chip("M3Max").limits, problem.family)
    texts = [str(problem) for problem in found.problems]
    assert all(a != b for a, b in itertools.combinations(texts, 2))


def test_problems_that_no_backward_kernel_supports_are_refused() -> None:
    config = AttentionConfig(512)
    with pytest.raises(ArgumentError, match="backward kernels support"):
        of_gradients(Preset(None, (Problem(config, 1, 128, 128),)))
