"""What the source says about its kernels: parameters, attributes, explicit instantiations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ATTRIBUTES = frozenset(
    """thread_position_in_grid thread_position_in_threadgroup threadgroup_position_in_grid
    threads_per_threadgroup dispatch_threads_per_threadgroup threads_per_grid threadgroups_per_grid
    grid_origin grid_size thread_index_in_threadgroup thread_index_in_simdgroup
    simdgroup_index_in_threadgroup simdgroups_per_threadgroup dispatch_simdgroups_per_threadgroup
    threads_per_simdgroup thread_execution_width quadgroup_index_in_threadgroup
    thread_index_in_quadgroup quadgroups_per_threadgroup""".split()
)
_SYNONYMS = {
    "dispatch_quadgroups_per_threadgroup": "quadgroups_per_threadgroup",
    "grid_size": "grid_size",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a kernel function.

    `index` is the Metal buffer (or threadgroup) index; `attribute` the Metal name of a position.
    """

    name: str
    kind: Literal["buffer", "threadgroup", "position"]
    type: str
    index: int = -1
    attribute: str = ""


@dataclass(frozen=True)
class Kernel:
    """A kernel function, or a template of kernel functions; `line` is where its name stands."""

    name: str
    parameters: tuple[Parameter, ...]
    template: bool
    line: int = 0


@dataclass(frozen=True)
class Instantiation:
    """An explicit instantiation `template [[host_name("name")]] [[kernel]] ... expression;`."""

    name: str
    expression: str


def attribute_of(words: list[str]) -> tuple[str, str]:
    """The name and the argument of one attribute, from its words: ("buffer", "3")."""
    name = words[0] if words else ""
    if len(words) > 2 and words[1] == "::":
        name, words = words[2], words[2:]
    argument = " ".join(words[2:-1]) if len(words) > 3 and words[1] == "(" else ""
    return _SYNONYMS.get(name, name), argument
