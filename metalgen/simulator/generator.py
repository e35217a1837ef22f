"""The Metal text that ``mx.fast.metal_kernel`` builds around a kernel body.

MLX takes the body of a function and writes the function around it: template head, parameters
(their address space depends on each input's size), shape parameters and thread attributes (found
by substring search of the body), and an explicit instantiation. The result must be byte-equal to
MLX 0.32.4's own, because a kernel's meaning depends on it; ``tests/simulator/test_generator.py``
compares the two by letting MLX trace the same call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

TemplateValue = bool | int | mx.Dtype

#: Inputs with fewer elements than this are bound in the ``constant`` address space.
CONSTANT_BELOW = 8

#: Thread attributes in the order in which MLX appends them, with their Metal types.
THREAD_ATTRIBUTES: tuple[tuple[str, str], ...] = (
    ("dispatch_quadgroups_per_threadgroup", "uint"),
    ("dispatch_simdgroups_per_threadgroup", "uint"),
    ("dispatch_threads_per_threadgroup", "uint3"),
    ("grid_origin", "uint3"),
    ("grid_size", "uint3"),
    ("quadgroup_index_in_threadgroup", "uint"),
    ("quadgroups_per_threadgroup", "uint"),
    ("simdgroup_index_in_threadgroup", "uint"),
    ("simdgroups_per_threadgroup", "uint"),
    ("thread_execution_width", "uint"),
    ("thread_index_in_quadgroup", "uint"),
    ("thread_index_in_simdgroup", "uint"),
    ("thread_index_in_threadgroup", "uint"),
    ("thread_position_in_grid", "uint3"),
    ("thread_position_in_threadgroup", "uint3"),
    ("threadgroup_position_in_grid", "uint3"),
    ("threadgroups_per_grid", "uint3"),
    ("threads_per_grid", "uint3"),
    ("threads_per_simdgroup", "uint"),
    ("threads_per_threadgroup", "uint3"),
)

#: Metal's name of each MLX type, and its size in bytes.
METAL_TYPES: dict[mx.Dtype, tuple[str, int]] = {
    mx.bool_: ("bool", 1),
    mx.int8: ("int8_t", 1),
    mx.int16: ("int16_t", 2),
    mx.int32: ("int32_t", 4),
    mx.int64: ("int64_t", 8),
    mx.uint8: ("uint8_t", 1),
    mx.uint16: ("uint16_t", 2),
    mx.uint32: ("uint32_t", 4),
    mx.uint64: ("uint64_t", 8),
    mx.float16: ("float16_t", 2),
    mx.bfloat16: ("bfloat16_t", 2),
    mx.float32: ("float", 4),
    mx.complex64: ("complex64_t", 8),
}


@dataclass(frozen=True)
class InputForm:
    """What the signature needs to know of one input array."""

    dtype: mx.Dtype
    ndim: int
    size: int

    @property
    def metal_type(self) -> str:
        return METAL_TYPES[self.dtype][0]

    @property
    def in_constant(self) -> bool:
        return self.size < CONSTANT_BELOW

    @property
    def name_suffix(self) -> str:
        """What the input adds to the kernel's name."""
        kind = "s" if self.ndim == 0 else "c" if self.in_constant else ""
        return f"_{self.metal_type}{kind}"


@dataclass(frozen=True)
class Binding:
    """One Metal buffer of the generated kernel, in buffer-index order.

    ``role`` is ``input``, ``shape``, ``strides``, ``ndim`` or ``output``; ``position`` counts
    inputs (for the first four) or outputs.
    """

    name: str
    role: str
    position: int


@dataclass(frozen=True)
class GeneratedSource:
    """A complete Metal kernel without the preamble: ``text`` is what MLX prints when verbose."""

    kernel_name: str
    text: str
    bindings: tuple[Binding, ...]
    body_line: int
    """Line of ``text`` (from 1) on which the user's body starts."""


def template_text(template: Sequence[tuple[str, TemplateValue]]) -> str:
    """Return the template arguments as MLX spells them, e.g. ``<float, 1, -3>``."""

    def spell(value: TemplateValue) -> str:
        if isinstance(value, mx.Dtype):
            return METAL_TYPES[value][0]
        return str(int(value))

    return "<" + ", ".join(spell(value) for _, value in template) + ">"


def kernel_name(
    name: str,
    inputs: Sequence[InputForm],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, TemplateValue]] = (),
) -> str:
    """Return the name under which MLX registers the kernel."""
    text = f"custom_kernel_{name}"
    if template:
        arguments = template_text(template)[:-1]
        for found in ("<", ", ", "-"):
            arguments = arguments.replace(found, "_")
        text += f"_{arguments}"
    text += "".join(form.name_suffix for form in inputs)
    return text + "".join(f"_{METAL_TYPES[dtype][0]}" for dtype in output_dtypes)


def used_attributes(source: str) -> list[tuple[str, str]]:
    """Return (name, type) of each thread attribute whose name occurs anywhere in ``source``."""
    return [(name, kind) for name, kind in THREAD_ATTRIBUTES if name in source]


def _template_head(template: Sequence[tuple[str, TemplateValue]]) -> str:
    def kind(value: TemplateValue) -> str:
        if isinstance(value, bool):
            return "bool"
        return "int" if isinstance(value, int) else "typename"

    return "template <" + ", ".join(f"{kind(value)} {name}" for name, value in template) + ">\n"


def generate(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    inputs: Sequence[InputForm],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, TemplateValue]] = (),
    atomic_outputs: bool = False,
) -> GeneratedSource:
    """Write the kernel that ``mx.fast.metal_kernel`` would compile, without MLX's preamble.

    The counts of names, forms and types must agree (MLX checks that before it generates).
    Returns MLX's exact text, malformed signatures included: with no attribute and no shape
    parameter in use MLX ends each output but the last with a comma; with shape parameters but no
    attribute it may close the parameter list too early, and the compiler then says so.
    """
    full_name = kernel_name(name, inputs, output_dtypes, template)
    attributes = used_attributes(source)
    bindings: list[Binding] = []
    lines: list[str] = []

    def bind(kind: str, parameter: str, role: str, position: int) -> str:
        line = f"  {kind} {parameter} [[buffer({len(bindings)})]]"
        bindings.append(Binding(parameter, role, position))
        return line

    for position, (parameter, form) in enumerate(zip(input_names, inputs, strict=True)):
        space = "constant" if form.in_constant else "device"
        mark = "&" if form.ndim == 0 else "*"
        kind = f"const {space} {form.metal_type}{mark}"
        lines.append(bind(kind, parameter, "input", position) + ",\n")
        if form.ndim == 0:
            continue
        for suffix, kind in (
            ("shape", "const constant int*"),
            ("strides", "const constant int64_t*"),
            ("ndim", "const constant int&"),
        ):
            if f"{parameter}_{suffix}" in source:
                lines.append(bind(kind, f"{parameter}_{suffix}", suffix, position) + ",\n")

    # MLX compares the buffer index with the count of arrays, which leaves out shape parameters.
    last_array = len(inputs) + len(output_names) - 1
    for position, (parameter, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        element = METAL_TYPES[dtype][0]
        kind = f"device atomic<{element}>*" if atomic_outputs else f"device {element}*"
        more = len(bindings) < last_array or bool(attributes)
        lines.append(bind(kind, parameter, "output", position) + (",\n" if more else ") {\n"))

    if attributes:
        lines.append(",\n".join(f"  {kind} {attr} [[{attr}]]" for attr, kind in attributes))
        lines.append(") {\n")

    head = header + (_template_head(template) if template else "")
    signature = f"{head}[[kernel]] void {full_name}(\n{''.join(lines)}"
    text = f"{signature}{source}\n}}\n"
    if template:
        instance = full_name + template_text(template)
        text += f'\ntemplate [[host_name("{full_name}")]] [[kernel]] '
        text += f"decltype({instance}) {instance};\n"
    return GeneratedSource(full_name, text, tuple(bindings), signature.count("\n") + 1)
