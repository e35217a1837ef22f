"""What the source says about its kernels: parameters, attributes, explicit instantiations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ATTRIBUTES = frozenset(
    """thread_position_in_grid thread_position_in_threadgroup threadgroup_position_in_grid
    threads_per_threadgroup dispatch_threads_per_threadgroup threads_per_grid threadgroups_per_grid
    grid_origin grid_size thread_index_in_threadgroup thread_index_in_simdgroup
    simdgroup_index_in_threadgroup simdgroups_per_threadgroup dispatch_simdgroups_per_threadgroup
    threads_per_simdgroup thread_execution_width quadgroup_index_in_threadgroup
    thread_index_in_quadgroup quadgroups_per_threadgroup""".split()
)

Scope = tuple[str, ...]
"""The namespaces around a declaration, outermost first; "" is one without a name."""


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
    scope: Scope = ()


@dataclass(frozen=True)
class Instantiation:
    """An explicit instantiation `template [[host_name("name")]] [[kernel]] ... expression;`.

    `kernel` is the template's name; `signature`, where the template's arguments are deduced from
    it, the type of the function.
    """

    name: str
    expression: str
    kernel: str
    scope: Scope = ()
    signature: str = ""
    line: int = 0


@dataclass
class Declared:
    """The kernels of a source, by their names with namespaces, and what it instantiates by name.

    `refused` says of functions that the simulator does not execute why; they are not in the text.
    """

    kernels: dict[str, Kernel] = field(default_factory=dict)
    instantiations: dict[str, Instantiation] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> list[Kernel]:
        """The kernels that `name` may mean: qualified, or the last part of a qualified name."""
        if name in self.kernels:
            return [self.kernels[name]]
        return [kernel for kernel in self.kernels.values() if kernel.name == name]
