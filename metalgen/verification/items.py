"""What a verification runs: types and widths, features, user functions, cache appends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from metalgen.append.launch import kernel_rows, rows_fault
from metalgen.calls.verify import Verification, verify
from metalgen.devices import Device
from metalgen.errors import InvalidSchedule
from metalgen.families import Limits, attention_families, default_schedule, get_attention
from metalgen.families.append import append_schedule
from metalgen.kinds import kinds_in
from metalgen.problem.config import AttentionConfig
from metalgen.testing.cases import BY_TILES, DTYPES, FEATURES
from metalgen.testing.fuzz import fault, functions, made_up

WIDTHS = (64, 128)
"""Head dimensions of a quick verification."""
ALL_WIDTHS = (32, 40, 64, 72, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head dimensions of a full one."""
COMBINATIONS = 200
"""Random combinations of features and schedules in a full one."""
APPENDS: dict[str, AttentionConfig] = {
    "rows": AttentionConfig(64, kv_lens=True),
    "rotated pages": AttentionConfig(64, kv_lens=True, page_size=8, rope="half"),
    "quantized to 8 bits": AttentionConfig(64, kv_lens=True, kv_bits=8, kv_group=32),
    "packed, quantized to 4 bits": AttentionConfig(
        64, varlen=True, kv_lens=True, page_size=8, kv_bits=4, kv_group=64
    ),
}


@dataclass(frozen=True)
class Item:
    """One kernel to check.

    Args:
        group: what it is about: ``"types"``, ``"features"``, ``"functions"``, ``"append"`` or
            ``"combinations"``.
        name: unique in its group.
        run: ``run(device)`` executes it and compares it with its reference.
    """

    group: str
    name: str
    run: Callable[[Device], Verification]


def items(device: Device, *, full: bool = False) -> Iterator[Item]:
    """Everything that a device is verified with, in groups.

    Args:
        device: its language says which types there are, its limits which schedules.
        full: all types and widths of every feature, and `COMBINATIONS` random combinations; else
            two widths of each type, and one type of each feature, which takes about a minute.
    """
    dtypes = types_of(device)
    for dtype in dtypes:
        for width in ALL_WIDTHS if full else WIDTHS:
            config = AttentionConfig(width, dtype, heads_per_kv=2, causal=True, return_lse=True)
            yield from _attention("types", f"{dtype} D={width}", config, device)
    for number, (name, fields) in enumerate((FEATURES | BY_TILES).items()):
        for dtype in dtypes if full else (dtypes[number % len(dtypes)],):
            config = AttentionConfig(64, dtype, heads_per_kv=2, return_lse=True, **fields)
            yield from _attention("features", f"{name} ({dtype})", config, device)
    scores, masks = functions()
    plain = AttentionConfig(64, dtypes[0], heads_per_kv=2, return_lse=True)
    for number, text in enumerate(scores, 1):
        config = replace(plain, score_mod=text)
        yield from _attention("functions", f"score function {number}", config, device)
    for number, text in enumerate(masks, 1):
        for blocks in (False, True):
            name = f"mask function {number}{' with a block mask' if blocks else ''}"
            config = replace(plain, mask_mod=text, block_mask=blocks)
            yield from _attention("functions", name, config, device)
    for name, config in APPENDS.items() if device.language else ():
        yield Item("append", name, partial(_append, config))
    for number in range(COMBINATIONS if full else 0):
        yield Item("combinations", f"number {number}", partial(_combination, number))


def types_of(device: Device) -> list[str]:
    """The types that a device computes in: those of its language's kernels, or all of plain MLX."""
    if device.language is None:
        return list(DTYPES)
    return [dtype for dtype in DTYPES if dtype in kinds_in(device.language)[0].dtypes]


def _attention(group: str, name: str, config: AttentionConfig, device: Device) -> Iterator[Item]:
    """One item for each family that computes a config, by its default schedule."""
    for family in attention_families():
        if not _computes(config, device.limits, family):
            continue

        def run(device: Device, family: str = family) -> Verification:
            return verify(device, config, default_schedule(config, device.limits, family))

        yield Item(group, f"{name}, {family}", run)


def _computes(config: AttentionConfig, limits: Limits, family: str) -> bool:
    """Whether a family has a schedule for a config."""
    try:
        schedule = default_schedule(config, limits, family)
        get_attention(family).check_sizes(config, schedule)
    except InvalidSchedule:
        return False
    return True


def _append(config: AttentionConfig, device: Device) -> Verification:
    """The rows that an append's kernel makes, against plain MLX operations."""
    detail = rows_fault(config, kernel_rows(config, device, append_schedule()))
    return Verification(not detail, 0.0, 0.0, "a small ragged cache", detail)


def _combination(number: int, device: Device) -> Verification:
    """A random combination of features and of a schedule, as the fuzz of the suites makes it."""
    case = made_up(number, device.limits, small=True)
    detail = fault(device, case)
    shape = f"Lq={case.q_len} Lk={case.kv_len}"
    return Verification(not detail, 0.0, 0.0, shape, f"{detail}\n{case}" if detail else "")
