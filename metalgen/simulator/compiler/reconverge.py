"""Makes lanes that parted meet again where a GPU's lanes do: at the end of the branch or the loop.

Without it, lanes that leave an inner loop early could run on to the next turn of the outer loop and
meet, at the same collective, lanes still in the turn before. On hardware the lanes that took
different ways come together again at the branch's immediate post-dominator, and those that do not
break out of a loop or return do so within it. So each such block that has a collective or a barrier
between the branch and itself gets a call of mg_converge, at which lanes wait for those on the way
there. Branches with nothing to wait for between them and that block, by far most, cost nothing.

The work is done on the text of LLVM's assembly after optimisation, when unrolled loops and branches
on constants are gone, and functions that wait are part of the kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WAITS = "call preserve_nonecc "
_LABEL = re.compile(r'^("[^"]*"|[\w.$-]+):')
_TARGET = re.compile(r'label %("[^"]*"|[\w.$-]+)')
_FUNCTION = re.compile(r'^define .*?@("[^"]*"|[\w.$-]+)\(')
_CALLED = re.compile(r'\bcall [^\n]*?@("[^"]*"|[\w.$-]+)\(')
_ATTRIBUTES = re.compile(r"(\) (?:(?:local_)?unnamed_addr )?)(#\d+)")
_MAX_BLOCKS = 3000
_DECLARATION = """
declare preserve_nonecc void @mg_converge(i32) #9991
attributes #9991 = { convergent nomerge nounwind }
"""


def inline_waiting(code: str) -> str:
    """`code` with every function that may wait marked to be inlined into its callers."""
    bodies = _functions(code)
    calls = {name: set(_CALLED.findall(body)) for name, body in bodies.items()}
    waiting = {name for name, body in bodies.items() if WAITS in body}
    while more := {n for n, called in calls.items() if n not in waiting and called & waiting}:
        waiting |= more
    waiting.discard("mg_kernel")

    def mark(line: str) -> str:
        found = _FUNCTION.match(line)
        if found and found[1] in waiting:
            return _ATTRIBUTES.sub(r"\1\2 alwaysinline", line, count=1)
        return line

    return "\n".join(
        mark(line) if line.startswith("define ") else line for line in code.split("\n")
    )


def reconverge(code: str) -> str:
    """`code`, optimised, with the calls of mg_converge that its functions need."""
    out: list[str] = []
    body: list[str] | None = None
    for line in code.split("\n"):
        if body is None:
            out.append(line)
            if line.startswith("define "):
                body = []
        elif line == "}":
            out += _converged(body) if any(WAITS in text for text in body) else body
            out.append(line)
            body = None
        else:
            body.append(line)
    return "\n".join(out) + _DECLARATION


def _functions(code: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in re.split(r"^(?=define )", code, flags=re.MULTILINE)[1:]:
        match = _FUNCTION.match(text)
        if match:
            found[match[1]] = text[: text.find("\n}\n")]
    return found


@dataclass
class Block:
    """A basic block: where its instructions start (after its phis), and where it may go."""

    start: int
    waits: bool = False
    successors: list[int] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)


def _blocks(body: list[str]) -> list[Block]:
    blocks = [Block(0)]
    names = {"": 0}
    in_switch = False
    for i, line in enumerate(body):
        label = _LABEL.match(line)
        if label and i == 0:
            names[label[1]] = 0
            blocks[0].start = 1
            continue
        if label:
            names[label[1]] = len(blocks)
            blocks.append(Block(i + 1))
            continue
        block = blocks[-1]
        if " = phi " in line and block.start == i:
            block.start = i + 1
        if WAITS in line:
            block.waits = True
        text = line.lstrip()
        if in_switch or text.startswith(("br ", "switch ")):
            block.targets += _TARGET.findall(line)
            in_switch = (in_switch or text.startswith("switch ")) and "]" not in line
    for block in blocks:
        block.successors = sorted({names[t] for t in block.targets})
    return blocks


Graph = list[list[int]]  # the successors of each block


def post_dominators(successors: Graph) -> list[int]:
    """The immediate post-dominator of each block; len(successors) stands for the exit, -1: none."""
    n = len(successors)
    sets = _dominating(successors, [b for b in range(n) if not successors[b]])
    sizes = [s.bit_count() for s in sets]
    result = []
    for b in range(n):
        strict = sets[b] & ~(1 << b)
        # Of the strict post-dominators, the nearest is post-dominated by all others.
        nearest = (p for p in _bits(strict) if sizes[p] == strict.bit_count())
        result.append(next(nearest, n if not strict else -1))
    return result


def _dominating(before: Graph, roots: list[int]) -> list[int]:
    """For each block the blocks (as bits) on every way to it; `before`: where ways come from."""
    n = len(before)
    everything = (1 << n) - 1
    sets = [everything] * n
    for root in roots:
        sets[root] = 1 << root
    changed = True
    while changed:
        changed = False
        for b in (*range(n), *range(n - 1, -1, -1)):
            if not before[b]:
                continue
            meet = everything
            for s in before[b]:
                meet &= sets[s]
            meet |= 1 << b
            if b not in roots and meet != sets[b]:
                sets[b] = meet
                changed = True
    return sets


def _bits(mask: int) -> list[int]:
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def _reverse(graph: Graph) -> Graph:
    out: Graph = [[] for _ in graph]
    for b, successors in enumerate(graph):
        for s in successors:
            out[s].append(b)
    return out


def _loops(graph: Graph) -> dict[int, set[int]]:
    """The natural loops: the blocks of each, by its header."""
    before = _reverse(graph)
    dominators = _dominating(before, [0])
    loops: dict[int, set[int]] = {}
    for b, successors in enumerate(graph):
        for header in successors:
            if dominators[b] >> header & 1:
                body = loops.setdefault(header, {header})
                todo = [b]
                while todo:
                    block = todo.pop()
                    if block not in body:
                        body.add(block)
                        todo += before[block]
    return loops


def _between(graph: Graph, start: int, end: int) -> set[int]:
    """The blocks on the ways from block `start`'s successors to block `end`, without `end`."""
    seen: set[int] = set()
    todo = list(graph[start])
    while todo:
        b = todo.pop()
        if b != end and b not in seen:
            seen.add(b)
            todo += graph[b]
    return seen


def _staying(graph: Graph, waits: set[int]) -> Graph:
    """`graph` without the edges after which nothing waits, where others stay."""
    before = _reverse(graph)
    ahead, todo = set(waits), list(waits)
    while todo:
        for b in before[todo.pop()]:
            if b not in ahead:
                ahead.add(b)
                todo.append(b)
    return [[s for s in successors if s in ahead] or successors for successors in graph]


def _views(graph: Graph, waits: set[int]) -> list[tuple[Graph, set[int]]]:
    """Graphs to find meeting points in, each with the blocks whose branches it is meant for."""
    everywhere = set(range(len(graph)))
    views = [(graph, everywhere), (_staying(graph, waits), everywhere)]
    loops = _loops(graph)
    for header, body in loops.items():
        inner = set().union(*(b for h, b in loops.items() if h in body and h != header))
        turn = [
            [s for s in successors if s in body and s != header] if b in body else []
            for b, successors in enumerate(graph)
        ]
        views += [(turn, body - inner), (_staying(turn, waits & body), body - inner)]
    return views


def _converged(body: list[str]) -> list[str]:
    blocks = _blocks(body)
    graph = [block.successors for block in blocks]
    if len(blocks) > _MAX_BLOCKS or all(len(s) < 2 for s in graph):
        return body
    waits = {b for b, block in enumerate(blocks) if block.waits}
    regions: dict[int, set[int]] = {}
    for view, meant in _views(graph, waits):
        branches = [b for b in meant if len(view[b]) > 1]
        if not branches:
            continue
        nearest = post_dominators(view)
        for b in branches:
            if 0 <= nearest[b] < len(blocks):
                regions.setdefault(nearest[b], set()).update(_between(view, b, nearest[b]))
    # Lanes at an inner meeting point go on before those at an outer one, whose way is longer.
    meeting = [e for e, region in regions.items() if region & waits]
    meeting.sort(key=lambda e: (len(regions[e]), e))
    before = {blocks[e].start: order for order, e in enumerate(meeting)}
    out = []
    for i, line in enumerate(body):
        if i in before:
            out.append(f"  call preserve_nonecc void @mg_converge(i32 {before[i]})")
        out.append(line)
    return out
