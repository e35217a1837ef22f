"""Calls with more batch entries or heads than a grid takes, executed by the simulator."""

from __future__ import annotations

import importlib.util

import mlx.core as mx
import numpy as np
import pytest

from metalgen import simulator
from metalgen.devices import get_device
from metalgen.devices.simulator import SimulatorDevice
from metalgen.dsl.trace import trace
from metalgen.families import default_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.problem.samples import sample_call

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None,
    reason="the simulator's compiler (ziglang) is not installed",
)


BY_PLACE = trace(lambda s, b, h, i, j: s + 0.1 * b - 0.2 * h, "score_mod").graph.text


class Narrow(SimulatorDevice):
    """The simulator, with grids of four groups along y and z at most."""

    most_groups = 4


@pytest.mark.parametrize("family", ["forward", "decode"])
@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(16, heads_per_kv=2, causal=True, return_lse=True),
        AttentionConfig(16, bias=True, array_mask=True, sinks=True, return_lse=True),
        AttentionConfig(16, alibi=True, kv_lens=True, rope="half", heads_per_kv=2),
        AttentionConfig(32, page_size=8, kv_lens=True, kv_bits=8, kv_group=32, return_lse=True),
        AttentionConfig(32, kv_bits=4, kv_group=32, heads_per_kv=2),
        AttentionConfig(16, varlen=True, alibi=True, causal=True, return_lse=True),
        AttentionConfig(16, max_work=1 << 16, heads_per_kv=2, return_lse=True),
        AttentionConfig(16, max_work=1 << 16, dropout=0.3),
        AttentionConfig(16, max_work=1 << 16, score_mod=BY_PLACE),
    ],
    ids=str,
)
def test_pieces_give_the_same_rows_as_one_grid(config: AttentionConfig, family: str) -> None:
    q, k, v, inputs = sample_call(
        config, batch=5, kv_heads=5, q_len=7 if family == "decode" else 19, kv_len=37, seed=4
    )
    schedule = default_schedule(config, family=family)
    whole = get_device("simulator").build(config, schedule)(q, k, v, 0.3, inputs)
    with simulator.record() as runs:
        pieces = Narrow().build(config, schedule)(q, k, v, 0.3, inputs)
        mx.eval(pieces[0])
    grids = [run.grid for run in runs if "combine" not in run.kernel]
    assert len(grids) > 1
    assert all(y <= 4 and z <= 4 for _, y, z in grids)
    for one, other in zip(whole, pieces, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            a, b = (np.array(x.astype(mx.float32)) for x in (one, other))
            assert np.array_equal(a, b)
