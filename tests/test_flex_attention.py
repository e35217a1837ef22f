from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen import (
    ArgumentError,
    AttentionConfig,
    BlockMask,
    and_masks,
    create_block_mask,
    explain,
    flex_attention,
    get_kernel,
    or_masks,
    simulator,
)
from metalgen.calls import resolve
from metalgen.calls.verify import relative_error
from metalgen.devices import get_device
from metalgen.dsl.errors import FunctionError
from metalgen.dsl.trace import trace
from metalgen.families import Schedule, default_schedule
from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.source.render import render
from metalgen.testing.devices import normal
from metalgen.testing.functions import Case, definition


@pytest.fixture(autouse=True)
def own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))
    resolve.forget_kernels()
    yield
    resolve.forget_kernels()


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def window(width: int) -> Any:
    return lambda b, h, i, j: (j <= i) & (i - j < width)


def inputs(q_len: int = 70, kv_len: int = 90, dtype: str = "float32") -> list[mx.array]:
    q = normal((2, 4, q_len, 32), dtype, 1)
    return [q, *(normal((2, 2, kv_len, 32), dtype, s) for s in (2, 3))]


@pytest.mark.parametrize("device", ["reference", "simulator"])
def test_functions_and_a_block_mask_by_arrays_alone(device: str) -> None:
    q, k, v = inputs()
    table = normal((4, 100), seed=5)
    score = Case(lambda s, b, h, i, j: s + table[h, i], window(20))
    mask = create_block_mask(window(20), None, None, 70, 90)
    expected, expected_lse = definition(score, q, k, v, 32**-0.5)
    for kw in ({"mask_mod": score.mask_mod}, {"block_mask": mask}):
        out = flex_attention(q, k, v, score.score_mod, device=device, **kw)  # type: ignore[arg-type]
        assert isinstance(out, mx.array) and relative_error(out, expected) < 2e-6
        result = flex_attention(q, k, v, score.score_mod, device=device, return_lse=True, **kw)  # type: ignore[arg-type]
        assert isinstance(result, tuple)
        np.testing.assert_allclose(np.array(result[1]), expected_lse, rtol=1e-5, atol=1e-5)


def test_one_kernel_serves_all_captured_values() -> None:
    q, k, v = inputs(9, 12)
    config = None
    for slope in (0.5, -1.0):
        factor = mx.array([slope, 1.0, 2.0, 3.0])
        case = Case(lambda s, b, h, i, j, f=factor: s + f[h] * (j - i))
        out = flex_attention(q, k, v, case.score_mod, device="simulator")
        assert isinstance(out, mx.array)
        assert relative_error(out, definition(case, q, k, v, 32**-0.5)[0]) < 2e-6
        config = AttentionConfig(
            32,
            "float32",
            heads_per_kv=2,
            score_mod=trace(case.score_mod).graph.text,  # type: ignore[arg-type]
        )
    assert config is not None
    known = [key for key in resolve._known if key[0] == config]
    assert len(known) == 1
    kernel = get_kernel(config, batch=2, heads=4, q_len=9, kv_len=12, device="simulator")
    assert kernel is resolve._known[known[0]]
    assert kernel.backend == "metalgen", kernel.explain()
    assert "score_mod:" in kernel.explain()


@pytest.mark.parametrize("device", ["reference", "simulator"])
def test_gradients_reach_queries_keys_values_and_captured_arrays(device: str) -> None:
    q, k, v = inputs(11, 13)
    table = normal((4, 40), seed=5)

    def loss(q: mx.array, k: mx.array, v: mx.array, table: mx.array) -> mx.array:
        out = flex_attention(
            q, k, v, lambda s, b, h, i, j: s + table[h, i - j], causal, device=device
        )
        assert isinstance(out, mx.array)
        return (out * out).sum()

    def plain(q: mx.array, k: mx.array, v: mx.array, table: mx.array) -> mx.array:
        k, v = (mx.repeat(x, 2, axis=1) for x in (k, v))
        i, j = mx.arange(11)[:, None], mx.arange(13)
        scores = q @ k.swapaxes(-1, -2) * 32**-0.5 + table[mx.arange(4)[:, None, None], i - j]
        out = mx.softmax(mx.where(j <= i, scores, -mx.inf), axis=-1) @ v
        return (out * out).sum()

    got = mx.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, table)
    wanted = mx.grad(plain, argnums=(0, 1, 2, 3))(q, k, v, table)
    for a, b in zip(got, wanted, strict=True):
        assert mx.abs(b).max().item() > 1e-3  # type: ignore[operator]
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-4, atol=2e-5)


def counted(
    config: AttentionConfig, schedule: Schedule, length: int, given: Inputs = NOTHING
) -> Any:
    """What one query head of `length` queries and keys does, counted; no finding is let pass."""
    q = normal((1, 1, length, config.head_dim), config.dtype, 1)
    run = get_device("simulator").build(config, schedule)
    with simulator.record(checked=True, raise_on_findings=True) as runs:
        mx.eval(run(q, q, q, 0.1, given)[0])
    return runs[0].counters


@pytest.mark.parametrize("buffers", [1, 2])
def test_blocks_that_a_mask_empties_are_not_computed(buffers: int) -> None:
    """By hand: 8x8x8 products of each visited tile of 64 queries and 32 keys, of width 64."""
    length, tile = 512, Schedule(bq=64, bk=32, bd=64, simdgroups=4, row_blocks=2, buffers=buffers)
    each = 64 * 32 * (64 + 64) // 8**3
    for mask_mod, seen in (
        (window(64), lambda i, j: (j <= i) & (i - j < 64)),
        (causal, lambda i, j: j <= i),
        (lambda b, h, i, j: (i < 100) & (j >= 400), lambda i, j: (i < 100) & (j >= 400)),
        (lambda b, h, i, j: i < 0, lambda i, j: i < 0),
        (lambda b, h, i, j: i >= 0, lambda i, j: i >= 0),
    ):
        i, j = np.arange(length)[:, None], np.arange(length)[None]
        dense = np.broadcast_to(seen(i, j), (length, length))
        visited = dense.reshape(8, 64, 16, 32).any(axis=(1, 3)).sum()
        blocks = create_block_mask(mask_mod, None, None, length, length)
        text = blocks.mask.graph.text
        config = AttentionConfig(64, mask_mod=text, block_mask=True)
        counters = counted(config, tile, length, Inputs(blocks=blocks))
        assert counters.multiply_accumulates == visited * each
        whole = counted(AttentionConfig(64, mask_mod=text), tile, length, Inputs())
        assert whole.multiply_accumulates == 8 * 16 * each


def test_a_score_function_adds_no_bytes_but_its_own_inputs_and_no_barrier() -> None:
    """At 2048 queries and keys, width 128, half: as the issue asks, and a window beside causal."""
    length = 2048
    schedule = default_schedule(AttentionConfig(128, causal=True))
    alone = counted(AttentionConfig(128), schedule, length)
    slopes = mx.arange(8).astype(mx.float32)
    score = trace(lambda s, b, h, i, j: 50 * mx.tanh(s / 50) + slopes[h] * (j - i))
    given = Inputs(score=score.arrays)
    with_score = counted(AttentionConfig(128, score_mod=score.graph.text), schedule, length, given)
    own = with_score.buffer("score_captured_0")
    assert 0 < own.distinct_read <= 4 * 8
    assert with_score.device_read - own.bytes_read == alone.device_read
    assert with_score.device_written == alone.device_written
    assert with_score.barriers == alone.barriers
    assert with_score.multiply_accumulates == alone.multiply_accumulates


def test_a_window_of_256_computes_a_quarter_of_causal() -> None:
    length = 2048
    schedule = default_schedule(AttentionConfig(128, causal=True))
    done = {}
    for name, mask_mod in (("window", window(256)), ("causal", causal)):
        blocks = create_block_mask(mask_mod, None, None, length, length)
        some, _ = blocks.tiles(schedule.bq, schedule.bk)
        done[name] = some.sum().item()
    assert done["window"] <= 0.3 * done["causal"]  # type: ignore[operator]


def test_a_full_block_is_not_masked() -> None:
    """The mask's own array is read for partial blocks only."""
    length = 256
    flags = mx.array(np.tri(length, dtype=bool))
    blocks = create_block_mask(lambda b, h, i, j: flags[i, j], None, None, length, length)
    config = AttentionConfig(64, mask_mod=blocks.mask.graph.text, block_mask=True)
    given = Inputs(mask=blocks.mask.arrays, blocks=blocks)
    schedule = Schedule(bq=32, bk=32, bd=64, simdgroups=4)
    read = counted(config, schedule, length, given).buffer("mask_captured_0")
    assert read.distinct_read == 8 * 32 * 32  # the tiles on the diagonal
    config = AttentionConfig(64, mask_mod=config.mask_mod)
    everywhere = counted(config, schedule, length, Inputs(mask=blocks.mask.arrays))
    assert everywhere.buffer("mask_captured_0").distinct_read == length * length


@pytest.mark.parametrize(("q_len", "kv_len", "block"), [(70, 90, (16, 32)), (9, 300, (1, 7))])
@pytest.mark.parametrize("tile", [(8, 8), (16, 32), (64, 16), (24, 40), (500, 500)])
def test_block_masks_at_any_tile(
    q_len: int, kv_len: int, block: tuple[int, int], tile: tuple[int, int]
) -> None:
    """No tile that holds a seen key is left out, no tile that holds a masked one is called full."""
    dense = np.random.default_rng(0).random((2, 3, q_len, kv_len)) < 0.02
    dense[1] = True
    dense[0, 1, 5:8] = True
    flags = mx.array(dense)
    mask = create_block_mask(lambda b, h, i, j: flags[b, h, i, j], 2, 3, q_len, kv_len, block)
    lists = np.array(mask.lists(*tile))
    rows, columns = -(-q_len // tile[0]), -(-kv_len // tile[1])
    assert lists.shape == (2, 3, rows, 1 + max(7, columns))
    exact = tile[0] % block[0] == 0 and tile[1] % block[1] == 0
    for b, h, r in np.ndindex(2, 3, rows):
        count, *entries = lists[b, h, r]
        found = {int(e) >> 1: bool(e & 1) for e in entries[:count]}
        assert list(found) == sorted(found) and len(found) == count
        for c in range(columns):
            at = (slice(r * tile[0], (r + 1) * tile[0]), slice(c * tile[1], (c + 1) * tile[1]))
            part = dense[b, h][at]
            assert c in found or not part.any()
            assert not found.get(c) or part.all()
            if exact:
                assert (c in found) == part.any()
                assert found.get(c, False) == part.all() or not part.any()


def test_a_block_mask_says_what_it_skips() -> None:
    mask = create_block_mask(causal, None, None, 64, 64, 16)
    assert (mask.batch, mask.heads, mask.some.shape) == (1, 1, (1, 1, 4, 4))
    assert mask.sparsity() == 100 * (1 - 10 / 16)
    assert "q_len=64" in repr(mask)
    by_head = create_block_mask(lambda b, h, i, j: j <= i + h, 3, 5, 64, 64)
    assert by_head.some.shape[:2] == (1, 5)


def test_masks_are_combined() -> None:
    first = and_masks(causal, window(8), lambda b, h, i, j: j != 3)
    second = or_masks(causal, lambda b, h, i, j: j < 5)
    i, j = np.arange(20)[:, None], np.arange(20)
    for mask_mod, wanted in (
        (first, (j <= i) & (i - j < 8) & (j != 3)),
        (second, (j <= i) | (j < 5)),
    ):
        flags = create_block_mask(mask_mod, None, None, 20, 20, 1).some
        np.testing.assert_array_equal(np.array(flags)[0, 0], wanted)
    with pytest.raises(ArgumentError, match="and_masks: expected one or more mask functions"):
        and_masks()
    with pytest.raises(ArgumentError, match="or_masks"):
        or_masks(causal, 3)  # type: ignore[arg-type]


def test_bad_arguments_are_named_before_anything_runs() -> None:
    q, k, v = inputs()
    blocks = create_block_mask(causal, None, None, 70, 90)
    for pattern, keywords in (
        ("block_mask: expected what create_block_mask returns", {"block_mask": causal}),
        (
            "mask_mod: expected None with a block_mask",
            {"block_mask": blocks, "mask_mod": window(3)},
        ),
        ("score_mod: expected a function", {"score_mod": "causal"}),
        ("device: expected one of", {"score_mod": lambda s, b, h, i, j: s, "device": "gpu"}),
    ):
        with pytest.raises(ArgumentError, match=pattern):
            flex_attention(q, k, v, **keywords)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="made for 69 queries and 90 keys"):
        flex_attention(q[:, :, :69], k, v, block_mask=blocks)
    with pytest.raises(ArgumentError, match="q.shape: expected 4 axes"):
        flex_attention(q[0], k, v, mask_mod=causal)
    by_head = create_block_mask(lambda b, h, i, j: j <= i + h, None, 3, 70, 90)
    with pytest.raises(ArgumentError, match="made with H=4, because its function reads h"):
        flex_attention(q, k, v, block_mask=by_head)
    again = flex_attention(q, k, v, mask_mod=causal, block_mask=blocks)  # the same function
    assert isinstance(again, mx.array)


@pytest.mark.parametrize("device", ["reference", "simulator"])
@pytest.mark.parametrize("made_with", [{"B": 1}, {"H": 1}])
def test_a_mask_made_for_one_entry_or_head_is_not_taken_for_more(
    made_with: dict[str, int], device: str
) -> None:
    """Its blocks are those of b = 0 or h = 0, while the function would see every b and h."""

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i + 40 * (b if "B" in made_with else h)

    q, k, v = inputs()
    ((name, one),) = made_with.items()
    count = {"B": 2, "H": 4}[name]
    sizes: Any = {"B": None, "H": None, "Q_LEN": 70, "KV_LEN": 90}
    expected = f"block_mask: expected one made with {name}={count}, because its function reads"
    with pytest.raises(ArgumentError, match=expected):
        flex_attention(
            q, k, v, block_mask=create_block_mask(mask, **(sizes | made_with)), device=device
        )
    blocks = create_block_mask(mask, **(sizes | {name: count}))
    out = flex_attention(q, k, v, block_mask=blocks, device=device)
    wanted, _ = definition(Case(None, mask), q, k, v, 32**-0.5)
    assert isinstance(out, mx.array) and relative_error(out, wanted) < 2e-6
    alone = [q[:one], k[:one], v[:one]] if name == "B" else [q[:, :one], k[:, :one], v[:, :one]]
    out = flex_attention(
        *alone, block_mask=create_block_mask(mask, **(sizes | made_with)), device=device
    )
    wanted, _ = definition(Case(None, mask), *alone, 32**-0.5)
    assert isinstance(out, mx.array) and relative_error(out, wanted) < 2e-6


def test_a_mask_that_reads_no_entry_or_head_is_shared_whatever_it_was_made_for() -> None:
    q, k, v = inputs()
    for batch, heads in ((1, 1), (7, 3), (None, None)):
        blocks = create_block_mask(window(9), batch, heads, 70, 90)
        out = flex_attention(q, k, v, block_mask=blocks, device="reference")
        wanted, _ = definition(Case(None, window(9)), q, k, v, 32**-0.5)
        assert isinstance(out, mx.array) and relative_error(out, wanted) < 2e-6


@pytest.mark.parametrize("index", ["b", "h"])
def test_a_captured_array_has_an_element_for_every_entry_and_head_that_indexes_it(
    index: str,
) -> None:
    """Else the nearest element would be read, as of any index outside, without a word."""
    q, k, v = inputs()  # 2 entries, 4 heads
    count = {"b": 2, "h": 4}[index]

    def score(table: mx.array) -> Any:
        return lambda s, b, h, i, j: s + table[{"b": b, "h": h}[index], j]

    short = mx.zeros((count - 1, 90))
    with pytest.raises(ArgumentError, match=rf"score_mod: .*{count} elements.*but got {count - 1}"):
        flex_attention(q, k, v, score(short), device="reference")
    table = normal((count, 90), seed=3)
    out = flex_attention(q, k, v, score(table), device="reference")
    wanted, _ = definition(Case(score(table)), q, k, v, 32**-0.5)
    assert isinstance(out, mx.array) and relative_error(out, wanted) < 2e-6
    # A function that means the nearest element says so.
    last = mx.array(count - 2)
    near = flex_attention(
        q,
        k,
        v,
        lambda s, b, h, i, j: s + short[mx.minimum({"b": b, "h": h}[index], last), j],
        device="reference",
    )
    plain = flex_attention(q, k, v, device="reference")
    np.testing.assert_array_equal(np.array(near), np.array(plain))


@pytest.mark.parametrize("device", ["reference", "simulator"])
def test_a_block_mask_keeps_the_captured_values_that_it_was_made_of(device: str) -> None:
    """Assigning into the array later changes neither its blocks nor the elements in them."""
    q, k, v = inputs()
    documents = mx.array(np.repeat([0, 1, 2], 30), mx.int32)

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return documents[i] == documents[j]

    blocks = create_block_mask(mask, None, None, 70, 90)
    wanted, _ = definition(Case(None, mask), q, k, v, 32**-0.5)
    documents[10:50] = 5
    out = flex_attention(q, k, v, block_mask=blocks, device=device)
    assert isinstance(out, mx.array) and relative_error(out, wanted) < 2e-6


def test_a_mask_function_of_other_arrays_is_not_taken_for_that_of_a_block_mask() -> None:
    q, k, v = inputs()

    def mask(documents: mx.array) -> Any:
        return lambda b, h, i, j: documents[i] == documents[j]

    first, second = (mx.array(np.repeat([0, 1, 2], n), mx.int32) for n in (30, 30))
    blocks = create_block_mask(mask(first), None, None, 70, 90)
    flex_attention(q, k, v, mask_mod=mask(first), block_mask=blocks, device="reference")
    with pytest.raises(ArgumentError, match="mask_mod: expected None with a block_mask"):
        flex_attention(q, k, v, mask_mod=mask(second), block_mask=blocks, device="reference")


def test_bad_arguments_of_create_block_mask() -> None:
    with pytest.raises(
        ArgumentError, match=r"H is required \(the number of query heads\): mask_mod reads h"
    ):
        create_block_mask(lambda b, h, i, j: j <= i + h, None, None, 8, 8)
    with pytest.raises(ArgumentError, match="Q_LEN: expected an integer from 1"):
        create_block_mask(causal, None, None, 0, 8)
    with pytest.raises(ArgumentError, match="block_size: expected an integer from 1"):
        create_block_mask(causal, None, None, 8, 8, 0)
    with pytest.raises(ArgumentError, match="block_size: expected a number, or one for"):
        create_block_mask(causal, None, None, 8, 8, (1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(FunctionError, match="mask_mod: .*return a comparison"):
        create_block_mask(lambda b, h, i, j: i - j, None, None, 8, 8)


def test_inputs_that_do_not_fit_the_config() -> None:
    q, k, v = inputs()
    table = mx.zeros((4, 100))
    text = trace(lambda s, b, h, i, j: s + table[h, i]).graph.text
    config = AttentionConfig(32, "float32", heads_per_kv=2, score_mod=text)
    kernel = get_kernel(config, q_len=70, device="reference")
    with pytest.raises(ArgumentError, match=r"score_mod: .*float32\[4, 100\], but got \[\]"):
        kernel(q, k, v)
    wrong = Inputs(score=(mx.zeros((4, 99)),))
    with pytest.raises(ArgumentError, match="score_mod: expected these captured arrays"):
        kernel(q, k, v, inputs=wrong)
    for wrong in (Inputs(score=None), Inputs(score=(3,))):  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="score_mod: expected a tuple of captured arrays"):
            kernel(q, k, v, inputs=wrong)
    with pytest.raises(ArgumentError, match="inputs: expected a metalgen.problem.inputs.Inputs"):
        kernel(q, k, v, inputs=(table,))  # type: ignore[arg-type]
    masked = AttentionConfig(
        32,
        "float32",
        heads_per_kv=2,
        mask_mod=trace(causal, "mask_mod").graph.text,
        block_mask=True,
    )
    with pytest.raises(ArgumentError, match="block_mask: expected a BlockMask"):
        get_kernel(masked, device="reference")(q, k, v, inputs=Inputs(blocks=5))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="block_mask: expected None, as the config says"):
        blocks = create_block_mask(causal, None, None, 70, 90)
        kernel(q, k, v, inputs=Inputs(score=(table,), blocks=blocks))


def test_a_pieced_mask_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = create_block_mask(window(7), None, None, 100, 90, 8)
    monkeypatch.setattr("metalgen.problem.block_mask.MAX_ELEMENTS", 90 * 8 * 2)
    pieces = create_block_mask(window(7), None, None, 100, 90, 8)
    assert isinstance(pieces, BlockMask)
    assert mx.array_equal(whole.some, pieces.some)
    assert mx.array_equal(whole.every, pieces.every)


@pytest.mark.parametrize("size", [1000, 1 << 24, (8, 1 << 24)])
def test_blocks_larger_than_all_there_is_cost_nothing(size: int | tuple[int, int]) -> None:
    blocks = create_block_mask(window(7), None, None, 20, 30, size)
    tall = 3 if isinstance(size, tuple) else 1
    assert blocks.some.shape == (1, 1, tall, 1)
    assert blocks.some.all() and not blocks.every.any()
    q, k, v = (normal((1, 1, n, 8), seed=n) for n in (20, 30, 30))
    out = flex_attention(q, k, v, block_mask=blocks, device="reference")
    expected = flex_attention(q, k, v, mask_mod=window(7), device="reference")
    np.testing.assert_array_equal(np.array(out), np.array(expected))


def test_a_function_with_nan_in_it_goes_with_its_own_block_mask() -> None:
    q = normal((1, 1, 5, 8))

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i != mx.array(float("nan"))

    blocks = create_block_mask(mask, None, None, 5, 5)
    out = flex_attention(q, q, q, mask_mod=mask, block_mask=blocks, device="reference")
    np.testing.assert_array_equal(
        np.array(out), np.array(flex_attention(q, q, q, device="reference"))
    )


def test_every_target_prints_the_same_functions() -> None:
    table = mx.zeros((4, 100), mx.bfloat16)
    score = trace(lambda s, b, h, i, j: mx.tanh(s) + table[h, i - j].astype(mx.float32)).graph
    mask = trace(causal, "mask_mod").graph
    config = AttentionConfig(64, score_mod=score.text, mask_mod=mask.text, block_mask=True)
    for target, spelled in (
        ("metal", ["precise::tanh(score)", "static_cast<float>(score_", "const bfloat score_"]),
        ("cuda", ["mg_tanh(score)", "static_cast<float>(score_", "const __nv_bfloat16 score_"]),
    ):
        schedule = default_schedule(config) if target == "metal" else cuda_schedule()
        source = render(config, schedule)
        assert source.inputs == ("q", "k", "v", "scale", "block_mask", "score_captured_0")
        for text in [*spelled, "mg_index(", "kv_idx <= q_idx"]:
            assert text in source.text, text


def cuda_schedule() -> Schedule:
    return Schedule(bq=32, bk=32, bd=64, simdgroups=2, q_source="threadgroup", kind="mma")


def test_explain_says_what_runs_functions() -> None:
    x = mx.zeros((1, 2, 40, 16))
    blocks = create_block_mask(lambda b, h, i, j: j <= i, None, None, 40, 40)
    text = explain(x, x, x, score_mod=lambda s, b, h, i, j: 2 * s, block_mask=blocks,
                            device="simulator")  # fmt: skip
    assert "score_mod:" in text and "blocks" in text
    assert "metalgen's kernel on device 'simulator'" in text
    plain = explain(x, x, x, device="simulator")
    assert "score_mod" not in plain
    with pytest.raises(ArgumentError, match="block_mask: expected what create_block_mask returns"):
        explain(x, x, x, block_mask=3)  # type: ignore[arg-type]
