"""Who imports whom in metalgen, with the imports inside functions, which hide nothing from here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import metalgen
from metalgen.families import FAMILIES
from metalgen.features import FEATURES
from metalgen.kinds import KINDS
from metalgen.languages import LANGUAGES

PACKAGE = Path(metalgen.__path__[0])
FILES = {
    ".".join(("metalgen", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in PACKAGE.rglob("*.py")
}


ROOMS = """
    _version errors plurals arguments philox resources imports switches counters
    languages dsl features problem schedules kinds families
    reference source chips simulator database devices contents
    append calls tuning ops caches distributed nn flash_attn mlx_lm report testing
    verification bench contribution cli __main__
""".split()
"""All rooms of the package, from the bottom to the top: a module imports from its own room and from
those before it, and from no other. `docs/architecture.md` says what each is."""
PUBLIC = "metalgen"
"""The package itself, whose names programs import: it may import any room, and none imports it."""
MOST_LINES = 450
MOST_ARGUMENTS = 8
LONG: set[str] = set()
"""Modules that are longer until they are split. None may be added."""
FOREIGN = ("metalgen.cli.", "metalgen.flash_attn.")
"""Where arguments are the options of a command, or another project's."""
WIDE = {
    "metalgen.nn.multi_head.MultiHeadAttention.__init__": "the options of a layer, by keyword",
    "metalgen.ops.sdpa.attend": "the arguments of MLX's function",
    "metalgen.ops.sdpa.explain_sdpa": "the arguments of MLX's function",
    "metalgen.ops.attention.varlen_attention": "flash-attn's arguments",
    "metalgen.ops.flex_attention.flex_attention": "FlexAttention's arguments",
    "metalgen.simulator.api.MetalKernel.__call__": "the arguments of MLX's kernels",
    "metalgen.simulator.generator.generate": "the arguments of MLX's kernels",
    "metalgen.tuning.runner.tune": "the options of a tuning run, by keyword",
    "metalgen.ops.blocks.attention_backward": "the arrays and options of a call, by keyword",
    "metalgen.ops.append.append_kv": "the arrays and options of a call, by keyword",
    "metalgen.caches.paged.PagedKVCache.__init__": "the options of a cache, by keyword",
    "metalgen.database.checks.KeepsChecks.record_check": "the columns of a check, by keyword",
    "metalgen.database.protocol.TuningStore.record_check": "the columns of a check, by keyword",
    "metalgen.testing.plain_store.PlainStore.record_check": "the columns of a check, by keyword",
    "metalgen.database.protocol.TuningStore.measurements": "the columns to select by, by keyword",
    "metalgen.database.store.Store.measurements": "the columns to select by, by keyword",
    "metalgen.report.charts.chart": "the parts of a picture, by keyword",
}
"""Functions of more than eight arguments, each with the reason."""


def room_of(name: str) -> str:
    """The room of a module."""
    return next(iter(name.split(".")[1:2]), PUBLIC)


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Names of modules imported anywhere in a module of a package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join(above + ([node.module] if node.module else []))
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if name in FILES else module


def functions(name: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names of the functions in a module or class, each with its number of arguments."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own = f"{name}.{node.name}"
            if not isinstance(node, ast.ClassDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                yield own, len([each for each in given if each.arg not in ("self", "cls")])
            yield from functions(own, node)
        else:
            yield from functions(name, node)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """The parsed source of each module."""
    return {name: ast.parse(path.read_text()) for name, path in FILES.items()}


@pytest.fixture(scope="module")
def uses(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Of each module, the modules of metalgen that it imports, in functions and for types, too."""
    found = {}
    for name, path in FILES.items():
        package = name.split(".")[: None if path.name == "__init__.py" else -1]
        found[name] = {*imported(trees[name], package)} & {*FILES} - {name}
    return found


def test_imports_are_found_wherever_they_stand(uses: dict[str, set[str]]) -> None:
    assert "metalgen.source.render" in uses["metalgen.source.digests"]  # inside a function
    assert "metalgen.features.sampler" in uses["metalgen.features.base"]  # for type checking
    compiler = "metalgen.simulator.compiler"
    assert f"{compiler}.front" in uses[compiler]  # from .front
    assert {f"{compiler}.build", "metalgen.simulator.errors"} <= uses[f"{compiler}.front"]


def test_every_module_belongs_to_a_room() -> None:
    assert {room_of(name) for name in FILES} - {*ROOMS} == {PUBLIC}


def test_modules_import_from_their_own_room_and_from_lower_ones(uses: dict[str, set[str]]) -> None:
    above = {
        f"{name} imports {used}"
        for name, names in uses.items()
        for used in names
        if (room := room_of(name)) != PUBLIC
        if room_of(used) not in ROOMS[: ROOMS.index(room) + 1]
    }
    assert not above


def test_no_modules_of_a_room_import_each_other(trees: dict[str, ast.Module]) -> None:
    """When they run, that is: two may name each other's types."""
    running = {}
    for name, path in FILES.items():
        package = name.split(".")[: None if path.name == "__init__.py" else -1]
        tree = WithoutTypes().visit(ast.parse(path.read_text()))
        running[name] = {*imported(tree, package)} & {*FILES} - {name}
    try:
        TopologicalSorter(running).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


class WithoutTypes(ast.NodeTransformer):
    """Takes out what runs for type checkers only."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def test_the_map_names_every_room_from_top_to_bottom() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    table = page.partition("## Rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = [room for row in rows for room in re.findall(r"`(\w+)`", row)]
    present = {room_of(name) for name in FILES}
    assert [room for room in reversed(named) if room in present] == [
        room for room in ROOMS if room in present
    ]


def test_no_module_is_too_long_to_be_read() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert {name for name, count in lines.items() if count > MOST_LINES} <= LONG


def test_no_function_takes_too_many_arguments(trees: dict[str, ast.Module]) -> None:
    wide = {
        function
        for name, tree in trees.items()
        for function, count in functions(name, tree)
        if count > MOST_ARGUMENTS and not name.startswith(FOREIGN)
    }
    assert wide <= {*WIDE}


def test_the_simulator_is_usable_without_the_rest(uses: dict[str, set[str]]) -> None:
    """Of metalgen it needs what says which numbers and errors there are, and nothing else."""
    others = {
        room_of(used)
        for name, names in uses.items()
        for used in names
        if room_of(name) == "simulator"
    }
    assert others <= {"simulator", "arguments", "errors", "plurals"}


TUNING = ("runner", "sessions", "study", "workers", "timing", "search", "progress")
"""The rooms of tuning; each imports those after it only."""


def test_the_rooms_of_tuning_import_downwards(uses: dict[str, set[str]]) -> None:
    rooms = {n: n.split(".")[2] for n in uses if n.startswith("metalgen.tuning.")}
    assert {*rooms.values()} == {*TUNING, "presets"}
    back = {
        f"{name} imports {used}"
        for name, room in rooms.items()
        for used in uses[name] & {*rooms}
        if {room, rooms[used]} <= {*TUNING} and TUNING.index(rooms[used]) < TUNING.index(room)
    }
    assert not back


OWN = ("languages", "features", "kinds", "families", "reference")
"""The rooms in which families, kinds, languages and features are compared with by name; the float64
reference states on purpose once more what features mean."""
COMPARING = {
    "metalgen.bench.foreign": "PyTorch's name of a device",
    "metalgen.simulator.compiler.vectors": "the namespace of Metal",
}
"""Modules elsewhere that compare with such a name, each with the reason."""


def compared(tree: ast.AST) -> Iterator[str]:
    """The strings that a module compares with, or whose beginnings or cases it asks for."""
    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            sides = node.args if node.func.attr in ("startswith", "endswith") else []
        for side in sides:
            items = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
            for item in items:
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.value


def test_comparisons_are_found() -> None:
    text = "a == 'x'\n'y' in b\nb in ('z', 'w')\nc.startswith('v')\nd = ['u']\nf('t')\ng['s'] == 1"
    assert {*compared(ast.parse(text))} == {"x", "y", "z", "w", "v"}


def test_nothing_compares_with_the_names_of_families_kinds_languages_and_features(
    trees: dict[str, ast.Module],
) -> None:
    """Ask for what it declares instead, such as `Family.head_rows` or `Language.byte_rows`."""
    names = {*FAMILIES, *KINDS, *LANGUAGES, *FEATURES}
    found = {
        f"{name}: {text}"
        for name, tree in trees.items()
        if room_of(name) not in OWN and name not in COMPARING
        for text in compared(tree)
        if text in names
    }
    assert not found


def test_both_tables_of_words_agree() -> None:
    """The one of the index has some rows of the map's."""
    docs = PACKAGE.parent / "docs"

    def rows(page: str) -> list[str]:
        table = (docs / page).read_text().partition("| word | meaning |\n")[2]
        return table.partition("\n\n")[0].splitlines()

    assert len(rows("index.md")) > 10 and {*rows("index.md")} <= {*rows("architecture.md")}
