"""A tour of metalgen, and the first test to read: each step is a function that works alone.

`docs/architecture.md` describes the same way in words.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from metalgen import AttentionConfig, attention, get_kernel
from metalgen.chips import get_chip
from metalgen.database.lookup import lookup
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.families import check_schedule, default_schedule, space
from metalgen.families.sizes import Problem
from metalgen.reference import attention_float64
from metalgen.source.hashes import template_hashes
from metalgen.source.render import render
from metalgen.tuning.runner import tune


def test_a_tour(the_simulator: str, own_database: Path) -> None:
    # What to compute: causal attention with 32 columns per head, two query heads per KV head.
    config = AttentionConfig(32, "float32", heads_per_kv=2, causal=True)

    # How to compute it: a valid schedule that needs no tuning, one point of a declared space.
    schedule = default_schedule(config)
    check_schedule(config, schedule)
    assert space(config).point(schedule) is not None

    # From both follows the source of one Metal kernel.
    source = render(config, schedule)
    assert source.inputs == ("q", "k", "v", "scale") and source.outputs == ("out",)
    assert f"constexpr int BQ = {schedule.bq};" in source.source

    # The simulator executes that source on this CPU; the reference defines the right result.
    q = mx.random.normal((1, 4, 80, 32), key=mx.random.key(0))
    k, v = (mx.random.normal((1, 2, 80, 32), key=mx.random.key(seed)) for seed in (1, 2))
    expected, _ = attention_float64(q, k, v, scale=0.2, causal=True)
    run = get_device(the_simulator).build(config, schedule)
    out, _ = run(q, k, v, 0.2)
    np.testing.assert_allclose(np.array(out), expected, atol=1e-5)

    # A tuning run ranks every schedule of the space by the chip model, and checks the best one.
    chip, problem = get_chip("M3Max"), Problem(config, batch_heads=4, q_len=80, kv_len=80)
    with Store.open(own_database) as store:
        report = tune([problem], chip, store, checker=get_device(the_simulator))
    (outcome,) = report.outcomes
    winner = outcome.winner
    assert winner is not None and winner.verified and winner.provenance == "modelled"
    assert outcome.valid > 100 and outcome.default_seconds is not None
    assert winner.seconds is not None and winner.seconds <= outcome.default_seconds

    # It stored a row for each, and a look-up finds the winner.
    hit = lookup(problem, chip, template_hashes(problem.family, "metal"))
    assert hit is not None and hit.schedule == winner.schedule

    # A kernel is resolved by the same look-up, and is called with arrays.
    kernel = get_kernel(config, q_len=80, kv_len=80, heads=4, device=the_simulator, chip="M3Max")
    np.testing.assert_allclose(np.array(kernel(q, k, v, scale=0.2)), expected, atol=1e-5)

    # It explains every decision that led to it.
    assert kernel.schedule == winner.schedule
    assert "modelled" in kernel.explain() and "M3Max" in kernel.explain()

    # Programs call one function, which does all of that.
    out = attention(q, k, v, scale=0.2, causal=True, device=the_simulator)
    np.testing.assert_allclose(np.array(out), expected, atol=1e-5)
