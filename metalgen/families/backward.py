"""The backward pass: gradients of queries by rows of queries, of keys and values by rows of keys.

Scores are recomputed from the log-sum-exp of each row, so that nothing of size Lq x Lk is kept. The
family `backward_rows` owns rows of queries and passes over keys, as the forward pass does; the
family `backward_keys` owns rows of keys and passes over the queries of all heads that share them,
with transposed scores S^T = K Q^T. Each row of a gradient is summed by one simdgroup in a fixed
order: no atomics, and the same bits every time.

The family `backward_all` makes all three gradients by one kernel that owns rows of keys: five
products for each score instead of seven. Rows of dQ are summed by float atomics, in any order.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from metalgen.errors import ArgumentError
from metalgen.families.attention import AttentionStep, extra_inputs
from metalgen.families.base import Dispatch, Output, TunedFamily
from metalgen.families.launch import Launch
from metalgen.features.base import Site, Summed
from metalgen.kinds import Kind, get_kind
from metalgen.kinds.base import Require
from metalgen.languages import get_language
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Limits, Schedule

if TYPE_CHECKING:
    from metalgen.kinds.operands import Added, Operands

MOST_COLUMNS = 256
"""Widest head dimension whose gradients fit the registers."""
MOST_COLUMNS_TOGETHER = 128
"""Widest one of which those of keys and of values both fit, next to those of queries."""

APART = Knob(
    "apart",
    (0, 1),
    "1: dK and dV by a kernel each.",
    0,
    cost="1: scores are computed twice, eight products for seven; half of the registers",
    tried=(0, 1),
)


class GradientStep(AttentionStep):
    """A kernel that makes some gradients.

    Args:
        name: of the step.
        keys_owned: whether it owns rows of keys.
        made: which gradients: ``"dq"``, or among ``"dk"`` and ``"dv"``.
    """

    summed: Summed | None = None

    def __init__(self, name: str, *, keys_owned: bool, made: tuple[str, ...]) -> None:
        super().__init__(name, "backward")
        self.keys_owned = keys_owned
        self.made = made

    def inputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        return ("q", "k", "v", "dout", "terms", "scale", *extra_inputs(config))

    def outputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        stored = self.stored
        return tuple(f"{'grad' if name in stored else 'sums'}_{name[1]}" for name in self.made)

    @property
    def stored(self) -> tuple[str, ...]:
        """Those of the gradients whose rows it owns; it adds to the others."""
        return tuple(name for name in self.made if not self.keys_owned or name != "dq")

    def threads(self, schedule: Schedule) -> int:
        return schedule.threads

    def math_mode(self, schedule: Schedule) -> str:
        return str(getattr(schedule, "math_mode", "safe"))

    def dynamic_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        return get_kind(schedule.kind).dynamic_bytes(config, schedule)

    def operands(self, config: AttentionConfig, schedule: Schedule) -> Operands:
        return (key_operands if self.keys_owned else row_operands)(config, self.made)

    def site(self, config: AttentionConfig, schedule: Schedule) -> Site:
        language = get_language(get_kind(schedule.kind).language)
        return Site(
            language,
            schedule.bk,
            keys_owned=self.keys_owned,
            backward=True,
            summed=self.summed,
        )

    def variables(self, config: AttentionConfig, schedule: Schedule) -> dict[str, Any]:
        found = self._variables(config, schedule, config.v_dim, 1, partial=False)
        kind = get_kind(schedule.kind)
        constants = found["constants"]
        constants |= {
            "D_FRAGMENTS": kind.padded(config.head_dim) // 8,
            "DV_FRAGMENTS": kind.padded(config.v_dim) // 8,
        }
        return found | {
            "keys_owned": self.keys_owned,
            "made": self.stored,
            "summed": self.summed,
            "group": config.heads_per_kv,
            "longest_first": config.causal and not self.keys_owned,
            "lse": False,
        }

    def dispatch(
        self, config: AttentionConfig, schedule: Schedule, launch: Launch, dtype: str
    ) -> Dispatch:
        width = {"dq": config.head_dim, "dk": config.head_dim, "dv": config.v_dim}
        outputs = []
        for name, each in zip(self.outputs(config, schedule), self.made, strict=True):
            added = each not in self.stored
            heads = launch.shape[1] * config.heads_per_kv
            shape = (launch.shape[0], heads, launch.others) if added else launch.shape
            outputs.append(Output(name, (*shape, width[each]), "float32" if added else dtype))
        return Dispatch(launch.groups, tuple(outputs), zeroed=self.stored != self.made)


class SumStep(GradientStep):
    """A kernel that makes sums of the gradients of scores, for one input of a call."""

    def __init__(self, summed: Summed) -> None:
        super().__init__("backward_sums", keys_owned=summed.by == "key", made=())
        self.summed = summed

    def outputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        return ("grad_sum",)

    def operands(self, config: AttentionConfig, schedule: Schedule) -> Operands:
        found = (key_operands if self.keys_owned else row_operands)(config, ("dk",))
        products = tuple(each for each in found.products if found.contracts_columns(each))
        return dataclasses.replace(found, accumulators=found.scores, products=products)

    def dispatch(
        self, config: AttentionConfig, schedule: Schedule, launch: Launch, dtype: str
    ) -> Dispatch:
        batch, heads, length = launch.shape
        if self.keys_owned:
            heads *= config.heads_per_kv
        return Dispatch(launch.groups, (Output("grad_sum", (batch, heads, length), "float32"),))


def row_operands(config: AttentionConfig, made: tuple[str, ...]) -> Operands:
    """S = Q K^T and dP = dO V^T; dQ += dX K."""
    from metalgen.kinds.operands import Accumulator, Operands, Passes, Product, operand

    q, dout, k, v = (operand(name, config) for name in ("q", "dout", "k", "v"))
    scores = tuple(Accumulator(name, "K_FRAGMENTS", "k0") for name in ("s", "dp"))
    ordered = config.causal and not config.varlen
    return Operands(
        own=(q, dout),
        traversed=(k, v),
        accumulators=(*scores, Accumulator("dq", "D_FRAGMENTS", columns="D")),
        products=(Product("dp", "dout", "v"), Product("s", "q", "k"), Product("dq", "dp", "k")),
        passes=Passes(
            *("k0", "k_begin", "k_end", "BK", "kv_len"),
            listed=config.block_mask,
            least="kv_start" if config.kv_starts else "",
        ),
        own_start="q_block * BQ",
        own_count="q_len",
        together=True,
        ordered_heads=config.heads_per_kv if ordered else 0,
    )


def key_operands(config: AttentionConfig, made: tuple[str, ...]) -> Operands:
    """S^T = K Q^T and dP^T = V dO^T; dV += P^T dO and dK += dX^T Q."""
    from metalgen.kinds.operands import Accumulator, Operands, Passes, Product, operand

    q, dout, k, v = (operand(name, config) for name in ("q", "dout", "k", "v"))
    several = config.heads_per_kv > 1
    q, dout = (dataclasses.replace(each, several_heads=several) for each in (q, dout))
    scores = [Accumulator("s", "K_FRAGMENTS", "i0")]
    products = [Product("s", "k", "q")]
    if "dk" in made:
        scores.append(Accumulator("dp", "K_FRAGMENTS", "i0"))
        products.append(Product("dp", "v", "dout"))
    results = []
    if "dv" in made:
        results.append(Accumulator("dv", "DV_FRAGMENTS", columns="DV"))
        products.append(Product("dv", "s", "dout"))
    if "dk" in made:
        results.append(Accumulator("dk", "D_FRAGMENTS", columns="D"))
        products.append(Product("dk", "dp", "q"))
    return Operands(
        own=(k, v) if "dk" in made else (k,),
        added=_added_queries(config) if "dq" in made else None,
        traversed=(q, dout),
        accumulators=(*scores, *results),
        products=tuple(products),
        passes=Passes(
            *("i0", "q_begin", "q_end", "BK", "q_used" if config.seqused_q else "q_len"),
            listed=config.block_mask,
        ),
        own_start="k_block * BQ",
        own_count="kv_len",
        together=True,
    )


def _added_queries(config: AttentionConfig) -> Added:
    """dQ += scale dX K, of the queries of a pass."""
    from metalgen.kinds.operands import Added, Product

    packed = " + first_query" if config.varlen else ""
    row = f"((int64_t(batch) * q_shape[1] + head) * q_shape[2]{packed})"
    return Added(Product("sums_q", "dp", "k"), row, "(scale2 * LN2)")


class Backward(TunedFamily):
    """Gradients by rows of queries, or by rows of keys."""

    main: GradientStep
    together = True
    deterministic_q_len = 4096

    def knobs(self, kind: Kind | None) -> tuple[Knob, ...]:
        """Those of the kind; ``bq`` counts owned rows, ``bk`` the rows of a pass."""
        return tuple(
            dataclasses.replace(knob, choices=(1,), tried=(1,))
            if knob.name == "value_parts"
            else knob
            for knob in super().knobs(kind)
        )

    def steps(self, schedule: Schedule) -> tuple[GradientStep, ...]:
        return (self.main,)

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:
        reason = unsupported(config)
        require("config", not reason, f"no backward kernels: {reason}")
        if self.main.keys_owned:
            caches = cached_by(config)
            require("config", not caches, f"no gradients of keys and values: {', '.join(caches)}")

    def defaults(self, kind: Kind, config: AttentionConfig, limits: Limits) -> list[dict[str, Any]]:
        return kind.backward_defaults(config, own=self.own)

    def launch(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        shape: tuple[int, int, int],
        sequences: int = 0,
        others: int = 0,
    ) -> Launch:
        """The launch for owned rows of a shape ``(B, heads, L)``, of so many packed sequences, that
        passes over so many other rows."""
        batch, heads, length = shape
        blocks = -(-length // schedule.bq)
        if config.varlen:  # each sequence has room for blocks of its own
            blocks = length // schedule.bq + sequences + 1
        return Launch((blocks, heads, batch), shape, others=others)


class BackwardRows(Backward):
    """Gradients of queries."""

    name = "backward_rows"
    own = ("q", "dout")
    traversed = ("k", "v")
    main = GradientStep("backward_rows", keys_owned=False, made=("dq",))


class BackwardKeys(Backward):
    """Gradients of keys and values."""

    name = "backward_keys"
    own = ("k", "v")
    traversed = ("q", "dout")
    main = GradientStep("backward_keys", keys_owned=True, made=("dk", "dv"))
    each = (
        GradientStep("backward_dk", keys_owned=True, made=("dk",)),
        GradientStep("backward_dv", keys_owned=True, made=("dv",)),
    )

    def knobs(self, kind: Kind | None) -> tuple[Knob, ...]:
        return (APART, *super().knobs(kind))

    def steps(self, schedule: Schedule) -> tuple[GradientStep, ...]:
        return self.each if schedule.apart else (self.main,)

    @property
    def possible_steps(self) -> tuple[GradientStep, ...]:
        return (self.main, *self.each)


class BackwardAll(Backward):
    """All three gradients at once."""

    name = "backward_all"
    own = ("k", "v")
    traversed = ("q", "dout")
    adds = True
    main = GradientStep("backward_all", keys_owned=True, made=("dk", "dv", "dq"))

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:
        super().check(config, schedule, require)
        widest = max(config.head_dim, config.v_dim)
        detail = f"dK and dV of {widest} columns, of at most {MOST_COLUMNS_TOGETHER}"
        require("width", widest <= MOST_COLUMNS_TOGETHER, detail)


def made_by(schedule: Schedule) -> list[str]:
    """Which gradients the kernels of a schedule make, in order."""
    family = get_backward(schedule)
    return [name for step in family.steps(schedule) for name in step.made]


def get_backward(schedule: Schedule) -> Backward:
    """The family of a backward schedule.

    Raises:
        ArgumentError: it computes no gradients.
    """
    for family in (BACKWARD_ROWS, BACKWARD_KEYS, BACKWARD_ALL):
        if family.name == schedule.family:
            return family
    known = f"{BACKWARD_ROWS.name}, {BACKWARD_KEYS.name} or {BACKWARD_ALL.name}"
    raise ArgumentError("schedule", f"one of {known}", schedule.family)


def backward_config(config: AttentionConfig) -> AttentionConfig:
    """What backward kernels of a config compute: without what is done before or behind them.

    Queries come rotated; a sink has its share in the log-sum-exp; the bits of a row depend on
    nothing else, and the work of a dispatch is not bounded.
    """
    return dataclasses.replace(
        config,
        rope=None,
        rope_dims=None,
        rope_fixed=False,
        rope_tables=False,
        sinks=False,
        return_lse=False,
        deterministic=False,
        max_work=None,
    )


def backward_families(config: AttentionConfig) -> tuple[Backward, ...]:
    """Those that make the gradients of a config one after the other: of queries, and of keys and
    values unless these are a cache."""
    return (BACKWARD_ROWS,) if cached_by(config) else (BACKWARD_ROWS, BACKWARD_KEYS)


def cached_by(config: AttentionConfig) -> list[str]:
    """Names of the features by which keys and values are a cache, without gradients."""
    return [feature.name for feature in config.features if feature.freezes_keys]


def unsupported(config: AttentionConfig) -> str:
    """Why a config has no backward kernels; empty where it has them."""
    if max(config.head_dim, config.v_dim) > MOST_COLUMNS:
        return f"head dimensions above {MOST_COLUMNS}"
    for feature in config.features:
        if not feature.has_backward:
            return str(feature.name)
    return ""


BACKWARD_ROWS = BackwardRows()
BACKWARD_KEYS = BackwardKeys()
BACKWARD_ALL = BackwardAll()
