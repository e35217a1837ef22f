"""The source transformation: Metal's spelling into C++ for OpenCL, over preprocessed tokens.

Metal and C++ for OpenCL agree on address spaces, vectors and swizzles. What they spell differently
is rewritten here, rule by rule, and every line stays where it was:

- attributes go; kernels become plain functions, and their parameters are noted;
- explicit instantiations of kernels go, and are noted;
- `threadgroup T x[n];` becomes a reference into the threadgroup's memory;
- vector constructors and casts become calls that convert values (clang would reinterpret bits);
- `thread` goes from constructors, conversion operators and references to const, which C++ for
  OpenCL wants unqualified;
- function constants get their values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .kernels import ATTRIBUTES, Instantiation, Kernel, Parameter, attribute_of
from .tokens import Tokens

SCALARS = frozenset(
    """bool char uchar short ushort int uint long ulong half float bfloat size_t ptrdiff_t
    int8_t uint8_t int16_t uint16_t int32_t uint32_t int64_t uint64_t""".split()
)
_VECTOR = re.compile(r"(bool|u?char|u?short|u?int|u?long|half|float|bfloat)[234]$")
_BFLOAT_LITERAL = re.compile(r"([\d.]+(?:[eE][+-]?\d+)?)(bf|BF)$")
_BFLOATS = frozenset(("bfloat", "bfloat16_t"))
# After one of these, `(T)x` is a cast and `T(x)` a construction.
_BEFORE_EXPRESSION = frozenset(
    "( , = + - * / % < > ? : ! ~ & | ^ && || == != <= << [ { } ; += -= *= /= "
    "%= &= |= ^= <<= return case else do".split()
)


class TransformError(Exception):
    """Metal that the transformation cannot take; `line` counts in the user's text (0: unknown)."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Transformed:
    """C++ for OpenCL, line by line the Metal it came from, and what was noted on the way."""

    text: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    instantiations: dict[str, Instantiation] = field(default_factory=dict)
    function_constants: dict[str, int] = field(default_factory=dict)


def transform(
    text: str,
    constants: Mapping[str | int, object] | None = None,
    *,
    thorough: bool = False,
    merged: bool = False,
) -> Transformed:
    """Rewrites preprocessed Metal `text`; `constants` gives function constants by name or index.

    A cast to a template's type parameter is rewritten only if `thorough`: the type is seldom a
    vector, and the rewritten form takes longer to compile. If `merged`, constant memory becomes a
    part of device memory: C++ for OpenCL cannot copy a whole structure out of constant memory.
    Raises TransformError for a malformed kernel declaration.
    """
    tokens = Tokens(text)
    result = Transformed("")
    _function_constants(tokens, result, constants or {})
    _kernels(tokens, result)
    _attributes(tokens)
    _address_spaces(tokens)
    _threadgroup_variables(tokens)
    _vectors(tokens, thorough)
    if merged:
        _merge_constant(tokens)
    result.text = tokens.text()
    return result


def literal(value: object) -> str:
    """A function constant's value as C++."""
    if getattr(value, "ndim", None) == 0:  # of NumPy, or an array without axes
        value = value.item()  # type: ignore[attr-defined]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value != value:
            return '__builtin_nanf("")'
        if value in (float("inf"), float("-inf")):
            return ("-" if value < 0 else "") + "__builtin_inff()"
        return f"(float){value!r}f" if "." in repr(value) or "e" in repr(value) else f"{value!r}.0f"
    return f"{value}"


def _attribute_end(tokens: Tokens, at: int) -> int | None:
    """The last `]` of the attribute list `[[...]]` that starts at `at`, or None."""
    if tokens.word(at) == "[" and tokens.word(at + 1) == "[":
        end = tokens.close(at)
        if tokens.close(at + 1) == end - 1:
            return end
    return None


def _attribute_list(tokens: Tokens, at: int, end: int) -> list[tuple[str, str]]:
    inner = tokens.split(at + 2, end - 2)
    return [attribute_of(tokens.words[a : b + 1]) for a, b in inner]


def _function_constants(
    tokens: Tokens, result: Transformed, constants: Mapping[str | int, object]
) -> None:
    for at in range(len(tokens)):
        if tokens.word(at) == "function_constant" and tokens.word(at - 2) == "[":
            start = at - 2
            end = _attribute_end(tokens, start)
            if end is None or tokens.word(end + 1) != ";":
                continue
            index_words = tokens.words[at + 2 : tokens.close(at + 1)]
            index = (
                int(index_words[0], 0) if len(index_words) == 1 and index_words[0].isdigit() else -1
            )
            name = tokens.word(start - 1)
            result.function_constants[name] = index
            value = constants.get(name, constants.get(index))
            tokens.blank(start, end)
            tokens.append(end, f"= {literal(value)}" if value is not None else "= {}")
    for at in range(len(tokens)):
        if tokens.word(at) == "is_function_constant_defined" and tokens.word(at + 1) == "(":
            name = tokens.word(at + 2)
            given = name in constants or result.function_constants.get(name, -1) in constants
            tokens.blank(at, tokens.close(at + 1))
            tokens.set(at, "true" if given else "false")


def _kernels(tokens: Tokens, result: Transformed) -> None:
    at = 0
    while at < len(tokens):
        word = tokens.word(at)
        if word == "template" and tokens.word(at + 1) != "<":
            at = _instantiation(tokens, at, result)
            continue
        is_kernel = word == "kernel" and tokens.word(at - 1) not in (".", "->", "::")
        end = _attribute_end(tokens, at)
        if end is not None and any(n == "kernel" for n, _ in _attribute_list(tokens, at, end)):
            tokens.blank(at, end)
            tokens.set(at, "inline")  # so that the kernels that are not called make no code
            is_kernel, at = True, end
        elif is_kernel and (tokens.is_name(at + 1) or tokens.word(at + 1) == "["):
            tokens.set(at, "inline")
        else:
            is_kernel = False
        if is_kernel:
            at = _kernel(tokens, at + 1, result)
        at += 1


def _instantiation(tokens: Tokens, at: int, result: Transformed) -> int:
    """Notes and removes an explicit instantiation of a kernel; returns the next position."""
    host_name = ""
    is_kernel = False
    i = at + 1
    while True:
        end = _attribute_end(tokens, i)
        if end is not None:
            for name, argument in _attribute_list(tokens, i, end):
                if name == "host_name":
                    host_name = "".join(s.strip().strip('"') for s in argument.split('" "'))
                is_kernel |= name == "kernel"
            i = end + 1
        elif tokens.word(i) == "kernel":
            is_kernel = True
            i += 1
        else:
            break
    last = i
    while last < len(tokens) and tokens.word(last) != ";":
        last = tokens.close(last) if tokens.word(last) in ("(", "[", "{") else last
        last += 1
    if not is_kernel and not host_name:
        return last + 1
    if tokens.word(i) == "decltype":
        i = tokens.close(i + 1) + 1
        expression = tokens.source(i, last - 1)
    else:  # template void name<arguments>(parameters);
        i += 1
        stop = last - 1
        while stop > i and tokens.word(stop) != ")":
            stop -= 1
        expression = tokens.source(i, tokens.opening(stop) - 1)
    result.instantiations[host_name or expression] = Instantiation(
        host_name or expression, expression
    )
    tokens.blank(at, last)
    return last + 1


def _kernel(tokens: Tokens, at: int, result: Transformed) -> int:
    """Notes the kernel whose declaration goes on at `at`; returns its parameters' last position."""
    i = at
    while i < len(tokens) and tokens.word(i) != "(":
        if tokens.word(i) in (";", "{", "}"):
            raise TransformError("a kernel's declaration has no parameter list")
        end = _attribute_end(tokens, i)
        if end is not None:
            i = end
        elif tokens.word(i) == "__attribute__":
            i = tokens.close(i + 1)
        i += 1
    name, close = tokens.word(i - 1), tokens.close(i)
    if not tokens.is_name(i - 1):
        raise TransformError("a kernel's declaration has no name")
    parameters: list[Parameter] = []
    next_index = 0
    for first, last in tokens.split(i + 1, close - 1):
        parameter = _parameter(tokens, first, last, next_index, name)
        if parameter.kind == "buffer":
            next_index = parameter.index + 1
        parameters.append(parameter)
    start = at - 1
    while start > 0 and tokens.word(start - 1) not in (";", "}", "{", ">"):
        start -= 1
    is_template = tokens.word(start - 1) == ">"
    result.kernels[name] = Kernel(name, tuple(parameters), is_template)
    return close


def _parameter(tokens: Tokens, first: int, last: int, next_index: int, kernel: str) -> Parameter:
    attributes: list[tuple[str, str]] = []
    words: list[str] = []
    i = first
    while i <= last:
        end = _attribute_end(tokens, i)
        if end is not None:
            attributes += _attribute_list(tokens, i, end)
            i = end + 1
        else:
            words.append(tokens.word(i))
            i += 1
    name, kind = words[-1], " ".join(words[:-1])
    named = dict(attributes)
    for attribute in named:
        if attribute in ATTRIBUTES:
            return Parameter(name, "position", kind, attribute=attribute)
    if "threadgroup" in named:
        return Parameter(name, "threadgroup", kind, int(named["threadgroup"] or 0))
    if "buffer" in named or "device" in words or "constant" in words:
        index = named.get("buffer", "")
        return Parameter(name, "buffer", kind, int(index) if index.isdigit() else next_index)
    raise TransformError(
        f"parameter {name!r} of kernel {kernel!r} needs an attribute such as [[buffer(0)]] or "
        f"[[thread_position_in_grid]], but has "
        + (", ".join(n for n, _ in attributes) if attributes else "none")
    )


def _attributes(tokens: Tokens) -> None:
    at = 0
    while at < len(tokens):
        if tokens.word(at) == "[" and (end := _attribute_end(tokens, at)) is not None:
            if tokens.texts[tokens.code[at]] == "[":  # not removed before
                tokens.blank(at, end)
            at = end
        at += 1


def _address_spaces(tokens: Tokens) -> None:
    structures = {
        tokens.word(i + 1)
        for i in range(len(tokens))
        if tokens.word(i) in ("struct", "class", "union") and tokens.is_name(i + 1)
    }
    structures |= _aligned_structures(tokens)
    for at in range(len(tokens)):
        if tokens.word(at) != "thread":
            continue
        before = at - 1
        while tokens.word(before) in ("const", "volatile", "noexcept"):
            before -= 1
        if tokens.word(before) == ")":
            if _is_constructor(tokens, tokens.opening(before), structures):
                tokens.set(at, "")
        elif _refers_to_const(tokens, at):
            tokens.set(at, "")


def _aligned_structures(tokens: Tokens) -> set[str]:
    """The names in `struct alignas(n) name`."""
    found = set()
    for i in range(len(tokens)):
        if tokens.word(i) in ("struct", "class") and tokens.word(i + 1) in (
            "alignas",
            "__attribute__",
        ):
            found.add(tokens.word(tokens.close(i + 2) + 1))
    return found


def _is_constructor(tokens: Tokens, opening: int, structures: set[str]) -> bool:
    """Whether the parameter list at `opening` is a constructor's or a conversion operator's."""
    if tokens.word(opening - 1) in structures:
        return True
    i = opening - 1
    while i > 0 and (tokens.is_name(i) or tokens.word(i) in ("::", "<", ">", "*", "&", ",")):
        if tokens.word(i) == "operator":
            return i < opening - 1 and tokens.is_name(i + 1)
        i -= 1
    return False


def _refers_to_const(tokens: Tokens, at: int) -> bool:
    """Whether the `thread` at `at` qualifies a reference to const."""
    const = tokens.word(at - 1) == "const"
    i = at + 1
    while True:
        word = tokens.word(i)
        if word == "const":
            const = True
        elif word == "<":
            end = tokens.close_angle(i)
            if end is None:
                return False
            i = end
        elif word == "&":
            return const
        elif not (tokens.is_name(i) or word == "::") or tokens.word(i + 1) in ("(", "=", ";", ","):
            return False
        i += 1


def _merge_constant(tokens: Tokens) -> None:
    """`constant` to `const device`, but where it qualifies a member function."""
    for at in range(len(tokens)):
        before = at - 2 if tokens.word(at - 1) == "const" else at - 1
        if tokens.word(at) == "constant" and tokens.word(before) != ")":
            tokens.set(at, "const __global")


def _threadgroup_variables(tokens: Tokens) -> None:
    """`threadgroup T x[n], y;` into references to the threadgroup's memory."""
    count = 0
    for at in range(len(tokens)):
        if tokens.word(at) != "threadgroup":
            continue
        start = at
        while tokens.word(start - 1) in ("static", "const", "volatile"):
            start -= 1
        if (
            tokens.word(start - 1) == ")"
            and tokens.word(tokens.opening(start - 1) - 1) == "alignas"
        ):
            start = tokens.opening(start - 1) - 1
        if tokens.word(start - 1) not in (";", "{", "}"):
            continue
        i = at + 1
        while tokens.is_name(i) or tokens.word(i) in ("::", "<"):
            if tokens.word(i) == "<":
                end = tokens.close_angle(i)
                if end is None:
                    break
                i = end
            elif tokens.word(i) == "alignas":
                i = tokens.close(i + 1)
            i += 1
        if tokens.word(i) not in ("[", ";", ",") or not tokens.is_name(i - 1):
            continue
        kind = tokens.source(at + 1, i - 2)
        end = i
        while tokens.word(end) != ";":
            end = tokens.close(end) if tokens.word(end) in ("(", "[", "{") else end
            end += 1
        declarations = []
        for first, last in tokens.split(i - 1, end - 1):
            name = tokens.word(first)
            if "=" in tokens.words[first : last + 1]:  # Metal ignores the initial value
                last = tokens.words.index("=", first) - 1
            extent = _mapped(tokens.source(first + 1, last)) if last > first else ""
            declarations.append(
                f"typedef {_mapped(kind)} mg_type_{name}{extent}; __local mg_type_{name}& {name} = "
                f"*(__local mg_type_{name}*)mg_threadgroup_variable({count}, "
                f"sizeof(mg_type_{name}), alignof(mg_type_{name}))"
            )
            count += 1
        tokens.blank(start, end - 1)
        tokens.set(start, "; ".join(declarations))


def _mapped(text: str) -> str:
    return re.sub(r"\bvec\b(?= <)", "mapped_vec", text)


def _vectors(tokens: Tokens, thorough: bool) -> None:
    aliases = _vector_aliases(tokens)
    if thorough:
        aliases |= {
            tokens.word(i + 1)
            for i in range(len(tokens))
            if tokens.word(i) in ("typename", "class") and tokens.word(i + 2) in (",", ">", "=")
        }
    typedef_until = -1
    for at in range(len(tokens)):
        word = tokens.word(at)
        if word in ("typedef", "using") and tokens.word(at - 1) != ">":
            typedef_until = at
            while tokens.word(typedef_until) not in (";", "{", ""):
                typedef_until += 1
        if word == "vec" and tokens.word(at + 1) == "<":
            element = tokens.word(at + 2)
            if element == "bool" or (at < typedef_until and element not in SCALARS):
                tokens.set(at, "mapped_vec")
        end = _vector_type(tokens, at)
        if end is None and word in aliases and tokens.is_name(at):
            end = at
        if end is not None:
            _vector_expression(tokens, at, end)
        elif word == "static_cast" and tokens.word(at + 1) == "<":
            last = (tokens.close_angle(at + 1) or at + 2) - 1
            if not {"*", "&"} & set(tokens.words[at + 2 : last + 1]):
                tokens.set(at, "mg::cast")
        elif (
            word in _BFLOATS
            and tokens.word(at + 1) == "("
            and (tokens.word(at - 1) in _BEFORE_EXPRESSION)
        ):
            tokens.set(at, f"mg::cast<{word}>")
        elif tokens.kinds[at] == "number" and (match := _BFLOAT_LITERAL.match(word)):
            digits = match.group(1)
            tokens.set(
                at,
                f"((bfloat){digits if '.' in digits or 'e' in digits.lower() else digits + '.0'}f)",
            )


def _vector_aliases(tokens: Tokens) -> set[str]:
    """Names that `using name = V;` or `typedef V name;` give to a vector type V."""
    found: set[str] = set()
    for at in range(len(tokens)):
        if tokens.word(at) == "using" and tokens.word(at + 2) == "=":
            first = at + 4 if tokens.word(at + 3) == "typename" else at + 3
            end = _vector_type(tokens, first)
            if end is not None and tokens.word(end + 1) == ";":
                found.add(tokens.word(at + 1))
        elif tokens.word(at) == "typedef":
            end = _vector_type(tokens, at + 1)
            if end is not None and tokens.word(end + 2) == ";":
                found.add(tokens.word(end + 1))
    return found


def _vector_type(tokens: Tokens, at: int) -> int | None:
    """The last position of the vector type that starts at `at`, or None."""
    if not tokens.is_name(at) or tokens.word(at - 1) in (".", "->"):
        return None
    start = at
    if tokens.word(at) == "metal" and tokens.word(at + 1) == "::":
        at += 2
    elif tokens.word(at - 1) == "::":
        return None
    word = tokens.word(at)
    if word == "vec" and tokens.word(at + 1) == "<":
        return tokens.close_angle(at + 1)
    return at if _VECTOR.match(word) and start <= at else None


def _vector_expression(tokens: Tokens, at: int, end: int) -> None:
    """Rewrites `V(...)`, `(V)x` and `V x(...);`, where at..end spells the vector type V."""
    before, after = tokens.word(at - 1), tokens.word(end + 1)
    spelled = "".join(tokens.texts[tokens.code[i]] + " " for i in range(at, end + 1)).strip()
    if after == "(" and before in _BEFORE_EXPRESSION | {"*"}:
        if before == ">" and tokens.word(at - 2) in SCALARS:
            return
        tokens.blank(at, end)
        tokens.set(at, f"mg::make<{spelled}>")
    elif tokens.is_name(end + 1) and tokens.word(end + 2) == "(":
        close = tokens.close(end + 2)
        if tokens.word(close + 1) == ";" and _are_values(tokens, end + 3, close - 1):
            tokens.prepend(end + 2, f" = mg::make<{spelled}>")
    elif before == "(" and after == ")" and tokens.word(at - 2) in _BEFORE_EXPRESSION:
        operand = end + 2
        if tokens.kinds[operand] in ("name", "number") or tokens.word(operand) in "(-!~*&+":
            tokens.blank(at - 1, end + 1)
            if (
                tokens.word(operand) == "("
                and len(list(tokens.split(operand + 1, tokens.close(operand) - 1))) > 1
            ):
                tokens.set(at - 1, f"mg::make<{spelled}>")
            else:
                tokens.set(at - 1, f"mg::caster<{spelled}>{{}}->*")


def _are_values(tokens: Tokens, first: int, last: int) -> bool:
    """Whether first..last, between parentheses, are values (and not a function's parameters)."""
    if first > last:
        return False
    for start, end in tokens.split(first, last):
        if start == end and (tokens.word(start) in SCALARS or _VECTOR.match(tokens.word(start))):
            return False
        if any(tokens.is_name(i) and tokens.is_name(i + 1) for i in range(start, end)):
            return False
    return True
