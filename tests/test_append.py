"""Cache append against numpy loops, float64 rotation, mx.fast.rope and mx.quantize."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen.devices
from metalgen import simulator
from metalgen.append.launch import kernel_rows, plain_rows
from metalgen.append.samples import sample_rows
from metalgen.devices import get_device
from metalgen.errors import InvalidSchedule
from metalgen.families import Schedule
from metalgen.families.append import append_schedule, operands
from metalgen.ops.append import append_kv
from metalgen.problem.config import AttentionConfig
from metalgen.problem.rope import Rope
from metalgen.source.render import render

DTYPES = ("float32", "float16", "bfloat16")
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Largest relative distance of a number from its neighbour."""


def normal(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))


def wide(x: mx.array) -> Any:
    return np.array(x.astype(mx.float32), dtype=np.float64)


def same(x: mx.array, y: mx.array) -> bool:
    """Whether two arrays are equal bit for bit."""
    return x.shape == y.shape and bool(mx.array_equal(x.view(mx.uint8), y.view(mx.uint8)))


def arrays(cache: Any) -> Iterator[mx.array]:
    for part in cache:
        yield from part if isinstance(part, tuple) else (part,)


def quantize(x: mx.array, group: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """MLX's definition; its GPU kernels break ties, and take groups below 0, in another way."""
    words, scales, biases = mx.quantize(x, group, bits, stream=mx.cpu)
    return words, scales, biases


def rotated(x: Any, freqs: Any, positions: Any, style: str) -> Any:
    """Su et al. 2021 in float64, from float32 angles; x (B, H, T, D), positions (B, T)."""
    angle = (positions.astype(np.float32)[..., None] * freqs.astype(np.float32)).astype(np.float64)
    out = np.array(x)
    for c in range(len(freqs)):
        one, other = (c, c + len(freqs)) if style == "half" else (2 * c, 2 * c + 1)
        cos, sin = np.cos(angle[:, None, :, c]), np.sin(angle[:, None, :, c])
        out[..., one] = x[..., one] * cos - x[..., other] * sin
        out[..., other] = x[..., one] * sin + x[..., other] * cos
    return out


def owners(cu: list[int], tokens: int) -> list[tuple[int, int] | None]:
    """Of each packed token: its sequence and its number there."""
    found: list[tuple[int, int] | None] = [None] * tokens
    for n in range(len(cu) - 1):
        for token in range(cu[n], cu[n + 1]):
            found[token] = (n, token - cu[n])
    return found


class TestRotation:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("style", ["half", "pairs"])
    @pytest.mark.parametrize(("width", "dims"), [(64, None), (36, 10)])
    def test_keys_turn_as_in_float64(
        self, device: str, dtype: str, style: str, width: int, dims: int | None
    ) -> None:
        offset = [3, 1000, 0]
        k = normal((3, 7, 2, width), dtype, 1).swapaxes(1, 2)
        v = normal((3, 2, 7, 8), dtype, 2)
        cache = (mx.zeros((3, 2, 1010, width), k.dtype), mx.zeros((3, 2, 1010, 8), k.dtype))
        rope = Rope(dims, style=style)
        keys, values = append_kv(cache, k, v, offset=mx.array(offset), rope=rope, device=device)
        turned = dims or width
        freqs = np.array([10000.0 ** (-2 * c / turned) for c in range(turned // 2)])
        positions = np.array(offset)[:, None] + np.arange(7)
        expected = rotated(wide(k), freqs, positions, style)
        for n, start in enumerate(offset):
            got = wide(keys)[n, :, start : start + 7]
            pair = np.abs(wide(k)[n]).max()  # one rounding to the type, a few in float32 before
            bound = 0.51 * EPSILON[dtype] * np.abs(expected[n]) + 4 * 2.0**-23 * pair
            assert (np.abs(got - expected[n]) <= bound).all()
            assert (got[..., turned:] == wide(k)[n, ..., turned:]).all()
            assert (wide(values)[n, :, start : start + 7] == wide(v)[n]).all()

    @pytest.mark.parametrize("style", ["half", "pairs"])
    @pytest.mark.parametrize("periods", [False, True])
    def test_keys_turn_as_mx_fast_rope_turns_them(
        self, device: str, style: str, periods: bool
    ) -> None:
        k, v = normal((2, 3, 9, 64), seed=1), normal((2, 3, 9, 64), seed=2)
        cache = (mx.zeros((2, 3, 20, 64)), mx.zeros((2, 3, 20, 64)))
        freqs = mx.exp(normal((24,), seed=3)) * 20 if periods else None
        rope = Rope(48, freqs=freqs, style=style, scale=0.5, offset=mx.array([5, 70]))
        keys, _ = append_kv(cache, k, v, offset=4, rope=rope, device=device)
        expected = mx.fast.rope(
            k,
            48,
            traditional=style == "pairs",
            base=None if periods else 10000.0,
            scale=0.5,
            offset=mx.array([5, 70]),
            freqs=freqs,
        )
        np.testing.assert_allclose(np.array(keys)[:, :, 4:13], np.array(expected), atol=3e-5)

    def test_far_positions_keep_their_angle(self, device: str) -> None:
        k = normal((1, 1, 2, 8), seed=1)
        cache = (mx.zeros((1, 1, 2, 8)), mx.zeros((1, 1, 2, 8)))
        rope = Rope(offset=3_000_001)
        keys, _ = append_kv(cache, k, k, offset=0, rope=rope, device=device)
        freqs = np.array([10000.0 ** (-c / 4) for c in range(4)])
        positions = np.array([[3_000_001, 3_000_002]])
        expected = rotated(wide(k), freqs, positions, "half")
        np.testing.assert_allclose(np.array(keys), expected, atol=2e-6)


class TestQuantization:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("group", [32, 64, 128])
    def test_the_same_bits_as_mx_quantize_of_the_rotated_rows(
        self, device: str, dtype: str, bits: int, group: int
    ) -> None:
        k, v = normal((2, 2, 13, 128), dtype, 1), normal((2, 2, 13, 256), dtype, 2) * 100
        plain = (mx.zeros((2, 2, 13, 128), k.dtype), mx.zeros((2, 2, 13, 256), k.dtype))
        rows, _ = append_kv(plain, k, v, offset=0, rope=Rope(offset=50), device=device)
        assert not same(rows, k)  # type: ignore[arg-type]
        cache = tuple(quantize(x, group, bits) for x in plain)
        got = append_kv(cache, k, v, offset=0, rope=Rope(offset=50), device=device)  # type: ignore[arg-type]
        for part, x in zip(got, (rows, v), strict=True):
            for mine, theirs in zip(part, quantize(x, group, bits), strict=True):  # type: ignore[arg-type]
                assert same(mine, theirs)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bits", [4, 8])
    def test_the_same_bits_for_odd_groups(self, device: str, dtype: str, bits: int) -> None:
        """Constant, zero, one-sided, tiny and huge groups, an outlier, and values on ties."""
        rng = np.random.default_rng(0)
        uniform = rng.random(32)
        odd = [
            np.zeros(32),
            np.full(32, 3.0),
            np.full(32, -0.75),
            uniform + 5,
            -uniform - 5,
            uniform * 1e-6,
            uniform * 6e4 - 3e4,
            np.eye(32)[7] * 100,
            -np.eye(32)[9],
            np.arange(32) / 2 - 8,
            np.arange(32.0),
            np.where(np.arange(32) % 2, 1.0, -1.0),
        ]
        rows = np.stack([np.concatenate([x, y]) for x in odd for y in odd])
        k = mx.array(rows[None, None].astype(np.float32)).astype(getattr(mx, dtype))
        empty = quantize(mx.zeros_like(k), 32, bits)
        keys, values = append_kv((empty, empty), k, -k, offset=0, device=device)
        for got, x in ((keys, k), (values, -k)):
            for mine, theirs in zip(got, quantize(x, 32, bits), strict=True):  # type: ignore[arg-type]
                assert same(mine, theirs)

    def test_nan_and_infinity_stay_in_their_groups(self, device: str) -> None:
        k = normal((1, 1, 3, 96), "float16", 1)
        k[0, 0, 1, 40] = float("nan")
        k[0, 0, 2, 70] = float("inf")
        empty = quantize(mx.zeros_like(k), 32, 4)
        (words, scales, biases), _ = append_kv((empty, empty), k, k, offset=0, device=device)  # type: ignore[misc]
        back = np.array(mx.dequantize(words, scales, biases, 32, 4), dtype=np.float32)[0, 0]
        good = np.ones((3, 96), bool)
        good[1, 40] = good[2, 64:96] = False
        error = np.abs(back[good] - np.array(k, dtype=np.float32)[0, 0][good])
        assert (error < 0.5).all()


class TestDense:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_go_behind_the_offset_and_nowhere_else(self, device: str, dtype: str) -> None:
        cache = tuple(normal((2, 3, 20, width), dtype, width) for width in (40, 24))
        k, v = (normal((2, 3, 6, width), dtype, width + 1) for width in (40, 24))
        got = append_kv(cache, k, v, offset=9, device=device)  # type: ignore[arg-type]
        for old, new, mine in zip(cache, (k, v), got, strict=True):
            expected = mx.concatenate([old[:, :, :9], new, old[:, :, 15:]], axis=2)
            assert same(mine, expected)  # type: ignore[arg-type]

    def test_the_callers_arrays_stay_what_they_are(self, device: str) -> None:
        cache = (normal((1, 1, 8, 16), seed=1), normal((1, 1, 8, 16), seed=2))
        before = [np.array(x) for x in cache]
        k = normal((1, 1, 2, 16), seed=3)
        for offset in (3, mx.array([3])):
            mx.eval(*append_kv(cache, k, k, offset=offset, device=device))
            for x, y in zip(cache, before, strict=True):
                np.testing.assert_array_equal(np.array(x), y)

    @pytest.mark.parametrize("offset", [2, "ragged", "paged"])
    def test_stored_in_place_where_nothing_else_holds_the_cache(
        self, device: str, offset: Any
    ) -> None:
        if device != "simulator":
            pytest.skip(f"addresses are compared on the CPU, not on {device}")
        cache = tuple(quantize(normal((4, 2, 16, 32), "float16", n), 32, 4) for n in range(2))
        k = normal((1 if offset == "paged" else 4, 2, 3, 32), "float16", 4)
        given: dict[str, Any] = {"offset": offset}
        if offset == "ragged":
            given = {"offset": mx.array([0, 5, 9, 2])}
        if offset == "paged":
            given = {"offset": mx.array([14]), "block_table": mx.array([[1, 0]])}
        mx.eval(cache, k, *given.values()) if offset != 2 else mx.eval(cache, k)
        before = [_address(x) for x in arrays(cache)]
        cache = append_kv(cache, k, k, device=device, **given)  # type: ignore[arg-type]
        mx.eval(cache)
        assert [_address(x) for x in arrays(cache)] == before

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_each_entry_has_an_offset_of_its_own(self, device: str, dtype: str) -> None:
        """One beyond the end, one before the start, and one that runs off the end."""
        offset = [4, -2, 17, 30, -50]
        cache = tuple(normal((5, 2, 20, width), dtype, width) for width in (40, 24))
        k, v = (normal((5, 2, 6, width), dtype, width + 1) for width in (40, 24))
        got = append_kv(cache, k, v, offset=mx.array(offset), device=device)  # type: ignore[arg-type]
        for old, new, mine in zip(cache, (k, v), got, strict=True):
            expected = wide(old)
            for n, start in enumerate(offset):
                for row in range(6):
                    if 0 <= start + row < 19:
                        expected[n, :, start + row] = wide(new)[n, :, row]
            np.testing.assert_array_equal(wide(mine)[:, :, :19], expected[:, :, :19])  # type: ignore[arg-type]


def _address(x: mx.array) -> int:
    return int(np.array(x, copy=False).__array_interface__["data"][0])


class TestPages:
    PAGE = 8
    OFFSET = (5, 0, 15, 7)
    TABLE = ((3, 9, -1), (0, -1, -1), (6, 2, 8), (1, -1, 4))

    def expected(
        self, pages: Any, new: Any, places: list[tuple[int, int, int, int]], table: Any
    ) -> Any:
        """Pages with rows stored by a loop; places (batch entry, token, sequence, slot)."""
        out = np.array(pages)
        for entry, token, sequence, slot in places:
            if 0 <= slot < len(table[sequence]) * self.PAGE:
                page = table[sequence][slot // self.PAGE]
                if 0 <= page < len(out) - 1:
                    out[page, :, slot % self.PAGE] = new[entry, :, token]
        return out

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rope", [None, Rope(24, style="pairs")])
    def test_rows_go_to_the_pages_of_their_sequences(
        self, device: str, dtype: str, rope: Rope | None
    ) -> None:
        cache = tuple(normal((11, 2, self.PAGE, width), dtype, width) for width in (40, 24))
        k, v = (normal((4, 6, 2, width), dtype, width + 1).swapaxes(1, 2) for width in (40, 24))
        offset = mx.array(self.OFFSET)
        table = mx.array(self.TABLE)
        got = append_kv(cache, k, v, offset=offset, block_table=table, rope=rope, device=device)  # type: ignore[arg-type]
        rows = k
        if rope:
            dense = (mx.zeros((4, 2, 6, 40), k.dtype), mx.zeros((4, 2, 6, 24), k.dtype))
            own = Rope(24, style="pairs", offset=offset)
            rows = append_kv(dense, k, v, offset=0, rope=own, device=device)[0]  # type: ignore[assignment]
        places = [(n, i, n, start + i) for n, start in enumerate(self.OFFSET) for i in range(6)]
        for old, new, mine in zip(cache, (rows, v), got, strict=True):
            expected = self.expected(wide(old), wide(new), places, self.TABLE)
            np.testing.assert_array_equal(wide(mine)[:-1], expected[:-1])  # type: ignore[arg-type]

    @pytest.mark.parametrize("bits", [None, 4, 8])
    def test_packed_tokens_go_to_the_pages_of_their_sequences(
        self, device: str, bits: int | None
    ) -> None:
        """A sequence without tokens, one of one, tokens before the first and after the last."""
        cu = [2, 7, 7, 17, 18]
        pages = [normal((11, 2, self.PAGE, width), "float16", width) for width in (64, 32)]
        k, v = (normal((1, 2, 21, width), "float16", width + 1) for width in (64, 32))
        k = k.swapaxes(1, 2) + 0  # another layout
        k = k.swapaxes(1, 2)
        found = owners(cu, 21)
        places = [(0, i, o[0], self.OFFSET[o[0]] + o[1]) for i, o in enumerate(found) if o]
        cache = tuple(pages) if bits is None else tuple(quantize(x, 32, bits) for x in pages)
        new = (k, v) if bits is None else tuple(quantize(x, 32, bits) for x in (k, v))
        got = append_kv(
            cache,  # type: ignore[arg-type]
            k,
            v,
            offset=mx.array(self.OFFSET),
            block_table=mx.array(self.TABLE),
            cu_seqlens=mx.array(cu),
            device=device,
        )
        for old, x, mine in zip(arrays(cache), arrays(new), arrays(got), strict=True):
            before, after, rows = (np.array(y) for y in (old, mine, x))
            expected = self.expected(before, rows, places, self.TABLE)
            np.testing.assert_array_equal(after[:-1], expected[:-1])
            assert (before[:-1] != after[:-1]).any()

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("seed", range(3))
    def test_hostile_tables_overwrite_nothing_else(
        self, device: str, packed: bool, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        extreme = [-(2**31), 2**31 - 1, -1, 0, 3, 10, 11, 2**24]
        table = rng.choice(extreme, (4, 3)).astype(np.int32)
        offset = rng.choice([*extreme, 5, 17], 4).astype(np.int32)
        cu = np.array([0, 4, 9, 9, 20], np.int32)
        if packed and seed % 2:
            cu = rng.choice(extreme, 5).astype(np.int32)
        pages = [normal((11, 2, self.PAGE, 64), "float16", n) for n in range(2)]
        cache = tuple(quantize(x, 64, 8) for x in pages)
        k = normal((1 if packed else 4, 2, 20 if packed else 5, 64), "float16", 3)
        given = {"cu_seqlens": mx.array(cu)} if packed else {}
        with simulator.record(checked=True) as runs:
            got = append_kv(
                cache,  # type: ignore[arg-type]
                k,
                k,
                offset=mx.array(offset),
                block_table=mx.array(table),
                rope=Rope(),
                device=device,
                **given,
            )
            mx.eval(got)
        for run in runs:
            assert run.findings is not None
            assert not list(run.findings), run.findings.report()
        if packed and seed % 2:
            allowed = {int(page) for page in table.flat}  # whoever owns a token, only these pages
        else:
            found = owners(cu.tolist(), 20) if packed else [(n // 5, n % 5) for n in range(20)]
            allowed = set()
            for o in found:
                slot = int(offset[o[0]]) + o[1] if o else -1
                if o and 0 <= slot < 24:
                    allowed.add(int(table[o[0], slot // self.PAGE]))
        for old, mine in zip(arrays(cache), arrays(got), strict=True):
            before, after = np.array(old), np.array(mine)
            kept = [page for page in range(10) if page not in allowed]
            assert kept
            np.testing.assert_array_equal(after[kept], before[kept])

    def test_where_no_row_has_a_page_all_pages_but_the_spare_one_stay(self, device: str) -> None:
        cache = tuple(normal((5, 2, self.PAGE, 16), "float16", n) for n in range(2))
        k = normal((2, 2, 3, 16), "float16", 3)
        table = mx.full((2, 2), -1, mx.int32)
        offset = mx.array([0, 3])
        got = append_kv(cache, k, k, offset=offset, block_table=table, device=device)  # type: ignore[arg-type]
        for old, mine in zip(cache, got, strict=True):
            assert same(mine[:-1], old[:-1])  # type: ignore[index, arg-type]


CONFIGS = [
    AttentionConfig(64, "float16", rope="half"),
    AttentionConfig(40, "float32", value_head_dim=24, kv_lens=True),
    AttentionConfig(72, "bfloat16", kv_lens=True, rope="pairs", rope_dims=20),
    AttentionConfig(64, "float16", value_head_dim=128, kv_bits=4),
    AttentionConfig(64, "float16", kv_bits=8, value_bits=4, value_group=32, rope="half"),
    AttentionConfig(96, "float32", kv_bits=8, kv_group=32, rope="half", rope_dims=64),
    AttentionConfig(128, "float16", page_size=16, kv_bits=4, kv_group=128, rope="half"),
    AttentionConfig(64, "bfloat16", page_size=8, varlen=True, kv_bits=8, rope="pairs"),
    AttentionConfig(576, "float16", value_head_dim=512, page_size=32, varlen=True),
    AttentionConfig(64, "float32", rope="half", rope_tables=True),
    AttentionConfig(
        72, "float16", varlen=True, page_size=8, rope="pairs", rope_dims=20, rope_tables=True
    ),
]


class TestKernel:
    @pytest.mark.parametrize(
        ("config", "schedule"),
        [
            *((config, append_schedule()) for config in CONFIGS),
            *((CONFIGS[n], append_schedule(32, 1)) for n in (0, 5)),
            *((CONFIGS[n], append_schedule(256, 4)) for n in (2, 6)),
            *((CONFIGS[n], append_schedule(128, 32)) for n in (1, 3)),
        ],
        ids=str,
    )
    def test_makes_the_rows_and_places_of_plain_mlx(
        self, device: str, config: AttentionConfig, schedule: Schedule
    ) -> None:
        given = sample_rows(config, seed=3)
        with simulator.record(checked=True) as runs:
            got = kernel_rows(config, get_device(device), schedule)(given)
            mx.eval(got)
        for run in runs:
            assert run.findings is not None
            assert not list(run.findings), run.findings.report()
        expected = plain_rows(config, given)
        assert got.keys() == expected.keys()
        for name, array in got.items():
            assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype)
            if name.startswith("v_") or name == "places" or config.rope is None:
                if device == "simulator" or config.kv_bits is None:
                    assert same(array, expected[name])
            elif name == "k_rows":
                bound = 2 * EPSILON[config.dtype]
                np.testing.assert_allclose(wide(array), wide(expected[name]), bound, 4e-6)

    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    def test_reads_and_writes_each_row_once(
        self, config: AttentionConfig, the_simulator: str
    ) -> None:
        given = sample_rows(config, seed=3)
        with simulator.record(checked=True) as runs:
            got = kernel_rows(config, get_device(the_simulator), append_schedule())(given)
        counters = runs[0].counters
        assert counters is not None
        for name in operands(config):
            assert counters.buffer(name).bytes_read == given[name].nbytes
        for name, array in got.items():
            assert counters.buffer(name).bytes_written == array.nbytes
        names = {b.name for b in counters.buffers if b.bytes_read} - {"k", "v"}
        assert names <= {
            *(x for x in given if x not in "kv"),
            *(f"{x}_{y}" for x in given for y in ("shape", "strides")),
        }

    def test_nothing_waits_on_the_way_of_a_metal_call(self) -> None:
        """MLX traces the Metal launch on any machine; a look at contents would fail there."""
        config = AttentionConfig(64, "float16", page_size=16, varlen=True, kv_bits=4, rope="half")
        given = sample_rows(config)
        metal = {d.name: d for d in metalgen.devices.all_devices()}["metal"]
        make = kernel_rows(config, metal, append_schedule())
        seen: list[str] = []

        def callback(event: dict[str, Any]) -> None:
            seen.append(event.get("name", ""))

        def call(*arrays: mx.array) -> list[mx.array]:
            return list(make(dict(zip(given, arrays, strict=True))).values())

        mx.export_function(callback, call, *given.values())
        assert "CustomKernel" in seen

    def test_plain_mlx_is_lazy(self) -> None:
        """Tracing gives the graph; a look at contents would fail in it."""
        cache = (mx.zeros((2, 2, 9, 16)), mx.zeros((2, 2, 9, 16)))
        seen: list[str] = []

        def call(keys: mx.array, values: mx.array, x: mx.array, offset: mx.array) -> Any:
            rope = Rope(offset=offset)
            return append_kv((keys, values), x, x, offset=offset, rope=rope, device="reference")

        def callback(event: dict[str, Any]) -> None:
            seen.append(event.get("name", ""))

        k = normal((2, 2, 3, 16), seed=1)
        mx.export_function(callback, call, *cache, k, mx.array([1, 4]))
        assert seen.count("Scatter") == 2

    @pytest.mark.parametrize("target", ["metal", "cuda"])
    def test_every_config_renders_for_every_target(self, target: str) -> None:
        foreign = {"metal": ("__shared__", "blockIdx"), "cuda": ("threadgroup", "simd_")}[target]
        for config in CONFIGS:
            source = render(config, append_schedule(language=target))
            assert source.text.isascii()
            assert not [word for word in foreign if word in source.text]
            assert source.source.count("{") == source.source.count("}")

    def test_a_schedule_of_too_much_threadgroup_memory_is_refused(self) -> None:
        config = AttentionConfig(64, "float32", kv_bits=4)
        with pytest.raises(InvalidSchedule, match="threadgroup memory"):
            render(config, append_schedule(1024, 64))

    def test_a_kernel_that_is_wrong_gives_way_to_plain_mlx_with_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, the_simulator: str
    ) -> None:
        from metalgen.append import launch

        def wrong(*_: Any) -> Any:
            return lambda given: {"k_rows": given["k"]}  # never turned

        monkeypatch.setattr(launch, "kernel_rows", wrong)
        launch.row_maker.cache_clear()
        cache = (mx.zeros((1, 1, 4, 8)), mx.zeros((1, 1, 4, 8)))
        k = normal((1, 1, 2, 8), seed=1)
        try:
            with pytest.warns(RuntimeWarning, match="plain MLX.*rows of k are wrong"):
                keys, _ = append_kv(cache, k, k, offset=1, rope=Rope(), device=the_simulator)
        finally:
            launch.row_maker.cache_clear()
        expected, _ = append_kv(cache, k, k, offset=1, rope=Rope(), device="reference")
        assert same(keys, expected)  # type: ignore[arg-type]
