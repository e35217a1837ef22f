"""Every language and every matrix kind has the macros that are declared, and nobody uses others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import jinja2
import pytest
from jinja2 import nodes

from metalgen.kinds import KINDS, Kind
from metalgen.kinds.interface import LANGUAGE, REGISTERS, TILE, Macro
from metalgen.kinds.operands import Accumulator, Operand, Operands, Passes, Product
from metalgen.languages import LANGUAGES
from metalgen.resources import templates_dir
from metalgen.schedules import Schedule

ROOT = templates_dir()
ENVIRONMENT = jinja2.Environment()
ROOMS = {"families": "families", "shared": "families", "features": "features", "kinds": "kinds"}
"""Folders of templates, and what interfaces call their files."""


def parsed(path: Path) -> nodes.Template:
    return ENVIRONMENT.parse(path.read_text(), filename=str(path))


def macros(path: Path) -> dict[str, nodes.Macro]:
    """The macros of a file, by name: its own, and those that it takes from another."""
    tree = parsed(path)
    return taken(tree) | {node.name: node for node in tree.body if isinstance(node, nodes.Macro)}


def taken(tree: nodes.Template) -> dict[str, nodes.Macro]:
    """Macros of other files under names of this one: ``{% set name = file.macro %}``."""
    files = {
        node.target: ROOT / node.template.value
        for node in tree.find_all(nodes.Import)
        if isinstance(node.template, nodes.Const)
    }
    found = {}
    for node in tree.body:
        if isinstance(node, nodes.Assign) and isinstance(node.node, nodes.Getattr):
            file = node.node.node
            if isinstance(file, nodes.Name) and file.name in files:
                assert isinstance(node.target, nodes.Name)
                found[node.target.name] = macros(files[file.name])[node.node.attr]
    return found


def imports(path: Path) -> dict[str, Path]:
    """The files that a template imports, by the names that it gives them."""
    return {
        node.target: ROOT / node.template.value
        for node in parsed(path).find_all(nodes.Import)
        if isinstance(node.template, nodes.Const)
    }


def tile_macros(kind: str) -> dict[str, nodes.Macro]:
    """What a kind's tile library exports."""
    return taken(parsed(ROOT / "kinds" / kind / "tile.jinja"))


def signature(macro: nodes.Macro) -> tuple[tuple[str, ...], set[int]]:
    """A macro's arguments, and how many values it hands over to its caller's block."""
    calls = [call for call in macro.find_all(nodes.Call) if isinstance(call.node, nodes.Name)]
    given = {len(call.args) for call in calls if call.node.name == "caller"}
    return tuple(argument.name for argument in macro.args), given


def check(declared: Macro, macro: nodes.Macro) -> None:
    arguments, given = signature(macro)
    assert arguments == declared.arguments, declared.name
    assert given == ({len(declared.gives)} if declared.gives else set()), declared.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_every_macro_of_the_tile_interface_and_no_other(kind: str) -> None:
    found = tile_macros(kind)
    assert found.keys() == {macro.name for macro in TILE}
    for macro in TILE:
        check(macro, found[macro.name])


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_macro_of_the_interface_and_no_other(language: str) -> None:
    found = macros(ROOT / "languages" / language / "language.jinja")
    assert found.keys() == {macro.name for macro in LANGUAGE}
    for macro in LANGUAGE:
        check(macro, found[macro.name])


@pytest.mark.parametrize("kind", KINDS)
def test_registers_of_a_kind_are_usable_by_another(kind: str) -> None:
    path = ROOT / "kinds" / kind / "registers.jinja"
    assert macros(path).keys() >= {*REGISTERS}
    assert {name for name, _, _ in used(parsed(path))} <= {"language"}


def used(tree: nodes.Template) -> Iterator[tuple[str, str, nodes.Call]]:
    """Calls of a module's macros: the module's name, the macro's, and the call."""
    modules = {"tile", "language", "registers", "memory", "staging", "products", "outputs"}
    modules |= {"addresses", "raw", "direct", "passes", "loop", "fragments"}
    for call in tree.find_all(nodes.Call):
        found = call.node
        if not isinstance(found, nodes.Getattr) or not isinstance(found.node, nodes.Name):
            continue
        if found.node.name in modules:
            yield found.node.name, found.attr, call


def declared_uses() -> Iterator[tuple[Path, str, str, nodes.Call]]:
    for folder in ROOMS:
        for path in sorted((ROOT / folder).rglob("*.jinja")):
            for module, name, call in used(parsed(path)):
                yield path, module, name, call


def test_nothing_that_is_not_declared_is_used() -> None:
    interfaces = {"language": LANGUAGE, "tile": TILE}
    known = {
        module: {macro.name: macro for macro in macros} for module, macros in interfaces.items()
    }
    for path, module, name, call in declared_uses():
        if module in known:
            assert name in known[module], f"{path.name} uses {module}.{name}"
            assert len(call.args) + len(call.kwargs) == len(known[module][name].arguments), name


def test_everything_that_is_declared_is_used_by_those_who_are_said_to() -> None:
    users: dict[str, set[str]] = {}
    for path, module, name, _ in declared_uses():
        if module in ("tile", "language"):
            users.setdefault(name, set()).add(ROOMS[path.relative_to(ROOT).parts[0]])
    for macro in (*TILE, *LANGUAGE):
        assert users.get(macro.name, set()) <= {*macro.callers}, macro.name
        assert macro.name in users, macro.name


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_kind_use_only_what_stands_above_them(kind: str) -> None:
    """A file sees the files that its tile library imports before it."""
    above: dict[str, Path] = {}
    for name, path in imports(ROOT / "kinds" / kind / "tile.jinja").items():
        for module, macro, call in used(parsed(path)):
            assert module in above, f"{path.name} uses {module}"
            found = macros(above[module]).get(macro)
            assert found is not None, f"{path.name} uses {module}.{macro}"
            least, most = len(found.args) - len(found.defaults), len(found.args)
            assert least <= len(call.args) + len(call.kwargs) <= most, f"{path.name}: {macro}"
        above[name] = path


def test_blocks_take_what_they_are_handed() -> None:
    given = {macro.name: len(macro.gives) for macro in TILE}
    blocks = [
        (path.name, block)
        for folder in ("families", "shared")
        for path in sorted((ROOT / folder).rglob("*.jinja"))
        for block in parsed(path).find_all(nodes.CallBlock)
    ]
    for name, block in blocks:
        target = block.call.node
        if isinstance(target, nodes.Getattr) and target.attr in given:
            assert len(block.args) == given[target.attr], f"{name}: {target.attr}"
    assert blocks


KEY_ROWS = Operands(
    own=(Operand("k", "key", "D", 64, 2),),
    traversed=(Operand("q", "query", "D", 64, 2), Operand("d_out", "query", "DV", 32, 2)),
    accumulators=(
        Accumulator("s", "Q_FRAGMENTS", first="i0"),
        Accumulator("dv", "V_FRAGMENTS", columns="DV"),
    ),
    products=(Product("s", "k", "q"), Product("dv", "s", "d_out")),
    passes=Passes("i0", begin="q_begin", end="q_end", block="BQ", count="q_len"),
    own_start="k_block * BK",
    own_count="kv_len",
)
"""Rows of keys that are owned, and of queries that are passed over: S^T = K Q^T, dV += S^T dO."""


@pytest.mark.parametrize("source", ["threadgroup", "device"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_family_may_own_keys_and_pass_over_queries(kind: Kind, source: str) -> None:
    """The same files write its loop, in its own names, and with no name of forward's."""
    sources = {"k_source": "threadgroup", "q_source": source, "d_out_source": "threadgroup"}
    sizes = {"bq": 64, "bk": 32, "bd": 64, "simdgroups": 4, "row_blocks": 1, "buffers": 2}
    plan = kind.plan(
        KEY_ROWS, cast(Schedule, SimpleNamespace(**sources, **sizes, load_width=8, threads=128))
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    text = environment.from_string(
        "{%- import library as tile with context -%}"
        "{% macro begin_pass(masking=none) %}    const bool live = true;\n{% endmacro %}"
        "{% macro body(masking=none) %}{% call(r) tile.rows() %}"
        "{% call(x, i) tile.elements('s', r) %}"
        "{{ x }} = at({{ tile.row(r) }}, {{ i }});{% endcall %}{% endcall %}{% endmacro %}"
        "{{ tile.operands() }}{{ tile.mainloop(begin_pass, body) }}{{ tile.store('dv', 'd_v') }}"
    ).render(
        library=f"kinds/{kind.name}/tile.jinja",
        plan=plan,
        T="half",
        varlen=False,
        rope=None,
        packed=False,
    )
    assert "for (int i0 = q_begin; i0 < q_end; i0 += BQ) {" in text
    assert re.search(r"s\[r.*\] = at\(first \+ .*, i0 \+ f \* 8 \+ .*\);", text)
    assert "dv_row = d_v + (row_base + n) * DV;" in text
    words = set(re.findall(r"\w+", text))
    assert not words & {"k0", "k_begin", "k_end", "k_own", "q_row", "v_row", "o", "out"}
    assert {"q_head", "k_head", "d_out_head", "k_tile"} <= words


def test_no_line_of_a_template_is_too_wide_to_read() -> None:
    wide = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(ROOT.rglob("*.jinja"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 140
    }
    assert not wide
