"""Gathers matrix products that need not wait for one another, so that lanes wait once for several.

A matrix product is a call at which the lanes of a simdgroup meet; on a CPU that is 32 switches from
one stack to another, which cost more than the product. It orders nothing but its own operands and
result. So the products of a stretch of code without stores, barriers and other calls are taken
level by level: those whose operands do not come from one another are given to the runtime together,
at most BATCH of them. Each is computed as before; counts and results are the same.

The work is done on the text of LLVM's assembly after optimisation, as in reconverge.py. A call

    %r = call preserve_nonecc i64 @mg_multiply_accumulate(float a0, a1, b0, b1, c0, c1)

becomes six stores into the lane's place in a slot of its simdgroup (Product in
runtime/scheduler.h), one call of mg_multiply_accumulate_batch for all slots, and a load each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BATCH = 8
# Bytes from a slot's `a` to its `b` and its `c`, and to the next slot.
_B, _C, _SLOT = 256, 512, 768
_PRODUCT = re.compile(
    r"^  (%[\w.]+) = (?:tail )?call preserve_nonecc i64 @mg_multiply_accumulate\((.*?)\)"
    r"(?: #\d+)?(, !dbg !\d+)?"
)
_DEFINES = re.compile(r"^  (%[\w.]+|%\"[^\"]*\") = ")
_NAME = re.compile(r"%[\w.]+|%\"[^\"]*\"")
_PURE = re.compile(
    r"^  %\S+ = (?:(?:tail )?call (?!preserve)[^@]*@(?:llvm\.|mg_read_)"
    r"|load (?!atomic|volatile)"
    r"|(?:f?add|f?sub|f?mul|fdiv|fneg|shl|lshr|ashr|and|or|xor|select|icmp|fcmp|getelementptr"
    r"|fpext|fptrunc|fptosi|fptoui|sitofp|uitofp|sext|zext|trunc|bitcast|inttoptr|ptrtoint"
    r"|extractelement|insertelement|shufflevector|extractvalue|insertvalue|freeze)\b)"
)
_CURRENT = "@mg_current = external global i64, align 8\n"
_DECLARATION = """
declare preserve_nonecc void @mg_multiply_accumulate_batch(i32) #9992
attributes #9992 = { convergent nomerge nounwind }
"""


def gather_products(code: str) -> str:
    """`code`, optimised, with its matrix products gathered."""
    if "@mg_multiply_accumulate(" not in code:
        return code
    parts = re.split(r"^(?=define )", code, flags=re.MULTILINE)
    out: list[str] = []
    stretch: list[str] = []
    counter = 0
    named = [_named(p) if "@mg_multiply_accumulate(" in p else p for p in parts[1:]]
    for line in "".join([parts[0], *named]).split("\n"):
        if _PRODUCT.match(line) or (stretch and _PURE.match(line)):
            stretch.append(line)
            continue
        if stretch:
            counter = _emit(stretch, out, counter)
            stretch = []
        if not line.startswith("declare ") or "@mg_multiply_accumulate(" not in line:
            out.append(line)
    current = "" if re.search(r"^@mg_current = ", code, re.MULTILINE) else _CURRENT
    return "\n".join(out) + _DECLARATION + current


def _named(function: str) -> str:
    """`function` with names in place of numbers, which would have to stand in order."""
    end = function.index("\n}\n")
    head, _, body = function[:end].partition("\n")
    entry = len(re.findall(r"%\d+\b", head))
    head, body = (re.sub(r"%(\d+)\b", r"%v\1", text) for text in (head, body))
    body = re.sub(r"^(\d+):", r"v\1:", body, flags=re.MULTILINE)
    if not re.match(r"\S+:", body):  # the first block, which a phi may name by its number
        body = f"v{entry}:\n{body}"
    return f"{head}\n{body}{function[end:]}"


@dataclass
class _Line:
    """One instruction: `level` counts the products that must be done before it."""

    text: str
    uses: list[_Line] = field(default_factory=list)
    product: re.Match[str] | None = None
    level: int = 0
    latest: int = 1 << 30


def _emit(stretch: list[str], out: list[str], counter: int) -> int:
    lines: list[_Line] = []
    defined: dict[str, _Line] = {}
    for text in stretch:
        line = _Line(text, product=_PRODUCT.match(text))
        names = _NAME.findall(text)
        line.uses = [defined[name] for name in names[1:] if name in defined]
        line.level = max((u.level + (u.product is not None) for u in line.uses), default=0)
        defined[names[0]] = line
        lines.append(line)
    last = max(line.level for line in lines)
    # What a product needs comes just before it: registers do not survive the wait.
    for line in reversed(lines):
        if line.product is not None or line.latest == 1 << 30:
            line.latest = line.level if line.product is not None else last
        for used in line.uses:
            if used.product is None:
                used.latest = min(used.latest, line.latest)
    for level in range(last + 1):
        out += [each.text for each in lines if each.product is None and each.latest == level]
        waiting: list[re.Match[str]] = []
        for each in lines:
            if each.product is None or each.level != level:
                continue
            if waiting and (len(waiting) == BATCH or waiting[0][3] != each.product[3]):
                counter = _batch(waiting, out, counter)
                waiting = []
            waiting.append(each.product)
        if waiting:
            counter = _batch(waiting, out, counter)
    return counter


def _batch(products: list[re.Match[str]], out: list[str], counter: int) -> int:
    debug = products[0][3] or ""
    counter += 1
    before, after = f"%mgp.{counter}.a", f"%mgp.{counter}.b"
    _slots(before, out, debug)
    for slot, product in enumerate(products):
        for at, operand in enumerate(product[2].split(", ")):
            value = operand.rsplit(" ", 1)[1]
            offset = slot * _SLOT + (0, _B, _C)[at // 2] + at % 2 * 4
            place = f"%mgp.{counter}.{slot}.{at}"
            out.append(f"  {place} = getelementptr i8, ptr {before}, i64 {offset}{debug}")
            out.append(f"  store float {value}, ptr {place}, align 4{debug}")
    out.append(
        "  call preserve_nonecc void @mg_multiply_accumulate_batch"
        f"(i32 {len(products)}) #9992{debug}"
    )
    _slots(after, out, debug)
    for slot, product in enumerate(products):
        place = f"%mgp.{counter}.r{slot}"
        out.append(f"  {place} = getelementptr i8, ptr {after}, i64 {slot * _SLOT + _C}{debug}")
        out.append(f"  {product[1]} = load i64, ptr {place}, align 4{debug}")
    return counter


def _slots(name: str, out: list[str], debug: str) -> None:
    """Loads the lane's place in the slots of its simdgroup, the third word of its Lane."""
    out.append(f"  {name}.l = load ptr, ptr @mg_current, align 8{debug}")
    out.append(f"  {name}.p = getelementptr i8, ptr {name}.l, i64 16{debug}")
    out.append(f"  {name} = load ptr, ptr {name}.p, align 8{debug}")
