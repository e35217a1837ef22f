"""Counts of other people's kernels, as `Work`: the model itself knows no kernel.

What is counted follows from the kernels' public sources; instructions, registers and reloads are
estimates. Nothing of those sources is part of this project.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from metalgen.chips.chip import Chip
from metalgen.chips.work import REGISTERS, Work
from metalgen.families.counts import pass_sums
from metalgen.kinds.base import FRAGMENT

LINE, SECTOR = 128, 64
"""Bytes of a cache line, and of the half lines that copies into threadgroup memory ask for."""
OCCUPANCY_REGISTERS = 104
"""16-bit registers a thread under metal-flash-attention's bound of 1024 threads a threadgroup, on
chips that hand out registers at launch (metal-benchmarks: 52 32-bit registers)."""
UNROLLED = 340
"""Products to which a compiler unrolls a loop that asks to be unrolled fully: Clang stops at 16,384
instructions of its own, and the tables jump between 320 and 384 products."""
BRANCH = 10
"""Issue cycles of a branch between products, which no load crosses. A guess."""
AHEAD = 48
"""16-bit registers for loads ahead in a loop that is unrolled fully and holds no barrier. A guess,
as are the 16 and half a register a column below: by the tiles from which on measured rates fall."""


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
    forward, key_value = t.kernel == "fwd", t.kernel == "bwd_dKV"
    item = 2 if t.half else 4
    rows, keys, columns = t.rows, t.keys, min(t.columns, t.head_dim)
    wide, fragments, blocks = t.head_dim // FRAGMENT, keys // FRAGMENT, -(-t.head_dim // columns)
    simdgroups = rows // FRAGMENT
    groups = -(-t.length // rows)
    passes = groups * t.length / keys
    live = passes * simdgroups
    products = live * gemms * fragments * wide

    held = _held(t, direct)
    page_ins = 0.0 if t.cache_inputs else scores * (1 - held.straight / wide)
    page_outs = 0 if t.cache_outputs else outputs

    # Slices that a group copies to or from threadgroup memory, and fragments that simdgroups page.
    if direct:
        # An accumulator is fetched, and written back behind two barriers.
        slices = passes * blocks * (page_ins + 3 * page_outs)
        copied = passes * rows * page_ins * _touched(t.head_dim, columns, item, SECTOR)
        copied += passes * rows * 2 * page_outs * _touched(t.head_dim, columns, 4, SECTOR)
        direct_bytes = products * FRAGMENT * FRAGMENT * item
        on_core = passes * rows * t.head_dim * (page_ins * item + 2 * page_outs * 4)
        on_core = direct_bytes + 2 * on_core
        paged = paged_bytes = 0.0
        memory = rows * columns * 4 if slices else 0
    else:
        slices = passes * (blocks * gemms + (2 if key_value else 0))  # L and D are staged too
        copied = passes * keys * gemms * _touched(t.head_dim, columns, item, SECTOR)
        direct_bytes = 0.0
        on_core = (products * FRAGMENT * FRAGMENT + passes * keys * gemms * t.head_dim) * item
        paged = live * wide * (page_ins * item / 4 + 2 * page_outs)
        touched = page_ins * _touched(t.head_dim, columns, item, LINE)
        touched += 2 * page_outs * _touched(t.head_dim, columns, 4, LINE)
        paged_bytes = live * FRAGMENT * touched
        memory = keys * columns * item

    # An element of S, two a lane and fragment: maximum, FMA, exp2, sum and conversion; backwards
    # also the derivative, and where keys and values are updated L and D are loaded with it.
    per_element = {"fwd": 4, "bwd_dQ": 4, "bwd_dKV": 5}[t.kernel]
    elements = 2 * live * fragments
    # Loads, their addresses and waits. By the tables an output product costs 1.1 to 1.3 times a
    # product S, though S reads its right side transposed, element by element.
    loads = live * wide * fragments * (scores + 3 * outputs)
    arithmetic = elements * per_element + loads + (2 * live * wide if forward else 0)
    if not direct and t.length % keys:  # the padded edge is a branch in the midst of each block
        arithmetic += BRANCH * live * (scores * wide + outputs * blocks)
    array_bytes = t.length * t.head_dim * item
    return Work(
        groups=groups,
        simdgroups=simdgroups,
        registers=int(held.registers),
        register_limit=REGISTERS if direct else OCCUPANCY_REGISTERS,
        threadgroup_memory=memory,
        products=products,
        exponentials=elements,
        shuffles=live * 4 if forward else 0.0,
        moves=loads + paged,
        arithmetic=arithmetic,
        wide=not t.half,
        # Staged, what has no room is loaded once a block: O to be rescaled, too.
        spill_uses=live * (2 if forward and not direct else 1),
        array=held.array,
        reloads=live * held.reloads,
        paged=paged,
        loop=0.0,
        on_core_bytes=on_core,
        direct_bytes=direct_bytes,
        other_bytes=copied + paged_bytes,
        distinct_bytes=(2 + gemms) * array_bytes,
        reused_bytes=2 * array_bytes,
        heads=1,
        slices=slices,
        reads=0.0,
        two_buffers=False,
        masked=0.0,
        longest=1.0,
    )


class _Held(NamedTuple):
    """What a compiler is thought to keep where; 16-bit registers a thread.

    Args:
        registers: what it would keep in registers, if there were enough.
        array: arrays that live in memory.
        reloads: loads of those a simdgroup and pass.
        straight: fragments of the head dimension outside of any loop.
    """

    registers: float
    array: int
    reloads: float
    straight: int


def _held(t: Tile, direct: bool) -> _Held:
    """Registers and arrays of a tile; docs/chip-model.md has the evidence."""
    outputs = MFA_PRODUCTS[t.kernel][1]
    forward, query = t.kernel == "fwd", t.kernel == "bwd_dQ"
    columns = min(t.columns, t.head_dim)
    wide, fragments = t.head_dim // FRAGMENT, t.keys // FRAGMENT

    # A loop over blocks of D that runs once is no loop, nor is what is left behind its last block.
    # There, where no barrier keeps them (no copies), loads of what stays the same are moved out of
    # the pass, and those of all accumulators to its start: it needs registers as if all was cached.
    straight = t.head_dim if t.head_dim < 2 * columns else t.head_dim % columns
    straight = 0 if direct else straight // FRAGMENT
    looped = columns // FRAGMENT * (straight < wide)

    # 16-bit registers a thread: a float32 fragment takes 4. dO and all accumulators are float32
    # in registers; Q, K, V, S and P are 16-bit ones where inputs are.
    fragment = 2 if t.half else 4
    inputs = {"fwd": fragment, "bwd_dQ": fragment + 4, "bwd_dKV": 2 * fragment}[t.kernel]
    one_input = 4 if query else fragment
    registers = 16 + columns / 2 if not direct else 32 + AHEAD * t.cache_inputs
    registers += inputs * (wide if t.cache_inputs else straight)
    registers += 0 if t.cache_inputs else one_input * looped
    registers += 4 * outputs * wide if t.cache_outputs else 4 * (outputs * straight + looped)
    # S becomes P in place, and dS needs P and dP. With direct reads there is no barrier between
    # the two products of the forward pass: S of one overlaps with P of the other.
    scored = fragments * (fragment * (2 if forward and direct else 1) + (0 if forward else 4))
    registers += scored

    # The compiler may not keep an array in registers that a loop indexes. dO, whose sum with O is
    # formed in one, lives in memory unless there is room for a copy; it is read at every product
    # with it (staged: at every other, between barriers).
    array = 0
    if query and t.cache_inputs and 32 + scored + inputs * wide >= OCCUPANCY_REGISTERS:
        array = 4 * wide
    reloads = array * fragments * (1.0 if direct else 0.5)
    # Loops that stay loops index what was to be kept: read once a pass. Inputs have two loads and
    # two addresses for each product, so their loops stay sooner, and the accumulators' with them.
    unrolled = wide * fragments
    if direct and t.cache_inputs and unrolled > UNROLLED / 2:
        kept = inputs * wide - array + 4 * outputs * wide * t.cache_outputs
    elif direct and t.cache_outputs and unrolled > UNROLLED:
        kept = 4 * outputs * wide
    else:
        kept = 0
    registers -= array + kept
    if not direct:  # what is left, loads ahead of their use take
        registers = max(registers, float(OCCUPANCY_REGISTERS))
    return _Held(registers, array + kept, reloads + kept, straight)


@functools.lru_cache(maxsize=1024)
def _touched(width: int, columns: int, item: int, line: int) -> float:
    """Bytes of the lines that slices of `columns` of a row touch: all of a row, mean over rows."""
    pitch = width * item
    if columns >= width:  # whole rows lie one behind the other
        return pitch
    rows = line // math.gcd(line, pitch)
    touched = 0
    for start in range(0, width, columns):
        size = min(columns, width - start) * item
        offsets = ((row * pitch + start * item) % line for row in range(rows))
        touched += sum(-(-(offset + size) // line) for offset in offsets)
    return line * touched / rows


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
        array=0,
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
