"""How long a launch takes on a chip: an analytic estimate, from the launch's counts.

First `forward_work` turns counts into `Work`, which knows no kernel: instructions, bytes, waits.
Then `estimate` prices it on a chip: how many threadgroups a core holds, how busy each of its
resources is, what waits remain, the tail of the last wave, and the launch. docs/chip-model.md has
the reasoning, the sources, and how far the result is from published measurements.

Everything here is modelled. A prediction ranks schedules of one chip; it is no measurement.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from metalgen.chips.chip import Chip, IncompleteChip
from metalgen.chips.coefficients import DEFAULT, Coefficients
from metalgen.chips.counts import covers
from metalgen.chips.work import Work, combine_work, forward_work
from metalgen.families import SIMD_WIDTH, Schedule, get_attention
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

HALF_REGISTER_BYTES = 2 * SIMD_WIDTH
"""Bytes that a 16-bit register takes for a whole simdgroup."""
SHARPNESS = 6.0
"""Power of the mean that joins too few simdgroups to enough of them, without a corner."""


class Prediction(NamedTuple):
    """A modelled time: ``seconds``, the ``parts`` that explain it, in seconds, and a ``note``.

    Parts: ``matrix``, ``arithmetic`` (products included), ``exp2``, ``slots`` (issuing every
    instruction), ``on_core`` (threadgroup memory and the core's data cache), ``l2``, ``slc``,
    ``dram``: how long each resource is busy; ``spill``, ``idle`` (too few simdgroups), ``wait``
    (staging and direct reads), ``tail``, ``launch``: what is added; with splits ``combine``, the
    whole second launch. The note tells what of the config is not priced (see
    `metalgen.chips.counts.covers`), and is empty where all is.
    """

    seconds: float
    parts: dict[str, float]
    note: str = ""


def predict(
    problem: Problem, schedule: Schedule, chip: Chip, coefficients: Coefficients = DEFAULT
) -> Prediction:
    """The modelled time of a valid schedule on a chip, at the sizes of the problem's buckets.

    Raises:
        IncompleteChip: the chip lacks figures that the model needs, or is not an Apple GPU.
        InvalidSchedule: a schedule for another target than Metal.
    """
    return predict_sizes(
        problem.config,
        schedule,
        chip,
        batch_heads=problem.batch_heads,
        q_len=problem.q_len,
        kv_len=problem.kv_len,
        coefficients=coefficients,
    )


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
    """The same for any sizes; raises as `predict`.

    The schedule's family says what a call does. A step that merges shares of the keys is a launch
    of its own.
    """
    _core(chip)
    sizes = {"batch_heads": batch_heads, "q_len": q_len, "kv_len": kv_len}
    counts = get_attention(schedule.family).counts(config, schedule, **sizes)
    work = forward_work(config, schedule, counts, q_len)
    main = estimate(work, chip, coefficients)._replace(note=covers(config) or "")
    if counts.combine is None:
        return main
    work = combine_work(config, schedule, counts.combine)
    combine = estimate(work, chip, coefficients).seconds
    return main._replace(seconds=main.seconds + combine, parts=main.parts | {"combine": combine})


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
    data_cache: int
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
    "data_cache_bytes": "data_cache",
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


def require_figures(chip: Chip) -> None:
    """Raise `IncompleteChip`, with all that is missing, for a chip that cannot be modelled."""
    _core(chip)


def resident_groups(
    config: AttentionConfig,
    schedule: Schedule,
    chip: Chip,
    coefficients: Coefficients = DEFAULT,
) -> int:
    """How many threadgroups of a schedule a core holds: an estimate, as registers are.

    Raises as `predict`.
    """
    core = _core(chip)
    sizes = {"batch_heads": 1, "q_len": 1, "kv_len": 1}
    counts = get_attention(schedule.family).counts(config, schedule, **sizes)
    return _residency(forward_work(config, schedule, counts, 1), core, coefficients)[0]


def _residency(w: Work, core: _Core, c: Coefficients) -> tuple[int, float]:
    """Threadgroups that a core holds, and registers a thread that it has no room for."""
    spilled = max(0.0, float(w.registers - w.register_limit))
    held = c.live_registers if core.dynamic_registers else 1.0
    file = core.register_bytes / (w.simdgroups * HALF_REGISTER_BYTES)
    if (most := file / held) < w.registers - spilled:  # not even one threadgroup fits
        spilled = w.registers - most
    room = int(file / (held * (w.registers - spilled)))
    room = min(room, core.threads // (w.simdgroups * SIMD_WIDTH))
    if w.threadgroup_memory:
        room = min(room, core.threadgroup_memory // w.threadgroup_memory)
    return max(1, room), spilled


def _stack(registers: float, core: _Core, c: Coefficients) -> float:
    """Cycles of a core to load a byte of a register that lives in memory.

    The core's memory and its share of the L2 hold so many bytes of all such `registers` (16-bit
    ones of whole simdgroups) that are resident; the rest comes from further away.
    """
    if not registers:
        return 0.0
    held = registers * HALF_REGISTER_BYTES
    if core.dynamic_registers:  # one memory for registers, threadgroup memory and stack
        near, far = min(1.0, c.near / held) ** 2, c.spill_dynamic
    else:
        near, far = min(1.0, (core.data_cache + core.l2_bytes / core.cores) / held), c.spill
    return near / core.on_core + (1.0 - near) / far


def estimate(work: Work, chip: Chip, coefficients: Coefficients = DEFAULT) -> Prediction:
    """The modelled time of some work on a chip; raises as `predict`.

    Busy times are cycles of a core whose share of the work is even; the resource that is busiest
    sets the time, and a share of all others' leaks into it.
    """
    c, core, w = coefficients, _core(chip), work
    cores, simdgroups = core.cores, w.simdgroups
    share = w.groups / cores

    room, spilled = _residency(w, core, c)

    # Arithmetic, on all schedulers of a core; loads and stores run beside it.
    per_scheduler = 1.0 / (cores * core.schedulers)
    matrix = w.products * (c.matrix + c.matrix_wide if w.wide else c.matrix) * per_scheduler
    other = (w.arithmetic + w.exponentials) * c.alu + w.shuffles * c.shuffle
    other += w.paged * c.page + w.slices * simdgroups * c.barrier
    other *= per_scheduler
    if core.parallel_issue:
        other -= c.parallel_issue * min(other, matrix)
    code = w.loop * c.instruction_bytes
    missing = max(0.0, 1.0 - core.instruction_cache / code) if code else 0.0
    arithmetic = (matrix + other) * (1.0 + c.fetch * missing)
    spill = (w.spill_uses * spilled + w.reloads) * HALF_REGISTER_BYTES / cores
    spill *= _stack(min(room, share) * simdgroups * (spilled + w.array), core, c)
    exp2 = w.exponentials * c.exp2 * per_scheduler
    slots = (w.products + w.arithmetic + w.exponentials + w.shuffles + w.moves) * per_scheduler
    on_core = w.on_core_bytes / (cores * core.on_core)

    # What the core's data cache does not serve goes to the L2; what that does not hold, to the SLC.
    # Groups that stage wait for each other, and those that read the same keys run nearly in step:
    # what one has just fetched serves others.
    hits = 0.0
    if core.direct_reads:  # shared by the simdgroups of a core that work on the same head
        alike = simdgroups * max(1.0, min(room, share, share / w.heads))
        # Without barriers they drift apart.
        hits = (c.in_step if w.slices else c.adrift) * (1.0 - 1.0 / alike)
    drifting = w.direct_bytes * (1.0 - hits)
    l2 = (drifting + w.other_bytes) / (cores * core.l2)
    heads = min(w.heads, max(1.0, min(room, share) * cores * w.heads / w.groups))
    kept = min(1.0, core.l2_bytes / (heads * w.reused_bytes))
    below_l2 = drifting * (1.0 - kept) + w.other_bytes * (1.0 - max(kept, c.in_step))
    below_l2 = max(below_l2, w.distinct_bytes)
    slc = below_l2 / (cores * core.slc)
    kept = min(1.0, core.slc_bytes / (heads * w.reused_bytes))
    below_slc = w.distinct_bytes + max(0.0, below_l2 - w.distinct_bytes) * (1.0 - kept)
    dram = below_slc / (core.dram * c.dram) * core.hertz

    memory = max(l2, slc, dram)  # one after another on the same way
    busiest = max(arithmetic, exp2, slots, on_core, memory)
    total = arithmetic + exp2 + slots + on_core + memory
    busy = busiest + c.leak * (total - busiest) + spill
    # What only the memory beyond the core is busy with waits for no scheduler.
    beyond = max(0.0, memory - max(arithmetic, exp2, slots, on_core))

    # Simdgroups whose rows are all masked wait for the others of their group.
    lone = 1.0 + w.masked
    # Waves of groups: as many as fit, then the rest. What is in flight to hide latency needs
    # registers, of many simdgroups or of few: too few of them leave latency in the open.
    # Where groups differ in length, the long ones start first and the short ones fill the gaps.
    group = busy / share
    stall = c.stage_wait_two if w.two_buffers else c.stage_wait
    slices = w.slices / w.groups
    turns = w.reads / w.groups / simdgroups
    in_use = (w.registers - spilled) * simdgroups * HALF_REGISTER_BYTES
    in_use /= core.register_bytes * lone

    def wave(groups: float) -> tuple[float, float]:
        """Cycles of a core that runs `groups` side by side: busy, and waiting."""
        running = groups * simdgroups / (lone * core.schedulers)
        few = c.saturation / (groups * in_use)
        idle = max((1.0 + few**SHARPNESS) ** (1.0 / SHARPNESS), 1.0 / running)
        compute = groups * (group * idle - beyond / share * (idle - 1.0))
        wait = 0.0
        if slices:
            wait = slices * _exposed(stall, group / slices, groups)
        if turns:
            alone = group * core.schedulers / simdgroups / turns
            wait += turns * _exposed(c.direct_wait * (1.0 - hits), alone, max(1.0, running))
        return compute, wait

    most_groups = -(-w.groups // cores)
    if w.longest > 1.0:
        resident = max(1.0, min(float(room), share))
        compute, wait = wave(resident)
        spent, waited = compute * share / resident, wait * share / resident
        tail = max(c.uneven_tail * (most_groups / share - 1.0), w.longest / share - 1.0)
        tail *= spent + waited
    else:
        full, rest = divmod(most_groups, room)
        compute, waited = wave(room) if full else (0.0, 0.0)
        spent, waited = compute * full, waited * full
        if rest:
            last, wait = wave(rest)
            spent, waited = spent + last, waited + wait
        even = share / most_groups
        tail = (1.0 - even) * (spent + waited)
        spent, waited = even * spent, even * waited

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
        "spill": spill * second,
        "idle": max(0.0, spent - busy) * second,
        "wait": waited * second,
        "tail": tail * second,
        "launch": c.launch,
    }
    return Prediction((spent + waited + tail) * second + c.launch, parts)


def _exposed(stall: float, compute: float, others: float) -> float:
    """Cycles of a stall that remain when `others` take turns, each with `compute` between stalls.

    All of it for one alone, next to nothing once the rest compute for longer than the stall.
    """
    return stall * stall / (stall + max(0.0, others - 1.0) * compute)
