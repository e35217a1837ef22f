"""Address spaces: where C++ for OpenCL asks for another spelling than Metal.

`thread` goes from constructors, conversion operators and references to const, which C++ for OpenCL
wants unqualified. Member functions without an address space, which C++ for OpenCL gives a generic
`this`, get the `thread` that Metal gives them. Pointers to constant memory point to const.
"""

from __future__ import annotations

from .tokens import Tokens

_SPACES = frozenset("thread device threadgroup constant threadgroup_imageblock ray_data".split())
_AFTER_PARAMETERS = frozenset(("const", "volatile", "noexcept", "override", "final"))
_NO_FUNCTION = frozenset(
    "__attribute__ alignas decltype sizeof static_assert if for while switch return".split()
)


def unqualified_thread(tokens: Tokens) -> None:
    structures = {
        tokens.word(i + 1)
        for i in tokens.positions("struct", "class", "union")
        if tokens.is_name(i + 1)
    }
    structures |= _aligned_structures(tokens)
    for at in tokens.positions("thread"):
        before = at - 1
        while tokens.word(before) in ("const", "volatile", "noexcept"):
            before -= 1
        following = at + 1
        while tokens.word(following) in ("const", "volatile"):
            following += 1
        if tokens.word(following) in ("device", "constant", "threadgroup"):
            tokens.set(at, "")  # of a pointer's own place, which a local variable has anyway
        elif tokens.word(before) == ")":
            if _is_constructor(tokens, tokens.opening(before), structures):
                tokens.set(at, "")
        elif _refers_to_const(tokens, at):
            tokens.set(at, "")


def _aligned_structures(tokens: Tokens) -> set[str]:
    """The names in `struct alignas(n) name`."""
    found = set()
    for i in tokens.positions("struct", "class"):
        if tokens.word(i + 1) in ("alignas", "__attribute__"):
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


def this_in_thread(tokens: Tokens) -> None:
    """Gives `thread` to the member functions that have no address space, as Metal does.

    Those that are const stay generic unless they return something in `thread`: C++ for OpenCL has
    no reference to a const object that may be a temporary but a generic one.
    """
    for at in tokens.positions("struct", "class", "union"):
        body = _class_body(tokens, at)
        if body is not None:
            _members(tokens, body)


def _class_body(tokens: Tokens, at: int) -> int | None:
    """The `{` of the class whose first word is at `at`, or None where no class is defined."""
    if tokens.word(at - 1) in ("enum", "<", ",") or tokens.word(at + 1) in ("...", ">"):
        return None
    i = at + 1
    while i < len(tokens):
        word = tokens.word(i)
        if word == "{":
            return i
        if word in ("alignas", "__attribute__"):
            i = tokens.close(i + 1)
        elif word == "<":
            i = tokens.close_angle(i) or len(tokens)
        elif word == "[":
            i = tokens.close(i)
        elif not (tokens.is_name(i) or word in ("::", ":", ",")):
            return None
        i += 1
    return None


def _members(tokens: Tokens, body: int) -> None:
    end = tokens.close(body)
    start = i = body + 1
    while i < end:
        word = tokens.word(i)
        if word == "(":
            close = tokens.close(i)
            if _is_unqualified(tokens, start, i, close):
                tokens.append(close, " thread")
            i = _initialisers_end(tokens, close)
        elif word == "<" and tokens.word(i - 1) == "template":
            i = tokens.close_angle(i) or i
        elif word == "{":
            i = tokens.close(i)
            start = i + 1
        elif word == ";" or (word == ":" and tokens.word(i - 1) in ("public", "private")):
            start = i + 1
        i += 1


def _initialisers_end(tokens: Tokens, close: int) -> int:
    """The last position before a constructor's body; `close` for another function's parameters."""
    i = close + 1
    while tokens.word(i) in _AFTER_PARAMETERS or tokens.word(i) in _SPACES:
        i += 1
    if tokens.word(i) != ":":
        return close
    while i < len(tokens) and tokens.word(i) != ";":
        i = tokens.close(i) if tokens.word(i) in ("(", "{", "[") else i
        if tokens.word(i + 1) == "{" and tokens.word(i) in (")", "}"):
            return i
        i += 1
    return i


def _is_unqualified(tokens: Tokens, start: int, opening: int, close: int) -> bool:
    """Whether these are the parameters of a member function that Metal gives `thread`."""
    head = tokens.words[start:opening]
    if not head or head[-1] in _NO_FUNCTION or {"static", "friend", "using", "typedef"} & set(head):
        return False
    operator = head.index("operator") if "operator" in head else -1
    if operator < 0:
        if "=" in head or not tokens.is_name(opening - 1) or "~" in head:
            return False
        types = [w for w in head[:-1] if w not in ("inline", "constexpr", "explicit")]
        if not types or tokens.word(opening - 2) in (".", "->"):  # a constructor
            return False
        if types[0] == "template" and types[-1] == ">":  # a constructor that is a template
            return False
        if types[-1] == ")" and "__attribute__" in types and len(types) <= 7:
            return False
    elif operator == len(head) - 1 or tokens.is_name(start + operator + 1):
        return False  # `operator (` of `operator()`, or a conversion operator
    const = False
    i = close + 1
    while tokens.word(i) in _AFTER_PARAMETERS:
        const |= tokens.word(i) == "const"
        i += 1
    if tokens.word(i) not in ("{", ";", "->"):
        return False
    return not const or _mentions_thread(head)


def _mentions_thread(head: list[str]) -> bool:
    name = head.index("operator") if "operator" in head else len(head) - 1
    return "thread" in head[:name] and bool({"&", "*"} & set(head[:name]))


def constant_is_const(tokens: Tokens) -> None:
    """Makes `constant T*` and `constant T&` point to const, as Metal's constant memory is."""
    for at in tokens.positions("constant"):
        if tokens.word(at - 1) in (")", "const"):
            continue
        i = at + 1
        while tokens.is_name(i) or tokens.word(i) in ("::", "<"):
            if tokens.word(i) == "<":
                end = tokens.close_angle(i)
                if end is None:
                    break
                i = end
            i += 1
        if tokens.word(i) in ("*", "&") and "const" not in tokens.words[at + 1 : i]:
            tokens.prepend(at, "const ")


def merge_constant(tokens: Tokens) -> None:
    """`constant` to `const device`, but where it qualifies a member function."""
    for at in tokens.positions("constant"):
        before = at - 2 if tokens.word(at - 1) == "const" else at - 1
        if tokens.word(before) != ")":
            tokens.set(at, "const __global")
