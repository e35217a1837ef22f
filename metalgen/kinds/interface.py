"""The interfaces between templates: what a language's macros and a matrix kind's macros are called.

A family's template knows a kind by ``tile``, the module ``kinds/KIND/tile.jinja``, and a language
by ``language``, the module ``languages/LANGUAGE/language.jinja``. Neither families nor features use
what is not declared here. Arguments and results are text: expressions and statements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Macro:
    """One macro of an interface.

    Args:
        name: of the macro.
        arguments: their names, in order.
        meaning: what it writes down.
        gives: what it hands over to its caller's block, once for each row, element, or pair.
        callers: kinds of templates that use it: ``"families"``, ``"features"``, ``"kinds"``.
    """

    name: str
    arguments: tuple[str, ...]
    meaning: str
    gives: tuple[str, ...] = ()
    callers: tuple[str, ...] = ("families",)


ALL = ("families", "features", "kinds")
LANGUAGE = (
    Macro("group_index", ("axis",), "a threadgroup's place on an axis of the grid"),
    Macro("group_count", ("axis",), "threadgroups along an axis of the grid"),
    Macro(
        "order_groups",
        ("keys",),
        "declares places for groups that should start in the order of their blocks of rows",
    ),
    Macro("ordered_index", ("axis",), "a threadgroup's place on an axis in that order"),
    Macro("thread", (), "a thread's place on the grid's x axis"),
    Macro("thread_index", (), "a thread's place in its threadgroup"),
    Macro("lane_index", (), "a thread's place in its simdgroup", callers=("kinds",)),
    Macro("simdgroup_index", (), "a simdgroup's place in its threadgroup", callers=("kinds",)),
    Macro("barrier", (), "waits for all threads of the group, and their memory", callers=ALL),
    Macro("shuffle_xor", ("x", "lanes"), "the value of the lane whose place differs in these bits"),
    Macro("length", ("name",), "rows of an array (B, H, L, D)"),
    Macro("pointer", ("type",), "the type of a pointer to elements of an input"),
    Macro("scalar", ("name",), "the value of an input that is one number", callers=("kinds",)),
    Macro(
        "add_to",
        ("place", "x"),
        "adds a float to one in an output, to which other threads may add meanwhile",
    ),
    Macro("group_array", ("type", "name", "size"), "declares an array of a threadgroup"),
    Macro("exp2", ("x",), "2 to the power of x, as exact as the type of the arrays", callers=ALL),
    Macro("tanh", ("x",), "the hyperbolic tangent of x, exact", callers=ALL),
    Macro("power_above", ("x",), "the smallest power of 2 not below x", callers=ALL),
    Macro("cos", ("x",), "the cosine, to float32's precision"),
    Macro("sin", ("x",), "the sine, to float32's precision"),
    Macro("divide", ("x", "y"), "the quotient, rounded to nearest"),
    Macro("minimum", ("x", "y"), "the smaller of two floats"),
    Macro("maximum", ("x", "y"), "the larger of two floats"),
    Macro("absolute", ("x",), "the absolute value of a float"),
    Macro("nearest", ("x",), "a float rounded to the nearest integer, halves to even"),
)
"""What every language spells."""

TILE = (
    Macro("begin", (), "types, constants, and who a thread is; the first text of a kernel"),
    Macro("simdgroup", (), "a simdgroup's place in its threadgroup"),
    Macro("row_group", (), "which ROWS rows of its threadgroup's block a simdgroup owns"),
    Macro("operands", (), "where operands begin; loads what is owned, or starts to"),
    Macro(
        "mainloop",
        ("begin_pass", "body", "whole_range"),
        "the loop over the traversed rows (`metalgen.kinds.operands.Passes`). "
        "`begin_pass(masking)` is what a pass begins with; it declares `live`: whether the "
        "simdgroup takes part. `body(masking)` stands between the products that contract columns "
        "and those that contract the pass's rows. A kind may write passes in which nothing is "
        "masked apart from the others: `masking` is 'never' in those and 'always' in the others, "
        "else 'tested' in all. `whole_range(ahead)` declares which passes mask nothing and have "
        "the rows of so many passes behind them (none: no pass may be written apart)",
    ),
    Macro(
        "next_head",
        (),
        "goes on to the next head of operands that are passed over for several, after a main loop",
    ),
    Macro("row_state", ("name", "value"), "declares a float for each of a lane's rows"),
    Macro("accumulator", ("name",), "declares an accumulator, zero"),
    Macro("rows", (), "each row of which a lane has elements", gives=("r",)),
    Macro("row", ("r",), "the place of a lane's row r among the owned rows", callers=ALL),
    Macro(
        "elements",
        ("name", "r"),
        "each element of row r of an accumulator that a lane has, with the place of its column "
        "among the traversed rows (keys, where queries are owned)",
        gives=("element", "column"),
    ),
    Macro(
        "element_of",
        ("name", "r"),
        "the element of another accumulator of the same columns at the place of the one that "
        "`elements` gives",
    ),
    Macro(
        "scale_row",
        ("name", "r", "factor"),
        "multiplies row r of an output, at once or when the products that add to it have ended",
    ),
    Macro("seldom", (), "the first statement of a branch over elements that is seldom taken"),
    Macro(
        "first_column",
        ("name",),
        "the place among the traversed rows of the first column of an accumulator that a lane has",
    ),
    Macro(
        "steps",
        ("name", "r"),
        "each element of row r of an accumulator that a lane has, with how many columns it lies "
        "behind the lane's first one, a number that the compiler knows",
        gives=("element", "step"),
    ),
    Macro(
        "pairs",
        ("name", "r"),
        "each two neighbours of row r that a lane has: in fragment f, 8 columns wide, counted "
        "from the first one of the simdgroup's in this pass, pair n of four",
        gives=("first", "second", "f", "n"),
    ),
    Macro("row_max", ("x",), "the maximum over the lanes that share a row"),
    Macro("row_sum", ("x",), "the sum over the lanes that share a row"),
    Macro("store_row", ("name", "r", "values"), "stores the numbers of row r, once for each row"),
    Macro("store", ("name", "array"), "stores the rows of an output that are there"),
)
"""What every matrix kind's tile library has."""

REGISTERS = (
    "begin",
    "simdgroup",
    "row_group",
    "row",
    "row_leader",
    "row_max",
    "row_sum",
    "row_state",
    "accumulator",
    "scores",
    "rows",
    "elements",
    "element_of",
    "scale_row",
    "seldom",
    "first_column",
    "steps",
    "pairs",
)
"""What ``registers.jinja`` has, which one kind may take from another."""
