"""Kernels that are compiled and checked before the first call."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

import metalgen
from metalgen import ArgumentError, AttentionConfig
from metalgen.calls import resolve
from metalgen.nn import optimize
from metalgen.testing.devices import normal


def test_configs_are_ready_for_many_queries_and_for_one(the_simulator: str) -> None:
    told: list[tuple[int, int]] = []
    configs = [AttentionConfig(32), AttentionConfig(32, causal=True)]
    ready = metalgen.prepare(
        configs, device=the_simulator, progress=lambda done, of, kernel: told.append((done, of))
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    found = [(kernel.config, kernel.family, kernel.backend) for kernel in ready.kernels]
    assert found == [(c, f, "metalgen") for c in configs for f in ("forward", "decode")]
    known = metalgen.get_kernel(configs[1], q_len=1024, kv_len=1024, device=the_simulator)
    assert known is ready.kernels[2]
    assert str(ready).startswith("4 kernels are ready after ")


def test_a_model_is_asked_what_it_calls_and_computes_nothing(the_simulator: str) -> None:
    model, x = nn.TransformerEncoder(2, 64, 2), normal((2, 70, 64), "float32", 1)
    with optimize(model, device=the_simulator):
        ready = metalgen.prepare(model, x, "causal", device=the_simulator)
        (kernel,) = ready.kernels
        assert (kernel.backend, kernel.config.causal, kernel.config.head_dim) == (
            *("metalgen", True, 32),
        )
        assert metalgen.stats().metalgen == 0
        before = dict(resolve._known)
        mx.eval(model(x, "causal"))
        assert metalgen.stats().metalgen == 2
        assert resolve._known == before  # what was prepared is what is called


def test_what_cannot_be_prepared_is_named() -> None:
    for what in (3, [], ["D64"]):
        with pytest.raises(ArgumentError, match="what: expected an AttentionConfig"):
            metalgen.prepare(what)
    with pytest.raises(ArgumentError, match="example: expected nothing with configs"):
        metalgen.prepare(AttentionConfig(64), 1)
    with pytest.raises(ArgumentError, match="workers: expected a positive integer"):
        metalgen.prepare(AttentionConfig(64), workers=0)
