"""What a launch asks of a chip, whatever its kernel; `metalgen.chips.model` prices it."""

from __future__ import annotations

from typing import NamedTuple

from metalgen.chips.functions import function_cost
from metalgen.families.counts import CallCounts, CombineCounts
from metalgen.features.softcap import shift_of, takes_tanh
from metalgen.kinds import get_kind, value_width
from metalgen.kinds.base import FRAGMENT
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import SIMD_WIDTH, Schedule

REGISTERS = 256
"""16-bit registers that a thread can address."""


class Work(NamedTuple):
    """What one launch asks of a chip, whatever its kernel; totals over the launch.

    Args:
        groups, simdgroups: threadgroups, and simdgroups in each.
        registers: 16-bit registers a thread.
        threadgroup_memory: bytes a threadgroup.
        products, exponentials, shuffles, moves, arithmetic: instructions, each one of a simdgroup:
            8x8x8 multiply-accumulates, exp2, shuffles, loads and stores, and all others.
        wide: whether the products' operands are float32.
        register_limit: 16-bit registers that the compiler may use, where the launch bounds them.
        spill_uses: times that a register without room is loaded, over all simdgroups; stores wait
            for nothing.
        array: 16-bit registers a thread that live in memory on every chip: arrays that a loop
            indexes.
        reloads: loads of those, over all simdgroups.
        paged: fragments of queries or accumulators that simdgroups load or store each pass,
            straight from or to device memory.
        loop: instructions of one pass of the loop, unrolled, for the instruction cache.
        on_core_bytes: to and from threadgroup memory, and read directly from device memory.
        direct_bytes: device reads that several simdgroups of a group repeat.
        other_bytes: device reads that no other simdgroup of a group repeats, and writes.
        distinct_bytes: bytes of the arrays.
        reused_bytes: bytes of the arrays that all threadgroups of a head read again.
        heads: heads that have such arrays of their own.
        slices: staged slices, each with its barriers, summed over groups.
        reads: fragments of keys or values read directly, each at once, summed over simdgroups.
        two_buffers: whether the next slice is fetched while one is used.
        masked: passes of simdgroups whose rows are all masked, over passes that compute.
        longest: work of the longest group over that of the mean group.
    """

    groups: int
    simdgroups: int
    registers: int
    threadgroup_memory: int
    products: float
    exponentials: float
    shuffles: float
    moves: float
    arithmetic: float
    wide: bool
    spill_uses: float
    array: int
    reloads: float
    paged: float
    loop: float
    on_core_bytes: float
    direct_bytes: float
    other_bytes: float
    distinct_bytes: float
    reused_bytes: float
    heads: int
    slices: float
    reads: float
    two_buffers: bool
    masked: float
    longest: float
    register_limit: int = REGISTERS


def forward_work(
    config: AttentionConfig,
    schedule: Schedule,
    call: CallCounts,
    q_len: int,
) -> Work:
    """The work of the main step of a call. Instructions are estimated, the rest is counted.

    The estimate follows the static study in docs/chip-model.md: a pass is a fixed part, a part for
    each fragment of 8 keys, what user functions compute, and what staging takes.
    """
    s, kind, counts = schedule, get_kind(schedule.kind), call.main
    batch_heads, kv_len = call.heads, call.kv_len
    blocks, fragments, wide = s.row_blocks, s.bk // FRAGMENT, s.load_width // 2
    k_padded, v_padded = kind.padded(config.head_dim), kind.padded(value_width(config, s))
    k_fragments, v_fragments = k_padded // FRAGMENT, v_padded // FRAGMENT
    item = config.itemsize

    # A float32 block of 8 elements takes two vector loads where one does for 16 bits.
    vector = 2 if item == 4 and s.load_width == 8 else 1
    k_loads, v_loads = vector * 2 * -(-k_fragments // wide), vector * -(-v_fragments // wide)
    # The two elements of a fragment of K or Q come from two vectors: a move pairs them. Widening
    # takes two conversions.
    wider = s.fragment == "float32"
    spread = k_fragments + (2 * (k_fragments + v_fragments) if wider else 0)
    # An element of S: maximum, FMA, sum, conversion to P; exp2 is counted apart. A softcap takes a
    # reciprocal and a sum, or a hyperbolic tangent.
    capped = 0 if config.softcap is None else 20 if takes_tanh(config) else 8
    peaks = shift_of(config) is None  # maxima are found, and rows of the output rescaled
    per_fragment: float = spread + (6 + 2 * peaks + 2 * capped) * blocks
    per_pass = 60.0 + blocks * (2 + (10 + 2 * v_fragments) * peaks + 2 * fragments)
    loads: float = fragments * (k_loads + v_loads)
    function = function_cost(
        config, packed=call.head_rows
    )  # a lane has two scores of a row a fragment
    per_fragment += 2 * function.element * blocks
    per_pass += function.row * blocks
    own_loads = blocks * (function.row_loads + 2 * fragments * function.element_loads)
    loads += own_loads
    if s.q_source == "threadgroup":
        per_pass += blocks * k_fragments
        loads += blocks * k_loads
    if k_direct := s.k_source == "device":
        per_fragment += 4  # two row addresses, clamped
    if v_direct := s.v_source == "device":
        per_fragment += 2
    per_pass += fragments * per_fragment
    live = counts.live_passes
    arithmetic = live * per_pass
    moves: float = live * loads

    # Staging a vector a lane: load and store; bounds, and two addresses with their divisions.
    staged = counts.group_passes * s.bk * (k_padded * (not k_direct) + v_padded * (not v_direct))
    vectors = staged / (SIMD_WIDTH * (s.load_width if item == 2 else min(4, s.load_width)))
    arithmetic += 6 * vectors
    moves += 2 * vectors
    # Start and end of a simdgroup: Q loaded (and staged), O scaled and stored.
    arithmetic += counts.simdgroups * (100 + blocks * (2 * k_fragments + 4 * v_fragments))
    if s.q_source == "threadgroup":
        arithmetic += counts.simdgroups * blocks * k_loads * 6
    moves += counts.simdgroups * blocks * (k_loads + v_loads)

    direct = counts.k_read * k_direct + counts.v_read * v_direct
    on_core: float = counts.threadgroup_read + counts.threadgroup_written + direct
    on_core += live * own_loads * SIMD_WIDTH * 4
    device = counts.device_read + counts.device_written
    widths = (config.head_dim + config.v_dim) * item
    kv_bytes = kv_len * widths
    heads = max(1, batch_heads // config.heads_per_kv)
    return Work(
        groups=counts.groups,
        simdgroups=s.simdgroups,
        registers=kind.registers(config, s) or 0,
        threadgroup_memory=counts.threadgroup_memory,
        products=counts.multiply_accumulates,
        exponentials=counts.exponentials / SIMD_WIDTH,
        shuffles=counts.shuffles,
        moves=moves,
        arithmetic=arithmetic,
        wide=wider or item == 4,
        # O and S are touched once for each fragment of 8 keys.
        spill_uses=live * fragments,
        array=0,
        reloads=0.0,
        paged=0.0,
        loop=per_pass + loads + blocks * fragments * (k_fragments + v_fragments),
        on_core_bytes=on_core,
        direct_bytes=direct,
        other_bytes=device - direct,
        distinct_bytes=heads * kv_bytes + batch_heads * q_len * widths + counts.lse_written,
        reused_bytes=kv_bytes,
        heads=heads,
        slices=counts.barriers / s.simdgroups / (1 if s.buffers == 2 else 2),
        reads=live * fragments * (k_direct + v_direct),
        two_buffers=s.buffers == 2,
        masked=counts.group_passes * s.simdgroups / live - 1.0,
        # The last rows of a causal head see all keys, its mean row about half of them.
        longest=-(-kv_len // s.bk) * counts.groups / counts.group_passes,
    )


COMBINE_SIMDGROUPS = 4
"""Of a threadgroup of the combine step."""


def combine_work(config: AttentionConfig, schedule: Schedule, counts: CombineCounts) -> Work:
    """The work of the step that merges the outputs of shares of the keys.

    Bytes and exponentials are counted, instructions estimated: a place takes two divisions of
    64 bits, a split two addresses, a maximum, an exponent and two sums.
    """
    simdgroups = -(-counts.threads // SIMD_WIDTH)
    shared = min(SIMD_WIDTH, config.v_dim)  # lanes of a row read the same sums
    other = counts.parts_read + counts.sums_read / shared + counts.out_written + counts.lse_written
    return Work(
        groups=-(-simdgroups // COMBINE_SIMDGROUPS),
        simdgroups=COMBINE_SIMDGROUPS,
        registers=48,
        threadgroup_memory=0,
        products=0.0,
        exponentials=counts.exponentials / SIMD_WIDTH,
        shuffles=0.0,
        moves=simdgroups * (4 * schedule.partials + 1),
        arithmetic=simdgroups * (60 + 12 * schedule.partials),
        wide=False,
        spill_uses=0.0,
        array=0,
        reloads=0.0,
        paged=0.0,
        loop=0.0,
        on_core_bytes=other,
        direct_bytes=0.0,
        other_bytes=other,
        distinct_bytes=counts.parts_read
        + counts.sums_read * 2 / 3 / config.v_dim
        + counts.out_written,
        reused_bytes=other,
        heads=1,
        slices=0.0,
        reads=0.0,
        two_buffers=False,
        masked=0.0,
        longest=1.0,
    )
