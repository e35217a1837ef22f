"""What a launch of attention does: a few additions, no loop over tiles.

The counts are those of `templates/families/forward.jinja` for Metal, to the last unit; a test runs
the kernel in the simulator, which counts for itself, and compares. Bytes are what the source asks
for, before any cache, summed over all threads; matrix products, barriers and shuffles count once a
simdgroup, exponentials once a lane.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from metalgen.errors import InvalidSchedule
from metalgen.features.softcap import shift_of, takes_tanh
from metalgen.kinds import get_kind, value_width
from metalgen.kinds.base import FRAGMENT
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import SIMD_WIDTH, Schedule


class Counts(NamedTuple):
    """The work of one launch.

    Args:
        groups, simdgroups: threadgroups, and simdgroups in all of them.
        group_passes: passes over ``bk`` keys, summed over threadgroups.
        live_passes: passes in which a simdgroup computes, summed over simdgroups; in the others
            all of its rows are masked, and it only stages and waits.
        multiply_accumulates: 8x8x8 matrix instructions.
        q_read, k_read, v_read, out_written, lse_written: device bytes by buffer; of splits, the
            last are those of exponents and sums.
        threadgroup_read, threadgroup_written: bytes to and from threadgroup memory.
        threadgroup_memory: bytes of threadgroup memory that a threadgroup declares.
        exponentials: exp2, one a lane (the hyperbolic tangents of a softcap are none).
        shuffles: simdgroup shuffles.
        barriers, simdgroup_barriers: one for each simdgroup that takes part.
    """

    groups: int
    simdgroups: int
    group_passes: int
    live_passes: int
    multiply_accumulates: int
    q_read: int
    k_read: int
    v_read: int
    out_written: int
    lse_written: int
    threadgroup_read: int
    threadgroup_written: int
    threadgroup_memory: int
    exponentials: int
    shuffles: int
    barriers: int
    simdgroup_barriers: int

    @property
    def device_read(self) -> int:
        """Bytes of Q, K and V read from device memory."""
        return self.q_read + self.k_read + self.v_read

    @property
    def device_written(self) -> int:
        """Bytes of the output and the log-sum-exp written to device memory."""
        return self.out_written + self.lse_written


def forward_counts(
    config: AttentionConfig, schedule: Schedule, *, batch_heads: int, q_len: int, kv_len: int
) -> Counts:
    """The counts of one launch of a valid schedule (see `metalgen.families.check_schedule`).

    Args:
        batch_heads: batch entries times query heads.
        q_len, kv_len: number of queries and of keys, from 1.

    Raises:
        InvalidSchedule: a schedule of another target's kernel, whose rows come in other blocks.

    A config that `metalgen.chips.counts.covers` has something against is counted as that says.
    """
    s = schedule
    _check_kind(s)
    left, right = window(config)
    passes = pass_sums(q_len, kv_len, s.bq, s.bk, left, right)[0]
    live = pass_sums(q_len, kv_len, FRAGMENT * s.row_blocks, s.bk, left, right)[0]
    heads = batch_heads * s.value_parts
    return _counts(
        config,
        s,
        groups=heads * -(-q_len // s.bq),
        passes=heads * passes,
        live=heads * live,
        out_written=batch_heads * q_len * config.v_dim * config.itemsize,
        lse_written=batch_heads * q_len * 4 if config.return_lse else 0,
    )


def decode_counts(
    config: AttentionConfig, schedule: Schedule, *, batch_heads: int, q_len: int, kv_len: int
) -> Counts:
    """The counts of one launch of the decode family; `combine_counts` has those of the next step.

    Arguments and errors as for `forward_counts`; `batch_heads` is a multiple of the heads per KV
    head. Rows are the queries of all heads that share a KV head; all groups of one make the same
    passes, shared out over the splits.
    """
    s = schedule
    _check_kind(s)
    heads, rows = batch_heads // config.heads_per_kv, q_len * config.heads_per_kv
    tiles = heads * -(-rows // s.bq)
    left, _ = window(config)  # the last query sees the last key, whatever bounds it to the right
    begin = 0 if left is None else max(0, kv_len - q_len - left) // s.bk * s.bk
    passes = -(-(kv_len - begin) // s.bk)
    splits, parts = s.partials, s.value_parts
    return _counts(
        config,
        s,
        groups=tiles * splits * parts,
        passes=tiles * passes * parts,
        live=heads * -(-rows // (FRAGMENT * s.row_blocks)) * passes * parts,
        out_written=splits * heads * rows * config.v_dim * (4 if splits > 1 else config.itemsize),
        lse_written=splits * heads * rows * (8 if splits > 1 else 4 if config.return_lse else 0),
    )


class CombineCounts(NamedTuple):
    """The work of the step that joins the splits of a decode schedule, one element a thread.

    Args:
        threads: that compute, one for each element of the output.
        parts_read, sums_read: device bytes of the float32 outputs of all splits, and of their
            exponents and sums, of which each thread reads the former twice.
        out_written, lse_written: device bytes of the result.
        exponentials: exp2, one a thread and split.
    """

    threads: int
    parts_read: int
    sums_read: int
    out_written: int
    lse_written: int
    exponentials: int


class CallCounts(NamedTuple):
    """The work of a call, by its steps.

    Args:
        main: of the main step.
        heads: sequences of keys that it passes over: of each query head, and share of its keys.
        kv_len: keys of each.
        head_rows: whether the rows of all heads that share a KV head make a block.
        combine: of the step that merges shares of the keys; None where there is none.
    """

    main: Counts
    heads: int
    kv_len: int
    head_rows: bool = False
    combine: CombineCounts | None = None


def combine_counts(
    config: AttentionConfig, schedule: Schedule, *, batch_heads: int, q_len: int
) -> CombineCounts:
    """The counts of the combine step of a decode schedule with two splits or more."""
    rows, splits = batch_heads * q_len, schedule.partials
    threads = rows * config.v_dim
    return CombineCounts(
        threads=threads,
        parts_read=threads * splits * 4,
        sums_read=threads * splits * 3 * 4,
        out_written=threads * config.itemsize,
        lse_written=rows * 4 if config.return_lse else 0,
        exponentials=threads * splits,
    )


def _check_kind(schedule: Schedule) -> None:
    if not get_kind(schedule.kind).counted:
        raise InvalidSchedule(
            "target", f"only kernels for Metal are counted, which {schedule} is not"
        )


def _counts(
    config: AttentionConfig,
    schedule: Schedule,
    *,
    groups: int,
    passes: int,
    live: int,
    out_written: int,
    lse_written: int,
) -> Counts:
    """What follows from passes and live passes, for both families."""
    s, kind = schedule, get_kind(schedule.kind)
    bk, blocks = s.bk, s.row_blocks
    item = config.itemsize
    k_width, v_width = config.head_dim, value_width(config, s)
    k_padded, v_padded = kind.padded(k_width), kind.padded(v_width)
    k_staged, v_staged = s.k_source == "threadgroup", s.v_source == "threadgroup"
    q_staged = s.q_source == "threadgroup"
    simdgroups = groups * s.simdgroups

    # Keys past the end are the last key again, so a pass always asks for bk rows.
    k_read = (passes if k_staged else live) * bk * k_width * item
    v_read = (passes if v_staged else live) * bk * v_width * item
    tile = bk * item
    tg_read = live * tile * (k_padded * k_staged + v_padded * v_staged)
    tg_written = passes * tile * (k_padded * k_staged + v_padded * v_staged)
    if q_staged:
        tg_read += live * blocks * FRAGMENT * k_padded * item
        tg_written += groups * s.bq * k_padded * item

    slices = (-(-k_padded // s.bd) if k_staged else 0) + (-(-v_padded // s.bd) if v_staged else 0)
    fragments = bk // FRAGMENT
    capped = config.softcap is not None and not takes_tanh(config)  # by an exp2 a score
    peaks = shift_of(config) is None  # a row's maximum is found, and what came before rescaled
    return Counts(
        groups=groups,
        simdgroups=simdgroups,
        group_passes=passes,
        live_passes=live,
        multiply_accumulates=live * blocks * fragments * (k_padded + v_padded) // FRAGMENT,
        q_read=groups * s.bq * k_width * item,
        k_read=k_read,
        v_read=v_read,
        out_written=out_written,
        lse_written=lse_written,
        threadgroup_read=tg_read,
        threadgroup_written=tg_written,
        threadgroup_memory=kind.threadgroup_bytes(config, s),
        exponentials=live * blocks * (2 * fragments * (1 + capped) + peaks) * SIMD_WIDTH,
        shuffles=2 * blocks * (live * peaks + simdgroups),
        barriers=passes * slices * (1 if s.buffers == 2 else 2) * s.simdgroups,
        simdgroup_barriers=simdgroups if q_staged else 0,
    )


def window(config: AttentionConfig) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees; None where nothing bounds them."""
    return config.window_left, 0 if config.causal else config.window_right


@functools.lru_cache(maxsize=4096)
def pass_sums(
    q_len: int,
    kv_len: int,
    rows: int,
    bk: int,
    left: int | None = None,
    right: int | None = None,
) -> tuple[int, int]:
    """Passes over `bk` keys that blocks of `rows` queries make in one head, and keys they cover.

    Block n holds the queries from n * rows to before e = min((n + 1) * rows, q_len). With queries
    aligned to the last keys, it sees keys from n * rows + kv_len - q_len - left on, and keys below
    e + kv_len - q_len + right; None bounds nothing. A pass begins at a multiple of `bk`, and the
    last may hold fewer keys because there are no more.
    """
    blocks = -(-q_len // rows)
    most = -(-kv_len // bk)
    offset = kv_len - q_len
    if right is None:
        passes, full = blocks * most, blocks
    else:
        # Blocks before `some` end at or before key 0, those from `all_` on see the last key.
        some = min(blocks - 1, max(0, -(offset + right) // rows))
        all_ = min(blocks - 1, max(some, -(-(kv_len - offset - right) // rows) - 1))
        start = (some + 1) * rows + offset + right + bk - 1
        passes = floor_sum(all_ - some, rows, start, bk) + (blocks - all_) * most
        # How many of them reach the last, partial pass.
        reach = max(0, ((most - 1) * bk - offset - right) // rows)
        full = blocks - min(blocks - 1, max(some, reach))
    if left is not None:
        # Less the passes before the first key that a block sees; none for the first `skipped`.
        begin = offset - left
        skipped = max(0, -(begin // rows))
        start = skipped * rows + begin
        passes -= floor_sum(blocks - skipped, rows, start, bk)
    return passes, passes * bk - full * (most * bk - kv_len)


def floor_sum(count: int, step: int, start: int, divisor: int) -> int:
    """``sum((start + n * step) // divisor for n in range(count))`` in logarithmic time.

    All arguments at least 0, `divisor` at least 1. The Euclid-like recursion of Graham, Knuth and
    Patashnik, Concrete Mathematics, section 3.5.
    """
    total = 0
    while count > 0:
        total += (count - 1) * count // 2 * (step // divisor) + count * (start // divisor)
        step, start = step % divisor, start % divisor
        end = step * count + start
        if end < divisor:
            break
        count, start, step, divisor = end // divisor, end % divisor, divisor, step
    return total
