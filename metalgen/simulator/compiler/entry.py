"""The function by which the runtime calls the chosen kernel, for one thread."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from .errors import TransformError
from .kernels import Declared, Kernel, Scope


@dataclass(frozen=True)
class Chosen:
    """A kernel and how it is called: an expression that means the function, within `scope`."""

    kernel: Kernel
    expression: str
    scope: Scope = ()


def choose(found: Declared, name: str) -> Chosen:
    """The kernel that `name` means: a function's name, an instantiation, or a host name of one.

    Raises TransformError for a name that the source lacks, a template without arguments, and a
    kernel that the simulator does not execute, with the reason.
    """
    instantiation = found.instantiations.get(name)
    if instantiation is not None:
        chosen = _find(found, instantiation.kernel, name)
        expression = instantiation.expression
        if instantiation.signature:
            expression = f"(*static_cast<{instantiation.signature}>(&{expression}))"
        return Chosen(chosen, expression, instantiation.scope)
    base = name.split("<", 1)[0].strip()
    kernel = _find(found, base, name)
    if kernel.template and "<" not in name:
        raise TransformError(
            f"{name!r} is a template: name an instantiation of it, such as {name}<float>"
        )
    return Chosen(kernel, name[: len(base)].split("::")[-1] + name[len(base) :], kernel.scope)


def _find(found: Declared, base: str, asked: str) -> Kernel:
    kernels = found.find(base)
    if len(kernels) > 1:
        names = " and ".join(sorted("::".join([*k.scope, k.name]) for k in kernels))
        raise TransformError(f"the source has several kernels {base!r}: {names}")
    if kernels:
        return kernels[0]
    for name, reason in found.refused.items():
        if base in (name, name.split("::")[-1]):
            subject = f"{asked!r} " if asked == base else f"{asked!r}: kernel {base!r} "
            raise TransformError(subject + reason)
    known = sorted({*found.kernels, *found.instantiations})
    if not known:
        raise TransformError(
            f"the source has no kernel {asked!r}, and no [[kernel]] function at all"
        )
    near = difflib.get_close_matches(asked, known, 12) if len(known) > 12 else known
    listed = ", ".join(near or known[:12]) + (", ..." if len(known) > 12 else "")
    raise TransformError(f"the source has no kernel {asked!r}; it has {listed}")


def entry(chosen: Chosen, name: str = "mg_kernel") -> str:
    """The text of the function `name`, which calls the chosen kernel for one thread."""
    signature = f"{name}_signature"
    arguments = []
    for i, p in enumerate(chosen.kernel.parameters):
        kind = f"{signature}::parameter<{i}>"
        if p.kind == "position":
            arguments.append(f"mg::position<{kind}>(thread_->{p.attribute})")
        elif p.kind == "threadgroup":
            arguments.append(f"mg::threadgroup_buffer<{kind}>::get({p.index})")
        else:
            arguments.append(f"mg::buffer<{kind}>::get({p.index})")
    before = "".join(f"namespace {each} {{ " for each in chosen.scope)
    return (
        f'\n#line 1 "metalgen_entry"\n{before}'
        f"typedef mg::signature<decltype({chosen.expression})> {signature};\n"
        f'extern "C" void {name}(const __private mg_thread* thread_) '
        f"{{ {chosen.expression}({', '.join(arguments)}); }}\n" + "}" * len(chosen.scope) + "\n"
    )


@dataclass(frozen=True)
class BufferParameter:
    """A buffer that the kernel takes; `index` is its Metal buffer index."""

    index: int
    name: str
    space: Literal["device", "constant"]
    writable: bool
    type: str
    is_reference: bool


def buffers(kernel: Kernel) -> tuple[BufferParameter, ...]:
    """The buffers that `kernel` takes, by index."""
    found = []
    for p in kernel.parameters:
        if p.kind != "buffer":
            continue
        words = p.type.split()
        space: Literal["device", "constant"] = "constant" if "constant" in words else "device"
        element = " ".join(w for w in words if w not in ("const", "device", "constant", "*", "&"))
        writable = space == "device" and "const" not in words
        found.append(BufferParameter(p.index, p.name, space, writable, element, "&" in words))
    return tuple(sorted(found, key=lambda b: b.index))


def threadgroup_arguments(kernel: Kernel) -> tuple[tuple[int, str], ...]:
    """Index and name of each threadgroup argument of `kernel`, whose size the host gives."""
    return tuple(sorted((p.index, p.name) for p in kernel.parameters if p.kind == "threadgroup"))
