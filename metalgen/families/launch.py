"""How many threadgroups a call takes, and in how many dispatches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Schedule


@dataclass(frozen=True)
class Launch:
    """One dispatch.

    Args:
        groups: threadgroups along x (blocks of rows, times splits), y (heads, or KV heads, times
            shares of the values) and z (batch entries).
        shape: ``(B, H, L)`` of its output's rows.
        splits: outputs of each row that a combine step merges.
        start: batch entry, head (or KV head) and block of rows where it begins; None: at the first.
        others: rows that are passed over, where outputs have a row for each; else 0.
    """

    groups: tuple[int, int, int]
    shape: tuple[int, int, int]
    splits: int = 1
    start: tuple[int, int, int] | None = None
    others: int = 0


DETERMINISTIC_KEYS = 16384
"""Keys over all splits of a deterministic decode: a split has a fixed share of this many, however
many keys there are."""


def split_keys(schedule: Schedule) -> int:
    """Keys of one split of a deterministic decode: whole tiles."""
    tiles = -(-DETERMINISTIC_KEYS // (schedule.splits * schedule.bk))
    return int(tiles * schedule.bk)


def attention_launches(
    config: AttentionConfig,
    schedule: Schedule,
    shape: tuple[int, int, int],
    keys: int,
    sequences: int = 0,
    most_groups: int = (1 << 31) - 1,
    *,
    head_rows: bool = False,
) -> list[Launch]:
    """The dispatches of a call, in the order of the rows that they compute.

    With the config's `max_work` none computes more scores than that, as far as whole blocks of rows
    allow: a call is cut into batch entries, those into heads, and in the forward family those into
    blocks of rows. Only such a call also keeps to the most groups that a grid takes.

    Args:
        shape: ``(B, H, Lq)`` of the queries.
        keys: how many keys a sequence has at most.
        sequences: how many packed sequences there are.
        most_groups: threadgroups of a dispatch along y and along z.
        head_rows: whether a block holds the rows of all heads that share a KV head.
    """
    batch, heads, q_len = shape
    rows = config.heads_per_kv if head_rows else 1
    columns, parts = heads // rows, schedule.value_parts
    splits = getattr(schedule, "splits", 1)
    joined = schedule.partials
    if config.deterministic and splits > 1:
        joined = joined // splits
        splits = -(-keys // split_keys(schedule))
        joined *= splits
    if config.varlen:
        blocks = q_len * rows // schedule.bq + sequences + 1
        return [Launch((blocks * splits, columns * parts, 1), shape, joined)]
    blocks = -(-q_len * rows // schedule.bq)
    if config.max_work is None:
        return [Launch((blocks * splits, columns * parts, batch), shape, joined)]
    whole = _Call(shape, keys, rows, columns, blocks, splits)
    return [
        dataclasses.replace(launch, groups=(x, y * parts, z), splits=joined)
        for launch in _cut(whole, schedule.bq, config.max_work, most_groups // parts, most_groups)
        for x, y, z in (launch.groups,)
    ]


class _Call(NamedTuple):
    """What is to be cut: its blocks of rows, of `rows` heads each, its columns of heads."""

    shape: tuple[int, int, int]
    keys: int
    rows: int
    columns: int
    blocks: int
    splits: int


def _cut(call: _Call, bq: int, most: int, most_columns: int, most_entries: int) -> Iterator[Launch]:
    (batch, heads, q_len), keys, rows, columns, blocks, splits = call
    head = max(1, q_len * rows * keys)  # scores of a head, or of the heads of a KV head
    if head * columns <= most and columns <= most_columns:
        entries = max(1, min(batch, most // (head * columns), most_entries))
        for z in range(0, batch, entries):
            n = min(entries, batch - z)
            yield Launch((blocks * splits, columns, n), (n, heads, q_len), splits, (z, 0, 0))
    elif head <= most or rows > 1 or splits > 1:
        each = max(1, min(most // head, most_columns))
        for z, y in itertools.product(range(batch), range(0, columns, each)):
            n = min(each, columns - y)
            yield Launch((blocks * splits, n, 1), (1, n * rows, q_len), splits, (z, y, 0))
    else:
        each = max(1, most // (bq * keys))
        for z, y, x in itertools.product(range(batch), range(columns), range(0, blocks, each)):
            n = min(each, blocks - x)
            length = min(q_len, (x + n) * bq) - x * bq
            yield Launch((n, 1, 1), (1, 1, length), 1, (z, y, x))
