"""Who imports whom in metalgen, with the imports inside functions, which hide nothing from here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import metalgen

PACKAGE = Path(metalgen.__path__[0])
FILES = {
    ".".join(("metalgen", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in PACKAGE.rglob("*.py")
}


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Names of modules imported anywhere in a module of a package, but for type checking."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join(above + ([node.module] if node.module else []))
            for alias in node.names:
                name = f"{module}.{alias.name}"
                yield name if name in FILES else module
        yield from imported(node, package)


@pytest.fixture(scope="module")
def uses() -> dict[str, set[str]]:
    """Of each module, the modules of metalgen that it imports."""
    found = {}
    for name, path in FILES.items():
        package = name.split(".")[: None if path.name == "__init__.py" else -1]
        found[name] = {*imported(ast.parse(path.read_text()), package)} & {*FILES} - {name}
    return found


def test_no_modules_import_each_other(uses: dict[str, set[str]]) -> None:
    assert "metalgen.families" in uses["metalgen.source.render"]
    assert "metalgen.source.render" in uses["metalgen.source.digests"]  # inside a function
    compiler = "metalgen.simulator.compiler"
    assert f"{compiler}.front" in uses[compiler]  # from .front
    assert {f"{compiler}.build", "metalgen.simulator.errors"} <= uses[f"{compiler}.front"]
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_simulator_is_usable_without_the_rest(uses: dict[str, set[str]]) -> None:
    """Of metalgen it needs what says which numbers and errors there are, and nothing else."""
    within = "metalgen.simulator"
    beside = {
        used
        for name, names in uses.items()
        if name.startswith(within)
        for used in names
        if not used.startswith(within)
    }
    assert beside <= {"metalgen.arguments", "metalgen.errors", "metalgen.plurals"}


@pytest.mark.parametrize(
    ("rooms", "above"),
    [
        (
            {"problem", "features", "schedules", "kinds", "families", "languages"},
            {"source", "devices", "database"},
        ),
        ({"source"}, {"devices", "database", "dispatch"}),
        ({"devices"}, {"database", "tuning", "dispatch", "ops", "cli"}),
        ({"database"}, {"source", "devices", "tuning", "dispatch", "ops", "cli"}),
        (
            {"problem", "devices", "database", "tuning", "dispatch", "ops", "cache", "reference"},
            {"flash_attn", "nn"},
        ),
        ({"tuning", "chips", "simulator", "dsl", "report"}, {"cli", "ops", "testing"}),
    ],
    ids=lambda rooms: "-".join(sorted(rooms)),
)
def test_the_way_of_a_request_is_one_direction(
    uses: dict[str, set[str]], rooms: set[str], above: set[str]
) -> None:
    """As CONTRIBUTING.md has it: config and schedule, then rendering, then devices; and so on."""
    assert {f"metalgen.{room}" for room in rooms | above} <= {*uses}  # or nothing is compared
    back = {
        f"{name} imports {used}"
        for name, names in uses.items()
        for used in names
        if {*name.split(".")[1:2]} & rooms and {*used.split(".")[1:2]} & above
    }
    assert not back


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
