"""How long a launch takes on a chip: an analytic estimate, from the launch's counts.

First `forward_work` turns counts into `Work`, which knows no kernel: instructions, bytes, waits.
Then `estimate` prices it on a chip: how many threadgroups a core holds, how busy each of its
resources is, what waits remain, the tail of the last wave, and the launch. docs/chip-model.md has
the reasoning, the sources, and how far the result is from published measurements.

Everything here is modelled. A prediction ranks schedules of one chip; it is no measurement.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from metalgen.chips.chip import Chip, IncompleteChip
from metalgen.chips.coefficients import DEFAULT, Coefficients
from metalgen.chips.counts import Counts, forward_counts
from metalgen.config import AttentionConfig
from metalgen.problem import Problem
from metalgen.schedule import FRAGMENT, SIMD_WIDTH, Schedule, padded, register_estimate

HALF_REGISTER_BYTES = 2 * SIMD_WIDTH
"""Bytes that a 16-bit register takes for a whole simdgroup."""
REGISTERS = 256
"""16-bit registers that a thread can address."""


class Prediction(NamedTuple):
    """A modelled time: ``seconds``, and the ``parts`` that explain it, in seconds.

    Parts: ``matrix``, ``arithmetic`` (products included), ``exp2``, ``slots`` (issuing every
    instruction), ``on_core`` (threadgroup memory and the core's data cache), ``l2``, ``slc``,
    ``dram``: how long each resource is busy; ``wait`` (barriers and staging), ``tail``, ``launch``:
    what is added.
    """

    seconds: float
    parts: dict[str, float]


class Work(NamedTuple):
    """What one launch asks of a chip, whatever its kernel; totals over the launch.

    Args:
        groups, simdgroups: threadgroups, and simdgroups in each.
        registers: 16-bit registers a thread.
        threadgroup_memory: bytes a threadgroup.
        products, exponentials, shuffles, moves, arithmetic: instructions, each one of a simdgroup:
            8x8x8 multiply-accumulates, exp2, shuffles, loads and stores, and all others.
        wide: whether the products' operands are float32.
        spill_uses: times that a spilled register is stored and loaded, summed over simdgroups.
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


def predict(
    problem: Problem, schedule: Schedule, chip: Chip, coefficients: Coefficients = DEFAULT
) -> Prediction:
    """The modelled time of a valid schedule on a chip, at the sizes of the problem's buckets.

    Raises:
        IncompleteChip: the chip lacks figures that the model needs, or is not an Apple GPU.
        InvalidSchedule: a schedule for another target than Metal.
    """
    if problem.family == "decode":
        return predict_decode(problem, schedule, chip, coefficients)
    return predict_sizes(
        problem.config,
        schedule,
        chip,
        batch_heads=problem.batch_heads,
        q_len=problem.q_len,
        kv_len=problem.kv_len,
        coefficients=coefficients,
    )


def predict_decode(
    problem: Problem, schedule: Schedule, chip: Chip, coefficients: Coefficients = DEFAULT
) -> Prediction:
    """The same for the decode family, as forward launches with the same work.

    Rows are all queries that share a KV head, and each split is a head of its own with its share
    of the keys. Few queries see nearly all keys, so masks are left out, but for a window, which
    shortens the keys. The combine step reads the float outputs of all splits.
    """
    config = problem.config
    left = config.window_left
    keys = problem.kv_len if left is None else min(problem.kv_len, left + problem.q_len)
    kv_heads = max(1, problem.batch_heads // config.heads_per_kv)
    plain = dataclasses.replace(
        config, causal=False, window_left=None, window_right=None, heads_per_kv=1
    )
    main = predict_sizes(
        plain,
        dataclasses.replace(schedule, splits=1),
        chip,
        batch_heads=kv_heads * schedule.splits,
        q_len=problem.q_len * config.heads_per_kv,
        kv_len=max(1, -(-keys // schedule.splits)),
        coefficients=coefficients,
    )
    if schedule.splits == 1:
        return main
    rows = problem.batch_heads * problem.q_len
    moved = rows * (config.v_dim + 1) * 4 * 2 * schedule.splits  # written once, read once
    chip.require("dram_gbs")
    assert chip.dram_gbs is not None
    combine = moved / (chip.dram_gbs * 1e9) + coefficients.launch
    return main._replace(seconds=main.seconds + combine, parts=main.parts | {"combine": combine})


def predict_sizes(
    config: AttentionConfig,
    schedule: Schedule,
    chip: Chip,
    *,
    batch_heads: int,
    q_len: int,
    kv_len: int,
    coefficients: Coefficients = DEFAULT,
) -> Prediction:
    """The same for any sizes; raises as `predict`."""
    _core(chip)
    counts = forward_counts(config, schedule, batch_heads=batch_heads, q_len=q_len, kv_len=kv_len)
    work = forward_work(config, schedule, counts, batch_heads, q_len, kv_len)
    return estimate(work, chip, coefficients)


def forward_work(
    config: AttentionConfig,
    schedule: Schedule,
    counts: Counts,
    batch_heads: int,
    q_len: int,
    kv_len: int,
) -> Work:
    """The work of a launch of the forward family. Instructions are estimated, the rest is counted.

    The estimate follows the static study in docs/chip-model.md: a pass is a fixed part, a part for
    each fragment of 8 keys, and what staging takes.
    """
    s = schedule
    blocks, fragments, wide = s.row_blocks, s.bk // FRAGMENT, s.load_width // 2
    k_padded, v_padded = padded(config.head_dim), padded(config.v_dim)
    k_fragments, v_fragments = k_padded // FRAGMENT, v_padded // FRAGMENT
    item = config.itemsize

    # A float32 block of 8 elements takes two vector loads where one does for 16 bits.
    vector = 2 if item == 4 and s.load_width == 8 else 1
    k_loads, v_loads = vector * 2 * -(-k_fragments // wide), vector * -(-v_fragments // wide)
    # The two elements of a fragment of K or Q come from two vectors: a move pairs them. Widening
    # takes two conversions.
    wider = s.fragment == "float32"
    spread = k_fragments + (2 * (k_fragments + v_fragments) if wider else 0)
    # An element of S: maximum, FMA, sum, conversion to P; exp2 is counted apart.
    per_fragment = spread + 8 * blocks
    per_pass = 60.0 + blocks * (12 + 2 * v_fragments + 2 * fragments)
    loads = fragments * (k_loads + v_loads)
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
    device = counts.device_read + counts.device_written
    widths = (config.head_dim + config.v_dim) * item
    kv_bytes = kv_len * widths
    heads = max(1, batch_heads // config.heads_per_kv)
    return Work(
        groups=counts.groups,
        simdgroups=s.simdgroups,
        registers=register_estimate(config, s),
        threadgroup_memory=counts.threadgroup_memory,
        products=counts.multiply_accumulates,
        exponentials=counts.exponentials / SIMD_WIDTH,
        shuffles=counts.shuffles,
        moves=moves,
        arithmetic=arithmetic,
        wide=wider or item == 4,
        # O and S are touched once for each fragment of 8 keys.
        spill_uses=live * fragments,
        loop=per_pass + loads + blocks * fragments * (k_fragments + v_fragments),
        on_core_bytes=counts.threadgroup_read + counts.threadgroup_written + direct,
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


class _Core(NamedTuple):
    """A chip's figures as the model uses them; none is missing."""

    cores: int
    hertz: float
    schedulers: int
    register_bytes: int
    threadgroup_memory: int
    threads: int
    instruction_cache: int
    on_core: float
    l2: float
    slc: float
    l2_bytes: int
    slc_bytes: int
    dram: float
    dynamic_registers: bool
    parallel_issue: bool
    direct_reads: bool


_FIGURES = {
    "cores": "cores",
    "schedulers": "schedulers",
    "register_bytes": "register_bytes",
    "core_threadgroup_bytes": "threadgroup_memory",
    "resident_threads": "threads",
    "instruction_cache_bytes": "instruction_cache",
    "on_core_bytes_per_cycle": "on_core",
    "l2_bytes_per_cycle": "l2",
    "slc_bytes_per_cycle": "slc",
    "l2_bytes": "l2_bytes",
    "slc_bytes": "slc_bytes",
}


@functools.lru_cache(maxsize=256)
def _core(chip: Chip) -> _Core:
    if chip.kind != "apple":
        raise IncompleteChip(chip.name, ("model of an Apple GPU core",))
    chip.require("clock_ghz", "dram_gbs", *_FIGURES)
    assert chip.clock_ghz is not None and chip.dram_gbs is not None
    return _Core(
        hertz=chip.clock_ghz * 1e9,
        dram=chip.dram_gbs * 1e9,
        dynamic_registers=chip.dynamic_registers,
        parallel_issue=chip.parallel_issue,
        direct_reads=chip.direct_reads,
        **{field: getattr(chip, name) for name, field in _FIGURES.items()},
    )


def estimate(work: Work, chip: Chip, coefficients: Coefficients = DEFAULT) -> Prediction:
    """The modelled time of some work on a chip; raises as `predict`.

    Busy times are cycles of a core whose share of the work is even; the resource that is busiest
    sets the time, and a share of all others' leaks into it.
    """
    c, core, w = coefficients, _core(chip), work
    cores, simdgroups = core.cores, w.simdgroups

    # Registers that a thread, or one threadgroup, cannot have are spilled.
    held = c.live_registers if core.dynamic_registers else 1.0
    file = core.register_bytes / (simdgroups * HALF_REGISTER_BYTES)
    spilled = max(0.0, w.registers - min(REGISTERS, file / held))

    # How many threadgroups a core holds; fewer when there are not enough of them.
    room = int(file / (held * (w.registers - spilled)))
    room = min(room, core.threads // (simdgroups * SIMD_WIDTH))
    if w.threadgroup_memory:
        room = min(room, core.threadgroup_memory // w.threadgroup_memory)
    share = w.groups / cores
    resident = max(1.0, min(float(max(1, room)), share))

    # Arithmetic, on all schedulers of a core; loads and stores run beside it.
    per_scheduler = 1.0 / (cores * core.schedulers)
    matrix = w.products * (c.matrix_wide if w.wide else c.matrix) * per_scheduler
    other = (w.arithmetic + w.exponentials) * c.alu + w.shuffles * c.shuffle
    other *= per_scheduler
    if core.parallel_issue:
        other -= c.parallel_issue * min(other, matrix)
    spill = w.spill_uses * spilled * c.spill * per_scheduler
    missing = max(0.0, 1.0 - core.instruction_cache / (w.loop * c.instruction_bytes))
    arithmetic = (matrix + other) * (1.0 + c.fetch * missing) + spill
    exp2 = w.exponentials * c.exp2 * per_scheduler
    slots = (w.products + w.arithmetic + w.exponentials + w.shuffles + w.moves) * per_scheduler
    on_core = w.on_core_bytes / (cores * core.on_core)

    # What the core's data cache does not serve goes to the L2; what that does not hold, to the SLC.
    hits = c.shared_hits_direct if core.direct_reads else c.shared_hits
    missed = w.direct_bytes * (1.0 - hits * (1.0 - 1.0 / simdgroups)) + w.other_bytes
    l2 = missed / (cores * core.l2)
    heads = min(w.heads, max(1.0, resident * cores * w.heads / w.groups))
    held = min(1.0, core.l2_bytes / (heads * w.reused_bytes))
    below_l2 = w.distinct_bytes + max(0.0, missed - w.distinct_bytes) * (1.0 - held)
    slc = below_l2 / (cores * core.slc)
    held = min(1.0, core.slc_bytes / (heads * w.reused_bytes))
    below_slc = w.distinct_bytes + max(0.0, below_l2 - w.distinct_bytes) * (1.0 - held)
    dram = below_slc / (core.dram * c.dram) * core.hertz

    # Latency that too few simdgroups leave in the open, and schedulers with nothing to do.
    running = resident * simdgroups / (1.0 + w.masked)
    idle = 1.0 + c.latency / running + c.masked * w.masked / resident
    if running < core.schedulers:
        idle *= core.schedulers / running
    arithmetic *= idle
    memory = max(l2, slc, dram)  # one after another on the same way
    busiest = max(arithmetic, exp2, slots, on_core, memory)
    total = arithmetic + exp2 + slots + on_core + memory
    busy = busiest + c.leak * (total - busiest)

    # Waits, hidden as far as others compute meanwhile: a threadgroup for a staged slice, a
    # simdgroup for what it reads directly.
    wait = 0.0
    if w.slices:
        stall = c.stage_wait_two if w.two_buffers else c.stage_wait
        wait = w.slices / cores * _exposed(stall, busy * cores / w.slices, resident)
    if w.reads:
        stall = c.direct_wait * (1.0 - hits)
        turns = w.reads * per_scheduler
        wait += turns * _exposed(stall, busy / turns, max(1.0, running / core.schedulers))
    spent = busy + wait

    # The last wave: some cores have a group more than others. Where groups differ, the long ones
    # start first and the short ones fill the gaps, unless one alone takes longer than a core's
    # share.
    tail = -(-w.groups // cores) / share - 1.0
    if w.longest > 1.0:
        tail = max(c.uneven_tail * tail, w.longest / share - 1.0)
    tail *= spent

    second = 1.0 / core.hertz
    parts = {
        "matrix": matrix * second,
        "arithmetic": arithmetic * second,
        "exp2": exp2 * second,
        "slots": slots * second,
        "on_core": on_core * second,
        "l2": l2 * second,
        "slc": slc * second,
        "dram": dram * second,
        "wait": wait * second,
        "tail": tail * second,
        "launch": c.launch,
    }
    return Prediction((spent + tail) * second + c.launch, parts)


def _exposed(stall: float, compute: float, others: float) -> float:
    """Cycles of a stall that remain when `others` take turns, each with `compute` between stalls.

    All of it for one alone, next to nothing once the rest compute for longer than the stall.
    """
    return stall * stall / (stall + (others - 1.0) * compute) / others
