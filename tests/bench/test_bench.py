"""`metalgen.bench`: what is counted, checked, compared and said, with clocks and rivals made up."""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.bench import presets
from metalgen.bench.caches import cache_entries
from metalgen.bench.entries import Absent, Entry, attention_entries, definition, kernels, sample_set
from metalgen.bench.foreign import foreign_entries
from metalgen.bench.layers import layer_entries
from metalgen.bench.measuring import QUICK, Effort, Result, Row, check, compare, measure
from metalgen.bench.tables import csv_text, ratio_words, row_lines, summary
from metalgen.bench.unmeasured import counted, modelled
from metalgen.bench.work import Work
from metalgen.calls.kernel import Kernel
from metalgen.chips import get_chip
from metalgen.devices import get_device
from metalgen.errors import ArgumentError
from metalgen.problem.config import AttentionConfig
from metalgen.problem.visible import visible

PLAIN = Work(AttentionConfig(32), 1, 2, 24, 40)
REFERENCE = get_device("reference")


class Clock:
    """Seconds that pass when an entry says so, and never otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rival(name: str, clock: Clock, seconds: Any, factor: float = 1.0) -> Entry:
    """An entry that takes so many seconds, one after the other, and is off by a factor."""
    config, each = PLAIN.config, itertools.cycle(seconds)

    def call(q: mx.array, k: mx.array, v: mx.array, inputs: Any) -> mx.array:
        clock.now += next(each)
        scores = (q @ k.swapaxes(-1, -2)) * config.head_dim**-0.5
        return mx.softmax(scores, axis=-1) @ v * factor

    return Entry(name, call, sample_set, definition(config), 8e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": True},
        {"window_left": 3},
        {"causal": True, "window_left": 5},
        {"window_left": 2, "window_right": 4},
        {"window_right": 1, "causal": True},
    ],
)
@pytest.mark.parametrize(("q_len", "kv_len"), [(7, 7), (3, 11), (9, 4), (1, 20)])
def test_visible_pairs_are_those_of_the_definition(
    fields: dict[str, Any], q_len: int, kv_len: int
) -> None:
    config = AttentionConfig(32, **fields)
    count = 0
    for i, j in itertools.product(range(q_len), range(kv_len)):
        own = i + kv_len - q_len
        kept = not config.causal or j <= own
        kept &= config.window_left is None or j >= own - config.window_left
        kept &= config.window_right is None or j <= own + config.window_right
        count += kept
    assert visible(config, q_len, kv_len) == count


def test_operations_and_bytes_are_those_of_flash_attentions_benchmark() -> None:
    """4 B L^2 H D, half of it causal, and 3.5 times as much with the backward pass."""
    work = Work(AttentionConfig(64), 2, 4, 512, 512)
    assert work.operations == 4 * 2 * 512**2 * 4 * 64
    assert replace(work, train=True).operations == 3.5 * work.operations
    causal = replace(work, config=AttentionConfig(64, causal=True))
    assert causal.operations == pytest.approx(work.operations / 2, rel=2e-3)
    assert work.kv_bytes == 2 * 4 * 512 * 2 * 64 * 2
    quantized = replace(work, config=AttentionConfig(64, kv_bits=4, kv_group=64))
    assert quantized.kv_bytes == work.kv_bytes / 4


def test_the_presets_have_the_rows_of_their_sources() -> None:
    seeds = presets.preset("seeds").works
    assert len(seeds) == 48 + 4 * 3
    assert len({(w.batch, w.q_len, w.config.head_dim) for w in seeds[:48]}) == 48
    assert {w.heads * w.config.head_dim for w in seeds[48:]} == {2048, 1536, 4096, 1024}
    flash = presets.preset("flash-attn").works
    assert {w.batch * w.q_len for w in flash} == {16384}
    assert {w.heads * w.config.head_dim for w in flash} == {2048}
    assert sum(w.train for w in flash) == len(flash) / 2
    caches = presets.preset("kv", "float16", presets.CacheSizes(live=(256,), capacity=(128, 512)))
    assert {w.capacity for w in caches.works} == {512}
    for name in presets.PRESETS:
        preset = presets.preset(name)
        assert len(set(preset.works)) == len(preset.works)
        assert all(w.q_len <= 96 and w.kv_len <= 192 for w in preset.quick().works)
    with pytest.raises(ArgumentError, match=r"the nearest: flash-attn"):
        presets.preset("flash-atn")


def test_a_slow_rival_is_shown_to_be_slow_and_an_equal_one_not_to_be_separable() -> None:
    clock = Clock()
    entries = [
        rival("ours", clock, [1.0]),
        rival("slow", clock, [1.5]),
        rival("alike", clock, [0.9, 1.1, 1.0]),
    ]
    row = measure(PLAIN, entries, replace(QUICK, rounds=9), clock=clock)
    ours, slow, alike = row.results
    assert ours.ratio is None
    assert slow.ratio is not None and slow.ratio.value == pytest.approx(1.5)
    assert slow.ratio.separable and slow.seconds == pytest.approx(1.5)
    assert alike.ratio is not None and not alike.ratio.separable
    assert ratio_words(alike.ratio).endswith("not separable")
    assert summary([row])[0][:2] == ("slow", "1.50")


def test_a_drift_of_the_clock_rate_leaves_the_ratios_alone() -> None:
    """Everything gets slower by a tenth a turn; medians by themselves would say otherwise."""
    clock = Clock()
    drifting = [1.1**n for n in range(30)]
    ours = rival("ours", clock, [1.0])
    slow = rival("slow", clock, [2.0])
    state = {"turn": 0}

    def drift(entry: Entry, seconds: float) -> Entry:
        def run(sets: Any, launches: int, first: int) -> None:
            clock.now += launches * seconds * drifting[min(state["turn"], 29)]
            state["turn"] += 1

        return replace(entry, run=run)

    row = measure(
        PLAIN, [drift(ours, 1.0), drift(slow, 2.0)], replace(QUICK, rounds=6), clock=clock
    )
    ratio = row.results[1].ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0, rel=0.05)


def test_a_wrong_rival_is_found_and_never_timed() -> None:
    clock = Clock()
    row = measure(
        PLAIN,
        [rival("ours", clock, [1.0]), rival("wrong", clock, [0.1], factor=1.05)],
        QUICK,
        clock=clock,
    )
    wrong = row.results[1]
    assert wrong.status == "wrong" and wrong.seconds is None
    assert "relative error 5.0e-02" in wrong.detail


def test_a_rival_that_is_wrong_at_full_size_only_is_found() -> None:
    clock = Clock()
    work = replace(PLAIN, q_len=100, kv_len=200)
    ours, other = (rival(name, clock, [1.0]) for name in ("ours", "other"))

    def cut(q: mx.array, k: mx.array, v: mx.array, inputs: Any) -> mx.array:
        return ours.call(q, k[:, :, :150], v[:, :, :150], inputs)

    row = measure(work, [ours, replace(other, call=cut)], QUICK, clock=clock)
    assert row.results[1].status == "wrong"
    assert "from the first entry at full size" in row.results[1].detail


def test_a_rival_that_fails_is_left_out_with_its_reason() -> None:
    def broken(*given: Any) -> mx.array:
        raise RuntimeError("no such operation")

    clock = Clock()
    entries = [rival("ours", clock, [1.0]), replace(rival("bad", clock, [1.0]), call=broken)]
    row = measure(PLAIN, [*entries, Absent("gone", "not installed")], QUICK, clock=clock)
    assert [(r.status, r.detail) for r in row.results[1:]] == [
        ("failed", "no such operation"),
        ("absent", "not installed"),
    ]
    lines = row_lines(row, "TFLOP/s", None)
    assert lines[2][2] == "absent" and lines[2][-1] == "not installed"


def test_ratios_are_taken_within_rounds() -> None:
    ratio = compare([1.0, 1.0, 2.0, 2.0, 4.0, 4.0], [2.0, 2.0, 4.0, 4.0, 12.0, 12.0])
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 3.0)


ROWS: dict[str, Work] = {
    "plain": Work(AttentionConfig(64), 2, 4, 40, 60),
    "causal window, grouped": Work(
        AttentionConfig(64, causal=True, window_left=20, heads_per_kv=2), 1, 4, 33, 50
    ),
    "softcap, ALiBi": Work(
        AttentionConfig(64, causal=True, softcap=20.0, alibi=True), 1, 2, 30, 30
    ),
    "bias": Work(AttentionConfig(64, bias=True), 1, 2, 20, 30),
    "boolean mask": Work(AttentionConfig(64, array_mask=True), 2, 2, 20, 30),
    "sinks": Work(AttentionConfig(64, causal=True, sinks=True), 1, 2, 20, 30),
    "packed": Work(AttentionConfig(64, causal=True, varlen=True), 3, 2, 20, 30),
    "rotary": Work(AttentionConfig(64, causal=True, rope="half"), 1, 2, 20, 30),
    "training": Work(AttentionConfig(64, causal=True, heads_per_kv=2), 1, 4, 33, 50, train=True),
    "training with a softcap": Work(
        AttentionConfig(64, "float32", causal=True, softcap=20.0), 1, 2, 33, 50, train=True
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_entries_compute_what_they_say(name: str) -> None:
    """MLX's function, the operations written by hand, and on the simulator our kernel."""
    work = ROWS[name]
    checked = []
    for device in ("reference", "simulator"):
        for entry in attention_entries(work, get_device(device), None):
            if isinstance(entry, Entry) and (device == "simulator") == entry.name.startswith(
                "ours"
            ):
                assert check(entry, work)[0] == ""
                checked.append(entry.name)
    assert "by hand" in checked and "ours default" in checked
    assert ("MLX fused" in checked) == (name in ("plain", "boolean mask", "sinks", "training"))


@pytest.mark.parametrize("name", ["training", "training with a softcap"])
def test_training_runs_our_backward_kernels(name: str) -> None:
    (kernel,) = kernels(ROWS[name], get_device("simulator"), None).values()
    assert isinstance(kernel, Kernel)
    assert kernel.backward == "metalgen"
    assert [s.family for s in kernel.backward_schedules] == ["backward_rows", "backward_keys"]


def test_layers_of_all_four_ways_agree() -> None:
    work = Work(AttentionConfig(32, "float32"), 2, 4, 30, 30, "layer")
    row = measure(work, layer_entries(work, REFERENCE), replace(QUICK, rounds=1))
    names = ["by hand", "nn.MultiHeadAttention", "MLX fused", "ours"]
    assert [(r.name, r.status) for r in row.results] == [(name, "ok") for name in names]
    assert all(r.seconds and r.peak_bytes > 0 for r in row.results)


def test_caches_hold_what_their_layouts_hold() -> None:
    """Of 4,096 places 512 live, in pages of 128: 16 MiB dense and 2 MiB paged, as published."""
    config = AttentionConfig(128, causal=True)
    work = Work(config, 1, 8, 16, 512, "cache", capacity=4096, page_size=128)
    simulator = get_device("simulator")
    entries = cache_entries(work, simulator, None)
    sizes = {e.name: e.cache_bytes for e in entries if isinstance(e, Entry)}
    assert sizes["dense"] == 16 << 20
    assert sizes["paged"] == 2 << 20
    assert sizes["8 bits"] == (8 << 20) + (16 << 20) // 32
    read = {e.name: e.live_bytes for e in entries if isinstance(e, Entry)}
    assert read["dense"] == read["paged"] == work.kv_bytes == 2 << 20
    assert read["4 bits"] == (2 << 20) / 4 + (2 << 20) / 32
    small = replace(work, kv_len=100, capacity=160, page_size=32)
    for entry in cache_entries(small, simulator, None):
        assert isinstance(entry, Entry)
        assert check(entry, small)[0] == "", entry.name


def test_another_package_is_checked_like_any_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    found = foreign_entries(PLAIN, ("mlx-mfa",))
    assert found == [Absent("mlx-mfa", "mlx_mfa is not installed")]
    module = types.ModuleType("mlx_mfa")
    module.__spec__ = importlib.machinery.ModuleSpec("mlx_mfa", None)

    def flash_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, causal: bool) -> Any:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale * module.error)  # type: ignore[attr-defined]

    module.flash_attention = flash_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlx_mfa", module)
    for error, right in ((1.0, True), (1.5, False)):
        module.error = error  # type: ignore[attr-defined]
        (entry,) = foreign_entries(PLAIN, ("mlx-mfa",))
        assert isinstance(entry, Entry)
        assert (check(entry, PLAIN)[0] == "") == right
    with pytest.raises(ArgumentError, match="--against: expected one of mlx-mfa, torch, flex"):
        foreign_entries(PLAIN, ("xformers",))


def test_predictions_and_counts_are_no_measurements() -> None:
    work = Work(AttentionConfig(64, causal=True), 1, 8, 1024, 1024)
    row = modelled(work, get_chip("M3Max"))
    by_name = {r.name: r for r in row.results}
    best, default = by_name["ours, best modelled"].seconds, by_name["ours default"].seconds
    assert best is not None and default is not None and best <= default
    assert by_name["MLX fused"].seconds
    assert {r["provenance"] for r in row.to_dict()["results"]} == {"modelled"}
    capped = replace(work, config=AttentionConfig(64, softcap=50.0))
    assert modelled(capped, get_chip("M3Max")).results[-1].seconds is None
    assert "too many" in counted(replace(work, q_len=8192, kv_len=8192)).counts.detail


def test_counts_of_a_call_are_those_of_its_tiles() -> None:
    """64 queries, 64 keys, D=64: two products of 8 x 8 x 8 tiles a head."""
    row = counted(Work(AttentionConfig(64), 1, 2, 128, 64))
    assert row.counts.products == 2 * 2 * (128 // 8) * (64 // 8) * (64 // 8)
    assert row.counts.findings == 0


def test_the_table_has_a_line_for_each_entry() -> None:
    done = Result("ours", "ok", samples=(1e-3, 1e-3, 1.1e-3))
    row = Row(PLAIN, [done, Result("torch", "absent", "not installed")])
    header, ours, torch = csv_text([row]).splitlines()
    cells = dict(zip(header.split(","), ours.split(","), strict=True))
    assert cells["milliseconds"] == "1" and cells["q_len"] == "24" and cells["status"] == "ok"
    assert np.isclose(float(cells["tflops"]), PLAIN.operations / 1e-3 / 1e12)
    assert "absent" in torch


def test_more_effort_means_more_sets() -> None:
    assert Effort().sets(1 << 20) == 16
    assert Effort().sets(1 << 30) == 3
