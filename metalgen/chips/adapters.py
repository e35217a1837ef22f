"""Counts of other people's kernels, as `Work`: the model itself knows no kernel.

What is counted follows from the kernels' public sources; instructions, registers and reloads are
estimates. Nothing of those sources is part of this project.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from metalgen.chips.chip import Chip
from metalgen.chips.counts import pass_sums
from metalgen.chips.work import REGISTERS, Work
from metalgen.schedule import FRAGMENT

LINE = 128
"""Bytes of a cache line."""
OCCUPANCY_REGISTERS = 104
"""16-bit registers a thread under metal-flash-attention's bound of 1024 threads a threadgroup, on
chips that hand out registers at launch (metal-benchmarks: 52 32-bit registers)."""


class Tile(NamedTuple):
    """One configuration of a metal-flash-attention kernel.

    Args:
        kernel: ``"fwd"``, ``"bwd_dQ"`` or ``"bwd_dKV"``.
        half: 16-bit inputs and intermediates ("mixed"); else all float32.
        length: queries, and keys, of one head.
        head_dim: a multiple of 8.
        rows: rows that a threadgroup keeps, 8 for each simdgroup.
        keys: rows of the other side a pass.
        columns: of the head dimension at once.
        cache_inputs, cache_outputs: what stays in registers over all passes.
    """

    kernel: str
    half: bool
    length: int
    head_dim: int
    rows: int
    keys: int
    columns: int
    cache_inputs: bool
    cache_outputs: bool


MFA_PRODUCTS = {"fwd": (1, 1), "bwd_dQ": (2, 1), "bwd_dKV": (2, 2)}
"""Products S = A B^T, whose left side is an input, and products C += S B, which are outputs."""


def mfa_work(tile: Tile, chip: Chip) -> Work:
    """The work of a metal-flash-attention kernel, version 2, one head.

    Where the chip reads directly (M3 and later) its right-hand operands come from device memory,
    and what is not cached goes through threadgroup memory; on M1 and M2 it is the other way round.
    """
    t, direct = tile, chip.direct_reads
    scores, outputs = MFA_PRODUCTS[t.kernel]
    gemms = scores + outputs
    forward, query, key_value = (t.kernel == name for name in MFA_PRODUCTS)
    item = 2 if t.half else 4
    rows, keys, columns = t.rows, t.keys, min(t.columns, t.head_dim)
    wide, fragments, blocks = t.head_dim // FRAGMENT, keys // FRAGMENT, -(-t.head_dim // columns)
    simdgroups = rows // FRAGMENT
    groups = -(-t.length // rows)
    passes = groups * t.length / keys
    live = passes * simdgroups
    products = live * gemms * fragments * wide

    # 16-bit registers a thread: a float32 fragment takes 4. dO and all accumulators are float32
    # in registers; Q, K, V, S and P are 16-bit ones where inputs are.
    fragment = 2 if t.half else 4
    inputs = {"fwd": fragment, "bwd_dQ": fragment + 4, "bwd_dKV": 2 * fragment}[t.kernel]
    one_input = 4 if query else fragment
    kept = wide if t.cache_inputs else 0
    registers = 48.0
    registers += inputs * wide if t.cache_inputs else one_input * columns // FRAGMENT
    registers += 4 * (outputs * wide if t.cache_outputs else columns // FRAGMENT)
    # S becomes P in place, and dS needs P and dP. With direct reads there is no barrier between
    # the two products of the forward pass: S of one overlaps with P of the other.
    registers += fragments * (fragment * (2 if forward and direct else 1))
    registers += 0 if forward else 4 * fragments

    # The compiler may not keep an array in registers that a rolled loop indexes: dO, when its sum
    # with O is formed, lives in memory if it is cached. It is read for every product with it.
    # (Inputs of up to 40 bytes a thread seem to be unrolled.)
    array = 4 * kept if query and inputs * wide > 20 else 0
    reloads = live * array * fragments
    registers -= array
    if direct:
        limit, uses = REGISTERS, gemms * fragments
    else:  # barriers between the blocks: what has no room is stored and loaded once a block
        limit, uses = OCCUPANCY_REGISTERS, 2 if forward else 1
        registers = max(registers, float(limit))  # what is left, loads ahead of their use take

    # Slices that a group copies to or from threadgroup memory, and the cache lines that they touch.
    lines = _lines(t.head_dim, columns, item)
    page_ins, page_outs = 0 if t.cache_inputs else scores, 0 if t.cache_outputs else outputs
    if direct:
        # An accumulator is fetched, and written back behind two barriers.
        slices = passes * blocks * (page_ins + 3 * page_outs)
        copied = passes * rows * (page_ins * lines + 2 * page_outs * _lines(t.head_dim, columns, 4))
        direct_bytes = products * FRAGMENT * FRAGMENT * item
        on_core = direct_bytes + 2 * LINE * copied
        paged = paged_bytes = 0.0
        memory = rows * columns * 4 if slices else 0
    else:
        slices = passes * (blocks * gemms + (2 if key_value else 0))  # L and D are staged too
        copied = passes * keys * gemms * lines
        direct_bytes = 0.0
        on_core = products * FRAGMENT * FRAGMENT * item + LINE * copied
        paged = live * wide * (page_ins + 2 * page_outs)
        paged_bytes = live * wide * (page_ins * 64 * item + 2 * page_outs * 256)
        memory = keys * columns * item

    # An element of S, two a lane and fragment: maximum, FMA, exp2, sum and conversion; backwards
    # also the derivative, and where keys and values are updated L and D are loaded with it.
    per_element = {"fwd": 4, "bwd_dQ": 4, "bwd_dKV": 5}[t.kernel]
    elements = 2 * live * fragments
    # The right side of S is transposed: its two elements a lane are loaded one by one, each with
    # an address of its own.
    loads = live * wide * fragments * (2 * scores + outputs)
    arithmetic = elements * per_element + loads + (2 * live * wide if forward else 0)
    array_bytes = t.length * t.head_dim * item
    return Work(
        groups=groups,
        simdgroups=simdgroups,
        registers=int(registers),
        register_limit=limit,
        threadgroup_memory=memory,
        products=products,
        exponentials=elements,
        shuffles=live * 4 if forward else 0.0,
        moves=loads + paged,
        arithmetic=arithmetic,
        wide=not t.half,
        spill_uses=live * uses,
        reloads=reloads,
        paged=paged,
        loop=0.0,
        on_core_bytes=on_core,
        direct_bytes=direct_bytes,
        other_bytes=LINE * copied + paged_bytes,
        distinct_bytes=(2 + gemms) * array_bytes,
        reused_bytes=2 * array_bytes,
        heads=1,
        slices=slices,
        reads=0.0,
        two_buffers=False,
        masked=0.0,
        longest=1.0,
    )


@functools.lru_cache(maxsize=1024)
def _lines(width: int, columns: int, item: int) -> float:
    """Cache lines that slices of `columns` of a row touch, all slices of a row, mean over rows."""
    pitch = width * item
    if columns >= width:  # whole rows lie one behind the other
        return pitch / LINE
    rows = LINE // math.gcd(LINE, pitch)
    touched = 0
    for start in range(0, width, columns):
        size = min(columns, width - start) * item
        offsets = ((row * pitch + start * item) % LINE for row in range(rows))
        touched += sum(-(-(offset + size) // LINE) for offset in offsets)
    return touched / rows


MLX_PASS = {
    # head dimension: keys a pass, then of a simdgroup and pass: 16-bit registers, loads from
    # threadgroup memory, other loads and stores, arithmetic. Counted in code of Mesa's compiler for
    # M1 and M2 (at D=128 the last two are what remains of 751 instructions).
    64: (32, 156, 144, 34, 393),
    128: (16, 180, 160, 34, 430),
}
"""MLX's attention kernel before M5: 32 rows, 4 simdgroups, 16-bit inputs, float32 fragments."""


def mlx_work(head_dim: int, causal: bool, batch_heads: int, q_len: int, kv_len: int) -> Work:
    """The work of MLX's own attention kernel in half precision, for head dimensions 64 and 128."""
    bk, registers, loads, others, arithmetic = MLX_PASS[head_dim]
    passes = batch_heads * pass_sums(q_len, kv_len, 32, bk, None, 0 if causal else None)[0]
    groups = batch_heads * -(-q_len // 32)
    live = 4 * passes  # it skips whole groups only
    row = 2 * head_dim
    tile = passes * bk * row * 2
    q_bytes = batch_heads * q_len * row
    return Work(
        groups=groups,
        simdgroups=4,
        registers=registers,
        threadgroup_memory=32 * (row + 16) + max((bk + 8) * row, bk * (row + 16)),
        products=live * 2 * bk // 8 * head_dim // 8,
        exponentials=live * (2 * bk // 8 + 1),
        shuffles=live * 16,
        moves=live * (loads + others),
        arithmetic=live * arithmetic,
        wide=False,
        spill_uses=live * bk // 8,
        reloads=0.0,
        paged=0.0,
        loop=720,
        on_core_bytes=live * loads * 64 + tile,
        direct_bytes=0,
        other_bytes=tile + 2 * q_bytes,
        distinct_bytes=batch_heads * kv_len * row * 2 + 2 * q_bytes,
        reused_bytes=kv_len * row * 2,
        heads=batch_heads,
        slices=2 * passes,
        reads=0,
        masked=0.0,
        two_buffers=False,
        longest=-(-kv_len // bk) * groups / passes,
    )
