"""Counts of other people's kernels, by hand."""

from __future__ import annotations

import pytest

from metalgen.chips import get_chip
from metalgen.chips.adapters import Tile, mfa_work, mlx_work
from metalgen.chips.work import REGISTERS

M1_MAX, M4 = get_chip("M1Max"), get_chip("M4")
TILE = Tile("fwd", False, 8192, 64, 32, 64, 32, False, True)


def test_a_forward_tile_on_m1_stages_its_keys_and_pages_its_queries() -> None:
    work = mfa_work(TILE, M1_MAX)
    passes = 256 * 128  # of groups; each has 4 simdgroups
    assert (work.groups, work.simdgroups) == (256, 4)
    assert work.products == passes * 4 * 2 * 8 * 8  # two products of 8 x 8 fragments of 8 x 8
    assert work.exponentials == passes * 4 * 2 * 8
    assert work.slices == passes * 2 * 2  # two products, two blocks of 32 columns
    assert work.paged == passes * 4 * 8  # the 8 fragments of Q, each pass
    assert work.direct_bytes == 0
    assert work.threadgroup_memory == 64 * 32 * 4
    # Rows of 256 bytes, half a row at a time: one line each. K and V, 64 rows, two blocks.
    assert work.other_bytes == passes * 2 * 64 * 2 * 128 + work.paged * 256
    assert work.register_limit == 104


def test_a_forward_tile_on_m4_reads_its_keys_directly_and_stages_its_queries() -> None:
    work = mfa_work(TILE._replace(rows=16, keys=128, columns=16), M4)
    passes = 512 * 64
    assert work.simdgroups == 2
    assert work.direct_bytes == work.products * 64 * 4
    assert work.slices == passes * 4  # four blocks of Q
    assert work.paged == 0
    assert work.register_limit == REGISTERS


@pytest.mark.parametrize(("kernel", "gemms"), [("fwd", 2), ("bwd_dQ", 3), ("bwd_dKV", 4)])
def test_backward_kernels_do_their_products(kernel: str, gemms: int) -> None:
    work = mfa_work(TILE._replace(kernel=kernel), M1_MAX)
    assert work.products == gemms * 8192 * 8192 * 64 / 512


def test_what_is_cached_is_not_paged() -> None:
    assert mfa_work(TILE._replace(cache_inputs=True), M1_MAX).paged == 0
    paged = mfa_work(TILE._replace(cache_outputs=False), M1_MAX).paged
    assert paged == 256 * 128 * 4 * 8 * 3  # Q is loaded, O loaded and stored


def test_rows_that_do_not_fill_cache_lines_touch_more_of_them() -> None:
    whole = mfa_work(TILE._replace(head_dim=128, cache_inputs=True), M1_MAX)
    ragged = mfa_work(TILE._replace(head_dim=120, cache_inputs=True), M1_MAX)
    # 480 bytes a row in pieces of 128, 128, 128 and 96; rows start 0, 96, 64 and 32 bytes into a
    # line, where all pieces but the first row's, and the last of the fourth, straddle two.
    lines = (4 + 8 + 8 + 7) / 4
    assert ragged.other_bytes / whole.other_bytes == pytest.approx(lines / 4)


def test_mlx_reads_each_key_once_for_32_rows() -> None:
    work = mlx_work(64, False, 32, 2048, 2048)
    assert work.groups == 32 * 64
    assert work.products == 32 * 2 * 2048 * 2048 * 64 / 512
    assert work.other_bytes == 32 * (64 * 2 * 2048 + 2 * 2048) * 64 * 2
    causal = mlx_work(64, True, 32, 2048, 2048)
    assert causal.products == work.products * 65 / 128  # n of 64 passes for the n-th 32 rows
