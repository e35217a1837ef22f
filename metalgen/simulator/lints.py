"""What Apple's compiler refuses and clang takes: found in the source, before anything runs.

Two readers share the work. One walks the user's tokens (after the preprocessor) for pointers and
references without an address space and for threadgroup variables outside of kernels. The other
reads clang's syntax tree, where overloads and templates are resolved, for recursion and for
floating-point values that become a bfloat without a cast. Both look only at the user's own text
and what it includes from ``include_dirs`` on request, never at the simulator's headers.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from metalgen.simulator.compiler import SOURCE_NAME, cache, toolchain
from metalgen.simulator.compiler.language import LanguageStage, preprocess
from metalgen.simulator.compiler.tokens import Tokens
from metalgen.simulator.compiler.transform import SCALARS
from metalgen.simulator.errors import CompileError
from metalgen.simulator.findings import Finding

UNQUALIFIED = "pointer without an address space"
RECURSION = "recursion"
HELPER_VARIABLE = "threadgroup variable outside of a kernel"
NARROWING = "implicit conversion to bfloat"
KINDS = (UNQUALIFIED, RECURSION, HELPER_VARIABLE, NARROWING)

_SPACES = frozenset(("device", "threadgroup", "constant", "thread", "object_data", "ray_data"))
_VECTOR = re.compile(
    r"(bool|u?char|u?short|u?int|u?long|half|float|bfloat)[234](x[234])?$|packed_\w+$"
)


@dataclass(frozen=True)
class _Lint:
    kind: str
    message: str
    file: str
    line: int


def lint(
    source: str,
    kernel: str | Sequence[str],
    *,
    constants: Mapping[int | str, object] | None = None,
    include_dirs: Sequence[str | Path] = (),
    everywhere: bool = False,
) -> tuple[Finding, ...]:
    """Return the lint findings of a complete Metal translation unit, each place once.

    Only the user's own text is looked at, or also the headers from ``include_dirs`` when
    ``everywhere``. ``kernel`` names the kernel or kernels that are
    called; one alone is named in the findings. Returns nothing for a source that
    does not compile (``compile_metal`` says why). Raises ``MissingToolchain``.
    """
    folders = [str(Path(folder).resolve()) for folder in include_dirs]
    kernels = (kernel,) if isinstance(kernel, str) else tuple(kernel)
    settings = repr((kernels, sorted((constants or {}).items(), key=repr), everywhere, folders))
    key = cache.digest([cache.own_sources(), Path(__file__).read_text(), source, settings])
    note = cache.directory() / f"{key}.lints.json"
    rows = cache.read_note(note)
    if rows is None:
        found = _lint(source, kernels, constants or {}, folders, everywhere)
        rows = [[each.kind, each.message, each.file, each.line] for each in found]
        cache.write_note(note, rows)
    found = [_Lint(*row) for row in rows]
    return tuple(
        Finding(
            each.kind,
            each.message,
            kernels[0] if len(kernels) == 1 else "",
            file=each.file,
            line=each.line,
        )
        for each in found
    )


def _lint(
    source: str,
    kernels: Sequence[str],
    constants: Mapping[int | str, object],
    folders: Sequence[str],
    everywhere: bool,
) -> list[_Lint]:
    with tempfile.TemporaryDirectory(dir=cache.directory(), prefix="lint-") as name:
        folder = Path(name)
        try:
            text = preprocess(source, folder, folders)
            machine = toolchain.machine_flags()
            tree = LanguageStage(text, folder, "plain", constants, machine).syntax_tree(*kernels)
        except CompileError:
            return []

    def mine(file: str) -> bool:
        return file == SOURCE_NAME or (
            everywhere and not Path(file).is_relative_to(toolchain.INCLUDE) and "<" not in file
        )

    places = set()
    found = []
    for each in (*_token_lints(text), *_tree_lints(tree)):
        place = (each.kind, each.file, each.line)
        if mine(each.file) and place not in places:
            places.add(place)
            found.append(each)
    return sorted(found, key=lambda each: (each.file != SOURCE_NAME, each.file, each.line))


# Tokens.


def _token_lints(text: str) -> Iterator[_Lint]:
    tokens = Tokens(text)
    types = _known_types(tokens)
    yield from _unqualified(tokens, types)
    yield from _helper_variables(tokens)


def _place(tokens: Tokens, at: int) -> tuple[str, int]:
    file, line = tokens.place(at)
    return file or SOURCE_NAME, line


def _known_types(tokens: Tokens) -> frozenset[str]:
    """Return names that mean a type somewhere: built in, declared, or a template's parameter."""
    known = set(SCALARS) | {"void", "auto", "char", "unsigned", "int"}
    for at in range(len(tokens)):
        word = tokens.word(at)
        declares = word in ("struct", "class", "typename", "enum") and tokens.is_name(at + 1)
        if declares or (word == "using" and tokens.word(at + 2) == "="):
            known.add(tokens.word(at + 1))
        elif word == "typedef":
            end = tokens.statement_end(at)
            if tokens.is_name(end - 1):
                known.add(tokens.word(end - 1))
    return frozenset(known - _variables(tokens, known))


def _variables(tokens: Tokens, types: Set[str]) -> set[str]:
    """Names that are declared as a variable somewhere: `name * x` may be a product then."""
    return {
        tokens.word(at)
        for at in range(1, len(tokens))
        if tokens.word(at) in types
        and tokens.word(at + 1) in ("=", ";", ",", "[", ")")
        and tokens.is_name(at - 1)
        and tokens.word(at - 1) in types
        and tokens.word(at - 1) not in ("unsigned", "signed")
        and not (tokens.word(at) in SCALARS or tokens.word(at) == "void")
    }


_BOUNDARY = frozenset("( , ; { } < : = return".split())
_SPECIFIERS = frozenset(
    "const volatile static constexpr inline extern typename struct unsigned signed".split()
)


def _unqualified(tokens: Tokens, types: frozenset[str]) -> Iterator[_Lint]:
    """Pointers and references in declarations and casts whose type names no address space."""
    for at in range(1, len(tokens)):
        mark = tokens.word(at)
        if mark not in ("*", "&", "&&"):
            continue
        start, name = _type_before(tokens, at - 1, types)
        if name is None or name == "auto":  # auto takes the space of what it is made from
            continue
        words = set(tokens.words[start:at])
        if words & _SPACES or (tokens.word(at + 1) in _SPACES and mark == "*"):
            continue
        following = tokens.word(at + 1)
        if not (tokens.is_name(at + 1) or following in (")", ">", ",", "*", "(", "const")):
            continue
        if following == "(" and tokens.word(at + 2) not in ("&", "*", "threadgroup"):
            continue
        kind = "pointer" if mark == "*" else "reference"
        yield _Lint(
            UNQUALIFIED,
            f"'{tokens.source(start, at)}': a {kind} needs an address space (device, threadgroup, "
            "constant or thread) in Metal",
            *_place(tokens, at),
        )


def _type_before(tokens: Tokens, at: int, types: frozenset[str]) -> tuple[int, str | None]:
    """Return where the type that ends at ``at`` starts, and its last name; None if it is none."""
    while tokens.word(at) in ("const", "volatile") or tokens.word(at) in _SPACES:
        at -= 1
    if tokens.word(at) == ">":
        depth = 0
        while at >= 0:
            depth += (tokens.word(at) == ">") - (tokens.word(at) == "<")
            if depth == 0:
                break
            if tokens.word(at) in (";", "{", "}"):
                return at, None
            at -= 1
        at -= 1
    name = tokens.word(at)
    if not tokens.is_name(at) or not (name in types or _VECTOR.match(name)):
        return at, None
    while tokens.word(at - 1) == "::":
        at -= 2
    while (
        tokens.word(at - 1) in _SPECIFIERS
        or tokens.word(at - 1) in _SPACES
        or tokens.word(at - 1) in types
    ):
        at -= 1
    before = tokens.word(at - 1)
    if before == "]":  # an attribute: [[...]]
        return at, name
    return (at, name) if before in _BOUNDARY or before == "" else (at, None)


def _helper_variables(tokens: Tokens) -> Iterator[_Lint]:
    """Variables in threadgroup memory declared in functions that are no kernels."""
    for start, end, kernel in _functions(tokens):
        if kernel:
            continue
        for at in range(start, end):
            starts = tokens.word(at - 1) in (";", "{", "}", "static")
            if tokens.word(at) != "threadgroup" or not starts:
                continue
            last = at
            while last < end and tokens.word(last) not in (";", "=", "(", "{"):
                last += 1
            declared = tokens.words[at:last]
            head = declared[: declared.index("[")] if "[" in declared else declared
            if "*" not in head and "&" not in head:
                yield _Lint(
                    HELPER_VARIABLE,
                    f"'{tokens.source(at, last - 1)}': only a kernel function may declare "
                    "threadgroup variables; pass a pointer instead",
                    *_place(tokens, at),
                )


def _functions(tokens: Tokens) -> Iterator[tuple[int, int, bool]]:
    """Return (first, last, is a kernel) of the outermost function bodies."""
    at = 0
    while at < len(tokens):
        if tokens.word(at) != "{":
            at += 1
            continue
        end = tokens.close(at)
        before = at - 1
        while tokens.word(before) in ("const", "thread", "device", "constant", "threadgroup"):
            before -= 1
        if tokens.word(before) != ")":  # a struct, namespace, enum or initialiser
            at += 1
            continue
        head = before
        while head >= 0 and tokens.word(head) not in (";", "}", "{"):
            head = tokens.opening(head) - 1 if tokens.word(head) == ")" else head - 1
        yield at, end, "kernel" in tokens.words[head + 1 : before]
        at = end + 1


# Clang's syntax tree.

_NODE = re.compile(r"^([| `-]*)(\w+) (0x[0-9a-f]+)?(.*)$")
_WHERE = re.compile(r"[^<]*<([^<>]*)>(?: (line:\d+:\d+|col:\d+|[^\s:'<>]+:\d+:\d+)(?= |$))?")


@dataclass
class _Node:
    depth: int
    kind: str
    address: str
    rest: str
    file: str
    line: int


def _nodes(tree: str) -> Iterator[_Node]:
    """Return the nodes of a dumped tree; clang writes only what changed of a location."""
    file, line = "", 0
    for text in tree.splitlines():
        match = _NODE.match(text)
        if match is None:
            continue
        prefix, kind, address, rest = match.groups()
        begins: tuple[str, int] | None = None
        where = _WHERE.match(rest)
        if where:
            for part in (*where.group(1).split(", "), where.group(2) or ""):
                full = re.fullmatch(r"(.+):(\d+):(\d+)", part)
                if full and full.group(1) == "line":
                    line = int(full.group(2))
                elif full:
                    file, line = full.group(1), int(full.group(2))
                begins = begins or (file, line)
        yield _Node(len(prefix) // 2, kind, address or "", rest, *(begins or (file, line)))


def _tree_lints(tree: str) -> Iterator[_Lint]:
    calls: dict[str, list[tuple[str, str, int]]] = {}
    names: dict[str, str] = {}
    first: dict[str, str] = {}  # a later declaration of a function, and its first one
    path: list[_Node] = []
    for node in _nodes(tree):
        del path[node.depth :]
        parent = path[-1] if path else None
        if node.kind in ("FunctionDecl", "CXXMethodDecl"):
            named = re.search(r" (~?\w+|operator\S+) '", node.rest)
            names[node.address] = named.group(1) if named else "?"
            earlier = re.match(r" prev (0x[0-9a-f]+)", node.rest)
            if earlier:
                first[node.address] = first.get(earlier.group(1), earlier.group(1))
        elif node.kind == "DeclRefExpr":
            target = re.search(r" Function (0x[0-9a-f]+) '", node.rest)
            owner = next((up for up in reversed(path) if up.address in names), None)
            if target and owner:
                called = first.get(target.group(1), target.group(1))
                caller = first.get(owner.address, owner.address)
                calls.setdefault(caller, []).append((called, node.file, node.line))
        elif node.kind == "ImplicitCastExpr" and _narrows(node, parent):
            yield _Lint(
                NARROWING,
                "a float becomes a bfloat without a cast, which Metal refuses; write bfloat(...)",
                node.file,
                node.line,
            )
        path += [node] * (node.depth + 1 - len(path))
    yield from _recursion(calls, names)


def _narrows(node: _Node, parent: _Node | None) -> bool:
    if "<FloatingCast>" not in node.rest or "part_of_explicit_cast" in node.rest:
        return False
    if not re.search(r"__bf16'", node.rest.split("<FloatingCast>")[0]):
        return False
    return parent is not None and parent.kind in ("VarDecl", "BinaryOperator", "ReturnStmt")


def _recursion(
    calls: Mapping[str, Sequence[tuple[str, str, int]]], names: Mapping[str, str]
) -> Iterator[_Lint]:
    def reaches(start: str, goal: str) -> bool:
        seen, waiting = set(), [start]
        while waiting:
            current = waiting.pop()
            if current == goal:
                return True
            if current not in seen:
                seen.add(current)
                waiting += [target for target, _, _ in calls.get(current, ())]
        return False

    for caller, targets in calls.items():
        for target, file, line in targets:
            if reaches(target, caller):
                yield _Lint(
                    RECURSION,
                    f"'{names[caller]}' calls itself"
                    + ("" if target == caller else f" through '{names.get(target, '?')}'")
                    + ", and Metal has no recursion",
                    file,
                    line,
                )
