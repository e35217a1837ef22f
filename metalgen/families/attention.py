"""What families of attention have in common: their steps, launches, outputs and counts."""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Any

from metalgen.families.base import Dispatch, Output, Step, TunedFamily
from metalgen.families.counts import CallCounts
from metalgen.families.launch import Launch, split_keys
from metalgen.features.base import Site
from metalgen.kinds import Kind, get_kind, value_width
from metalgen.languages import get_language
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Limits, Schedule

if TYPE_CHECKING:
    from metalgen.kinds.operands import Operands

COMBINE_THREADS = 128


class AttentionStep(Step):
    """A step of attention: its template has the hooks of all features, and its header those of a
    matrix kind.

    Args:
        name: of the step.
        template: its file.
        head_rows: whether the rows of all heads that share a KV head make a block.
    """

    def __init__(self, name: str, template: str, *, head_rows: bool = False) -> None:
        self.name = name
        self.template = template
        self.head_rows = head_rows

    @abc.abstractmethod
    def dispatch(
        self, config: AttentionConfig, schedule: Schedule, launch: Launch, dtype: str
    ) -> Dispatch:
        """The step's share of a launch, for queries of a type."""

    def operands(self, config: AttentionConfig, schedule: Schedule) -> Operands:
        from metalgen.families.operands import attention_operands

        return attention_operands(config, schedule, head_rows=self.head_rows)

    def site(self, config: AttentionConfig, schedule: Schedule) -> Site:
        kind = get_kind(schedule.kind)
        share = split_keys(schedule) if getattr(schedule, "splits", 1) > 1 else None
        return Site(get_language(kind.language), schedule.bk, head_rows=self.head_rows, share=share)

    def rows(self, config: AttentionConfig, schedule: Schedule) -> int:
        return schedule.bq

    def _variables(
        self, config: AttentionConfig, schedule: Schedule, width: int, splits: int, *, partial: bool
    ) -> dict[str, Any]:
        """What the templates substitute, for outputs of a width.

        Args:
            splits: outputs of a row that the kernel makes, or merges.
            partial: whether the outputs are to be merged.
        """
        kind = get_kind(schedule.kind)
        sharing = getattr(schedule, "key_simdgroups", 1)
        constants = {
            "D": config.head_dim,
            "DV": width,
            "BQ": schedule.bq,
            "BK": schedule.bk,
            "SIMDGROUPS": schedule.simdgroups,
            "ROW_BLOCKS": schedule.row_blocks,
            "ROWS": kind.row_block * schedule.row_blocks * kind.deciding_simdgroups,
            "K_FRAGMENTS": schedule.bk // sharing // 8,
            "V_FRAGMENTS": kind.padded(width) // 8,
            "HEADS_PER_KV": config.heads_per_kv,
        }
        if schedule.partials > 1:
            constants["SPLITS"] = splits
        if sharing > 1:
            constants["KEY_SIMDGROUPS"] = sharing
            constants["OWN_KEYS"] = schedule.bk // sharing
        if schedule.value_parts > 1:
            constants["VALUE_PARTS"] = schedule.value_parts
        for name in ("window_left", "window_right"):  # before the plan's, so that texts stay
            if (bound := getattr(config, name)) is not None:
                constants[name.upper()] = bound
        return {
            "constants": constants,
            "key_simdgroups": sharing,
            "splits": getattr(schedule, "splits", 1),
            "longest_first": config.causal,
            "packed": self.head_rows,
            "lse": config.return_lse,
            "partial": partial,
        }


class Attend(AttentionStep):
    """The main step: the outputs of rows, or those of shares of the keys, to be merged."""

    def inputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        return ("q", "k", "v", "scale", *extra_inputs(config))

    def outputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        if schedule.partials > 1:
            return ("out", "sums")
        return ("out", "lse") if config.return_lse else ("out",)

    def threads(self, schedule: Schedule) -> int:
        return schedule.threads

    def math_mode(self, schedule: Schedule) -> str:
        return str(getattr(schedule, "math_mode", "safe"))

    def dynamic_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        return get_kind(schedule.kind).dynamic_bytes(config, schedule)

    def variables(self, config: AttentionConfig, schedule: Schedule) -> dict[str, Any]:
        width, splits = value_width(config, schedule), getattr(schedule, "splits", 1)
        partial = schedule.partials > 1
        return self._variables(config, schedule, width, splits, partial=partial)

    def dispatch(
        self, config: AttentionConfig, schedule: Schedule, launch: Launch, dtype: str
    ) -> Dispatch:
        out, row = (*launch.shape, config.v_dim), launch.shape
        shapes = {
            "out": (out, dtype),
            "lse": (row, "float32"),
        }
        if schedule.partials > 1:
            shapes = {
                "out": ((launch.splits, *out), "float32"),
                "sums": ((launch.splits, *row, 2), "float32"),
            }
        names = self.outputs(config, schedule)
        return Dispatch(launch.groups, tuple(Output(name, *shapes[name]) for name in names))


class Combine(AttentionStep):
    """Merges the outputs of shares of the keys; one element of the output per thread."""

    def inputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        return ("parts", "sums")

    def outputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        return ("out", "lse") if config.return_lse else ("out",)

    def threads(self, schedule: Schedule) -> int:
        return COMBINE_THREADS

    def variables(self, config: AttentionConfig, schedule: Schedule) -> dict[str, Any]:
        return self._variables(config, schedule, config.v_dim, schedule.partials, partial=False)

    def dispatch(
        self, config: AttentionConfig, schedule: Schedule, launch: Launch, dtype: str
    ) -> Dispatch:
        shape = (*launch.shape, config.v_dim)
        outputs = (Output("out", shape, dtype), Output("lse", launch.shape, "float32"))
        groups = -(-math.prod(shape) // COMBINE_THREADS)
        return Dispatch((groups, 1, 1), outputs[: 1 + config.return_lse])


class AttentionFamily(TunedFamily):
    """A family whose calls compute attention; what is tuned.

    Attributes:
        head_rows: whether the rows of all heads that share a KV head make a block.
        usual_q_len: number of queries of calls that are to be expected.
    """

    head_rows: bool = False
    usual_q_len: int
    main: AttentionStep
    own = ("q",)
    traversed = ("k", "v")

    def defaults(self, kind: Kind, config: AttentionConfig, limits: Limits) -> list[dict[str, Any]]:
        return kind.defaults(config, limits, few_rows=self.head_rows)

    def registers(self, kind: Kind, config: AttentionConfig, schedule: Schedule) -> int | None:
        return kind.registers(config, schedule)

    def steps(self, schedule: Schedule) -> tuple[AttentionStep, ...]:
        return (self.main,)

    @abc.abstractmethod
    def takes(self, config: AttentionConfig, q_len: int) -> bool:
        """Whether calls of a config with so many queries belong to this family.

        The family that was registered last is asked first.
        """

    @abc.abstractmethod
    def launches(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        shape: tuple[int, int, int],
        keys: int,
        sequences: int = 0,
        most_groups: int = (1 << 31) - 1,
    ) -> list[Launch]:
        """The launches of a call, in the order of the rows that they compute.

        Args:
            shape: ``(B, H, Lq)`` of the queries.
            keys: how many keys a sequence has at most.
            sequences: how many packed sequences there are.
            most_groups: threadgroups of a launch along y and along z.
        """

    def most_kv_heads(self, config: AttentionConfig, schedule: Schedule, most_groups: int) -> int:
        """KV heads of which a launch can compute all heads, with so many threadgroups along y."""
        heads = 1 if self.head_rows else config.heads_per_kv
        return max(1, most_groups // (int(schedule.value_parts) * heads))

    @abc.abstractmethod
    def check_sizes(self, config: AttentionConfig, schedule: Schedule) -> list[tuple[int, int]]:
        """Numbers of queries and keys of the calls by which a kernel is checked."""

    @abc.abstractmethod
    def counts(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        *,
        batch_heads: int,
        q_len: int,
        kv_len: int,
    ) -> CallCounts:
        """What a call does, for the chip model.

        Args:
            batch_heads: batch entries times query heads.
            q_len, kv_len: number of queries and of keys, from 1.

        Raises:
            InvalidSchedule: a schedule with a kind that is not counted.
        """

    def bytes_read(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        *,
        batch_heads: int,
        q_len: int,
        kv_len: int,
    ) -> int:
        """Bytes of Q, K and V that a call reads, where that tells schedules apart; else 0.

        Raises:
            InvalidSchedule: as `counts`.
        """
        sizes = {"batch_heads": batch_heads, "q_len": q_len, "kv_len": kv_len}
        found = self.counts(config, schedule, **sizes).main
        return found.q_read + found.k_read + found.v_read


def extra_inputs(config: AttentionConfig) -> list[str]:
    """A kernel's inputs in addition to q, k, v and the scale, in order."""
    names = [name for each in config.features for name in each.kernel_inputs(config)]
    return names + [name for each in config.features for name in each.launch_inputs(config)]


def hidden_rows(config: AttentionConfig, schedule: Schedule) -> list[tuple[int, int]]:
    """Sizes by which some rows see no key, for configs that hide later keys."""
    if config.causal or config.window_right is not None:
        return [(schedule.bk + 9, schedule.bk + 1)]
    return []
