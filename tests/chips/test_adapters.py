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
    # 480 bytes a row in pieces of 128, 128, 128 and 96, from 0 or 32 bytes into a half line of 64:
    # 2 each, or 3, 3, 3 and 2.
    halves = (8 + 11) / 2
    assert ragged.other_bytes / whole.other_bytes == pytest.approx(halves / 8)


def test_what_follows_a_loop_over_blocks_keeps_all_that_stays_the_same_in_registers() -> None:
    def registers(head_dim: int) -> int:
        backward = TILE._replace(kernel="bwd_dKV", head_dim=head_dim, cache_outputs=False)
        return mfa_work(backward, M1_MAX).registers

    # 16, half a register a column, S and dP of 8 fragments; a block of 4 fragments of K or V and
    # one of dV or dK in the loop; and behind it those of K, V, dV and dK that are left.
    assert registers(128) == 16 + 16 + 64 + 4 * 4 + 4 * 4
    assert registers(120) == registers(128) + 3 * 4 * 4
    assert registers(56) == 16 + 16 + 64 + 7 * 4 * 4  # no loop at all
    assert mfa_work(TILE._replace(head_dim=56), M1_MAX).paged == 0  # Q is loaded once


def test_an_array_that_a_loop_indexes_is_in_memory() -> None:
    tile = TILE._replace(kernel="bwd_dQ", rows=16, keys=128, columns=16)
    assert mfa_work(tile, M4).array == 0
    cached = mfa_work(tile._replace(cache_inputs=True), M4)
    assert cached.array == 8 * 4  # dO, in float32
    assert cached.reloads == 512 * 64 * 2 * cached.array * 16  # at each of 16 products
    # 24 fragments of O and 16 of keys are too many to unroll, 20 of O are not.
    wide = TILE._replace(rows=16, keys=128, columns=16, head_dim=192)
    assert mfa_work(wide, M4).array == 24 * 4
    assert mfa_work(wide._replace(head_dim=160), M4).array == 0


def test_a_padded_edge_of_keys_is_a_branch_between_products() -> None:
    even, odd = (mfa_work(TILE._replace(keys=keys), M1_MAX) for keys in (64, 80))
    assert even.products == odd.products
    passes = 256 * 8192 / 80 * 4  # of simdgroups
    branches = passes * (8 + 2)  # 8 slices of Q and K by 8, two blocks of V
    outside = passes * 2 * 8  # the correction of O, once a pass
    outside_even = 256 * 128 * 4 * 2 * 8
    assert odd.arithmetic - outside - 10 * branches == pytest.approx(even.arithmetic - outside_even)


def test_mlx_reads_each_key_once_for_32_rows() -> None:
    work = mlx_work(64, False, 32, 2048, 2048)
    assert work.groups == 32 * 64
    assert work.products == 32 * 2 * 2048 * 2048 * 64 / 512
    assert work.other_bytes == 32 * (64 * 2 * 2048 + 2 * 2048) * 64 * 2
    causal = mlx_work(64, True, 32, 2048, 2048)
    assert causal.products == work.products * 65 / 128  # n of 64 passes for the n-th 32 rows
