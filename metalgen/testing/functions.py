"""What every device must do with score and mask functions. Inherit `FunctionConformance`.

    class TestSimulator(FunctionConformance):
        name = "simulator"

Expected values come from the functions themselves, applied to whole arrays in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from metalgen.calls.verify import TOLERANCE, relative_error, verify
from metalgen.dsl.trace import trace
from metalgen.families import Schedule, default_schedule
from metalgen.problem.block_mask import create_block_mask
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.testing.base import OnDevice
from metalgen.testing.devices import PATHS, normal, paths_of

LENGTH = 90
HEADS = 4


@dataclass(frozen=True)
class Case:
    """A score function, a mask function, or both."""

    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None


def cases() -> dict[str, Case]:
    """Functions that together use every way of capturing and of indexing."""
    slopes = mx.array([0.5, 0.25, 0.125, 0.0625])  # four elements: Metal's constant memory
    table = normal((HEADS, 2 * LENGTH + 1), seed=11)
    halves = normal((LENGTH,), "float16", 12)
    factor = mx.array(0.7)  # no axis: by reference
    documents = mx.array(np.sort(np.random.default_rng(0).integers(0, 5, 200)), mx.int32)
    allowed = mx.array(np.random.default_rng(1).random((HEADS, LENGTH, 200)) < 0.4)

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    return {
        "softcap": Case(lambda s, b, h, i, j: 20 * mx.tanh(s / 20)),
        "ALiBi": Case(lambda s, b, h, i, j: s - slopes[h] * mx.abs(i - j), causal),
        "relative bias, also before the start": Case(lambda s, b, h, i, j: s + table[h, i - j]),
        "half precision table": Case(lambda s, b, h, i, j: s + halves[i].astype(mx.float32)),
        "captured scalar": Case(lambda s, b, h, i, j: s * factor + b),
        "a mask of -inf": Case(lambda s, b, h, i, j: mx.where(i >= j, s, -mx.inf)),
        "causal": Case(mask_mod=causal),
        "window": Case(mask_mod=lambda b, h, i, j: (i >= j) & (i - j < 17)),
        "documents": Case(mask_mod=lambda b, h, i, j: documents[i] == documents[j]),
        "prefix": Case(mask_mod=lambda b, h, i, j: (j < 25) | (i >= j)),
        "dilated by head": Case(mask_mod=lambda b, h, i, j: (i - j) % (h + 1) == 0),
        "any array": Case(mask_mod=lambda b, h, i, j: allowed[h, i, j]),
        "nothing": Case(mask_mod=lambda b, h, i, j: (i < 0) & (j < 0)),
        "everything": Case(mask_mod=lambda b, h, i, j: True),
        "by batch entry": Case(mask_mod=lambda b, h, i, j: j >= 40 * b),
    }


def definition(
    case: Case, q: mx.array, k: mx.array, v: mx.array, scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attention by the functions themselves, applied to whole arrays in float64."""
    batch, heads, q_len, _ = q.shape
    with mx.stream(mx.cpu):
        wide = [x.astype(mx.float64) for x in (q, k, v)]
        k, v = (mx.repeat(x, heads // x.shape[1], axis=1) for x in wide[1:])
        scores = (wide[0] * mx.array(scale, mx.float64)) @ k.swapaxes(-1, -2)
        places = (
            mx.arange(batch)[:, None, None, None],
            mx.arange(heads)[:, None, None],
            mx.arange(q_len)[:, None],
            mx.arange(k.shape[2]),
        )
        if case.score_mod:
            scores = mx.broadcast_to(case.score_mod(scores, *places), scores.shape)
        exact = np.array(scores)
        if case.mask_mod:
            exact = np.where(np.array(case.mask_mod(*places)), exact, -np.inf)
        values = np.array(v)
    peak = exact.max(axis=-1, keepdims=True)
    weights = np.exp(exact - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, peak + np.log(total), -np.inf)[..., 0]
    return weights @ values / np.where(total == 0, 1.0, total), lse


class FunctionConformance(OnDevice):
    """Tests of one device; `name` is all that a subclass must set."""

    def check(
        self,
        case: Case,
        dtype: str,
        *,
        blocks: int | tuple[int, int] | None = None,
        path: str | None = None,
        q_len: int = LENGTH - 13,
        kv_len: int = LENGTH,
        batch: int = 2,
        splits: int = 0,
    ) -> None:
        self.require(dtype)
        limits = self.device.limits
        score = trace(case.score_mod, "score_mod") if case.score_mod else None
        mask = trace(case.mask_mod, "mask_mod") if case.mask_mod else None
        if blocks and mask is None:
            pytest.skip("a block mask needs a mask function")
        config = AttentionConfig(
            32,
            dtype,
            heads_per_kv=2,
            return_lse=True,
            score_mod=score.graph.text if score else None,
            mask_mod=mask.graph.text if mask else None,
            block_mask=blocks is not None,
        )
        family = "decode" if splits else "forward"
        schedule = default_schedule(config, limits, family)
        if splits:
            schedule = replace(schedule, splits=splits)
        if path is not None:
            found: Schedule | None = paths_of(limits.language, config).get(path)
            if found is None:
                pytest.skip(f"{self.name} has no path {path!r} for {dtype}")
            schedule = found
        given = None
        if blocks and case.mask_mod:
            given = create_block_mask(case.mask_mod, batch, HEADS, q_len, kv_len, blocks)
        inputs = Inputs(score.arrays if score else (), mask.arrays if mask else (), given)
        q = normal((batch, HEADS, q_len, 32), dtype, 1)
        k, v = (normal((batch, HEADS // 2, kv_len, 32), dtype, s) for s in (2, 3))
        out, lse = self.device.build(config, schedule)(q, k, v, 0.25, inputs)
        expected, expected_lse = definition(case, q, k, v, 0.25)
        assert relative_error(out, expected) <= TOLERANCE[dtype]
        assert lse is not None
        np.testing.assert_allclose(np.array(lse), expected_lse, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("case", cases())
    def test_functions(self, case: str, dtype: str) -> None:
        self.check(cases()[case], dtype)

    @pytest.mark.parametrize("blocks", [32, 8, (48, 20), 500])
    @pytest.mark.parametrize("case", [n for n, c in cases().items() if c.mask_mod])
    def test_block_masks(self, case: str, blocks: int | tuple[int, int]) -> None:
        self.check(cases()[case], "float16", blocks=blocks)

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("blocks", [None, 16])
    def test_schedules(self, path: str, blocks: int | None) -> None:
        window = cases()["window"].mask_mod
        score = cases()["relative bias, also before the start"].score_mod
        self.check(Case(score, window), "float16", blocks=blocks, path=path)

    @pytest.mark.parametrize("splits", [1, 4])
    @pytest.mark.parametrize("case", ["ALiBi", "any array", "dilated by head", "captured scalar"])
    def test_decode(self, case: str, splits: int) -> None:
        """Rows of several heads in one group, each with its own head's functions."""
        for q_len in (1, 3, 17):
            self.check(cases()[case], "float16", q_len=q_len, splits=splits)

    def test_lengths_of_one(self) -> None:
        case = Case(cases()["ALiBi"].score_mod, lambda b, h, i, j: j <= i)
        for q_len, kv_len in ((1, 1), (1, 70), (70, 1)):
            self.check(case, "float16", blocks=8, q_len=q_len, kv_len=kv_len, batch=1)

    def test_the_default_schedule_passes_the_check(self) -> None:
        for case in ("ALiBi", "documents", "by batch entry"):
            score, mask = cases()[case].score_mod, cases()[case].mask_mod
            config = AttentionConfig(
                64,
                score_mod=trace(score).graph.text if score else None,
                mask_mod=trace(mask, "mask_mod").graph.text if mask else None,
                block_mask=True,
            )
            result = verify(self.device, config, default_schedule(config, self.device.limits))
            assert result.ok, result.detail
            assert 0 < result.error <= result.tolerance
