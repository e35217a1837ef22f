"""Instruments a kernel's code for the checked mode: every access to memory calls the runtime.

It works on the text of the code that clang emits before any optimisation (LLVM's assembly, of one
pinned version), where each load and store of the program stands once, with its address space and
its source line. So the counts are those of the program as written, whatever is optimised later.

- a load or store through a device, threadgroup, constant or unqualified pointer first calls
  mg_read_* or mg_write_* (runtime/checker.cpp), and uses the address that the call returns: the
  same one, or harmless memory when the access is out of bounds;
- a structure's copy does so for its source and its target, as a range;
- a division calls mg_divisor_*, which reports a zero and returns a divisor that does not trap;
- a shift, whose count clang masks in this language, first reports a count out of range;
- then all address spaces become one, as the processor has it.
"""

from __future__ import annotations

import re

# Address spaces of clang's -ffake-address-space-map.
_SPACES = {"1": "device", "2": "constant", "3": "threadgroup", "4": "any"}

_LOAD = re.compile(
    r"^(  %\S+ = load (?:volatile )?)(.+), ptr addrspace\((\d)\) (%[\w.]+), align (\d+)(.*)$"
)
_STORE = re.compile(
    r"^(  store (?:volatile )?)(.+), ptr addrspace\((\d)\) (%[\w.]+), align (\d+)(.*)$"
)
_COPY = re.compile(
    r"^(  call void @llvm\.mem(?:cpy|move|set)\.)(\S*?)\((ptr(?: addrspace\((\d)\))?)([^%@,]*)"
    r"([%@][\w.]+), (?:(ptr(?: addrspace\((\d)\))?)([^%@,]*)([%@][\w.]+)|(i8 \S+)), "
    r"(i64 \S+?), (.*)$"
)
_DIVISION = re.compile(
    r"^(  %\S+ = )([su])(div|rem)( exact)? (i8|i16|i32|i64) (\S+), (%\S+?)(, !dbg.*)?$"
)
_MASK = re.compile(r"^  (%\S+) = and (i16|i32|i64) (%\S+), (\d+)(, !dbg.*)?$")
_SHIFT = re.compile(
    r"^  %\S+ = (?:shl|lshr|ashr)(?: nuw| nsw| exact)* (i\d+) \S+, (%\S+?)(, !dbg.*)?$"
)
_DEBUG = re.compile(r", (!dbg !\d+)")
_SPACE = re.compile(r" addrspace\(\d\)")
_INTRINSIC = re.compile(r"(@llvm\.[\w.]+)")
_SPACE_SUFFIX = re.compile(r"\.p[1-9](?=\.|$)")
_STRUCT = re.compile(r"^(%\S+) = type (.*)$", re.MULTILINE)

_SCALARS = {"half": 2, "bfloat": 2, "float": 4, "double": 8}
_DECLARATIONS = (
    "\n".join(
        f"declare ptr @mg_{what}_{space}(ptr, i32) #9990"
        for what in ("read", "write")
        for space in _SPACES.values()
    )
    + """
declare ptr @mg_read_range(ptr, i64, i32) #9990
declare ptr @mg_write_range(ptr, i64, i32) #9990
declare i64 @mg_divisor(i64, i64, i32) #9990
declare void @mg_shift(i64, i32) #9990
attributes #9990 = { nounwind willreturn memory(inaccessiblemem: readwrite) }
"""
)


def instrument(code: str) -> str:
    """The instrumented form of `code`, LLVM assembly before optimisation."""
    structs = dict(_STRUCT.findall(code))
    out: list[str] = []
    counter = 0
    lines = code.split("\n")
    masks: dict[str, tuple[str, str, str]] = {}
    for line in lines:
        if not line.startswith("  "):
            out.append(line)
            masks.clear()
            continue
        if "addrspace" in line and (match := _LOAD.match(line) or _STORE.match(line)):
            head, what, space, pointer, align, tail = match.groups()
            access = "read" if " = load" in head else "write"
            kind = what if access == "read" else _type_of(what)
            size = size_of(kind, structs) or int(align)
            counter += 1
            info = size | int(align) << 16
            out.append(
                f"  %mg.{counter} = call ptr @mg_{access}_{_SPACES[space]}"
                f"(ptr {pointer}, i32 {info}){_debug(line)}"
            )
            out.append(f"{head}{what}, ptr %mg.{counter}, align 1{tail}")
            continue
        if "@llvm.mem" in line and (match := _COPY.match(line)):
            counter = _copy(match, out, counter, line)
            continue
        if (match := _DIVISION.match(line)) is not None:
            counter = _division(match, out, counter, line)
            continue
        if (match := _MASK.match(line)) is not None:
            masks[match[1]] = (match[2], match[3], match[4])
        elif (match := _SHIFT.match(line)) is not None and match[2] in masks:
            counter = _shift(match, masks[match[2]], out, counter, line)
        out.append(line)
    return _one_space("\n".join(out)) + "\n" + _DECLARATIONS


def _debug(line: str) -> str:
    found = _DEBUG.search(line)
    return f", {found[1]}" if found else ""


def _type_of(typed_value: str) -> str:
    """The type in `type value`."""
    depth = 0
    for i, c in enumerate(typed_value):
        if c in "<[{(":
            depth += 1
        elif c in ">]})":
            depth -= 1
        elif c == " " and depth == 0 and not typed_value.startswith("ptr addrspace"):
            return typed_value[:i]
    return typed_value.rsplit(" ", 1)[0]


def size_of(kind: str, structs: dict[str, str]) -> int | None:
    """Bytes of an LLVM type, or None for one that no access here has."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind.startswith("ptr"):
        return 8
    if re.fullmatch(r"i\d+", kind):
        return (int(kind[1:]) + 7) // 8
    if match := re.fullmatch(r"[<\[](\d+) x (.*)[>\]]", kind):
        inner = size_of(match[2], structs)
        return None if inner is None else int(match[1]) * inner
    if kind in structs:
        return size_of(structs[kind], structs)
    if match := re.fullmatch(r"\{ (.*) \}", kind):
        parts = [size_of(p, structs) for p in re.split(r", (?![^<\[]*[>\]])", match[1])]
        return sum(p for p in parts if p is not None) if None not in parts else None
    return None


def _copy(match: re.Match[str], out: list[str], counter: int, line: str) -> int:
    head, _, _, to_space, to_attr, to = match.groups()[:6]
    _, from_space, from_attr, source, value, size, tail = match.groups()[6:]
    debug = _debug(line)
    if from_space and source.startswith("%"):
        counter += 1
        out.append(
            f"  %mg.{counter} = call ptr @mg_read_range(ptr {source}, {size}, "
            f"i32 {_alignment(from_attr)}){debug}"
        )
        source, from_attr = f"%mg.{counter}", " "
    if to_space and to.startswith("%"):
        counter += 1
        out.append(
            f"  %mg.{counter} = call ptr @mg_write_range(ptr {to}, {size}, "
            f"i32 {_alignment(to_attr)}){debug}"
        )
        to, to_attr = f"%mg.{counter}", " "
    if value:
        out.append(f"{head}p0.i64(ptr{to_attr}{to}, {value}, {size}, {tail}")
    else:
        out.append(f"{head}p0.p0.i64(ptr{to_attr}{to}, ptr{from_attr}{source}, {size}, {tail}")
    return counter


def _alignment(attributes: str) -> str:
    """The alignment among a pointer operand's attributes."""
    found = re.search(r"align (\d+)", attributes)
    return found[1] if found else "1"


def _division(match: re.Match[str], out: list[str], counter: int, line: str) -> int:
    head, sign, what, exact, kind, left, right, tail = match.groups()
    bits, debug = int(kind[1:]), _debug(line)
    extend = "sext" if sign == "s" else "zext"
    wide = []
    for operand in (left, right):
        counter += 1
        if bits == 64:
            out.append(f"  %mg.{counter} = add i64 {operand}, 0{debug}")
        else:
            out.append(f"  %mg.{counter} = {extend} {kind} {operand} to i64{debug}")
        wide.append(f"%mg.{counter}")
    counter += 1
    code = bits | (128 if sign == "s" else 0)
    out.append(
        f"  %mg.{counter} = call i64 @mg_divisor(i64 {wide[0]}, i64 {wide[1]}, i32 {code}){debug}"
    )
    safe = f"%mg.{counter}"
    if bits != 64:
        counter += 1
        out.append(f"  %mg.{counter} = trunc i64 {safe} to {kind}{debug}")
        safe = f"%mg.{counter}"
    out.append(f"{head}{sign}{what}{exact or ''} {kind} {left}, {safe}{tail or ''}")
    return counter


def _shift(
    match: re.Match[str], masked: tuple[str, str, str], out: list[str], counter: int, line: str
) -> int:
    kind, operand, mask = masked
    width = int(match[1][1:])
    if int(mask) != width - 1:
        return counter
    counter += 1
    debug = _debug(line)
    if kind == "i64":
        out.append(f"  %mg.{counter} = add i64 {operand}, 0{debug}")
    else:
        out.append(f"  %mg.{counter} = sext {kind} {operand} to i64{debug}")
    out.append(f"  call void @mg_shift(i64 %mg.{counter}, i32 {width}){debug}")
    return counter


def _one_space(code: str) -> str:
    """`code` with all address spaces made the default one."""
    code = _SPACE.sub("", code).replace("addrspacecast", "bitcast")
    code = _INTRINSIC.sub(lambda m: _SPACE_SUFFIX.sub(".p0", m[1]), code)
    seen: set[str] = set()
    kept = []
    for line in code.split("\n"):
        if line.startswith("declare "):
            name = line.split("@", 1)[1].split("(", 1)[0]
            if name in seen:
                continue
            seen.add(name)
        kept.append(line)
    return "\n".join(kept)
