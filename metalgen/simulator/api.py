"""``metal_kernel`` with the signature, behaviour and errors of ``mx.fast.metal_kernel``, on a CPU.

The call is eager: it evaluates its inputs, executes the kernel here, and returns evaluated arrays.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from metalgen.simulator import arrays, errors
from metalgen.simulator.generator import (
    METAL_TYPES,
    GeneratedSource,
    InputForm,
    TemplateValue,
    generate,
)
from metalgen.simulator.launch import (
    POISON,
    SOURCE_NAME,
    check_launch,
    current_recorder,
    integers,
    run,
)
from metalgen.simulator.memory import LaunchMemory, Segment

if TYPE_CHECKING:
    from metalgen.simulator.compiler import CompiledKernel
    from metalgen.simulator.findings import Finding

PREAMBLE = "mlx/backend/metal/kernels/utils.h"
"""MLX's header that stands before every ``metal_kernel``; read from the installed wheel."""

# MLX's own, also while `install` has put ours in its place.
_mlx_metal_kernel = mx.fast.metal_kernel

stand_in_streams: list[Any] = []
"""CPU streams that `install` has handed out where code asked for streams of the GPU."""

_INT32 = range(-(2**31), 2**31)


def mlx_include_dir() -> Path:
    """Return the include folder of the installed MLX. Raises ``MissingToolchain`` without it."""
    spec = importlib.util.find_spec("mlx.core")
    folder = Path(spec.origin if spec and spec.origin else "").parent / "include"
    if not (folder / PREAMBLE).is_file():
        raise errors.MissingToolchain(
            f"the installed mlx has no {PREAMBLE} in its include folder; "
            "the mlx wheels from PyPI have it"
        )
    return folder


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
) -> MetalKernel:
    """Return a kernel that executes on this CPU; arguments as in ``mx.fast.metal_kernel``.

    Bad arguments raise what MLX raises (``TypeError``, ``ValueError``), because MLX's own
    constructor checks them too.
    """
    return MetalKernel(
        name,
        input_names,
        output_names,
        source,
        header,
        ensure_row_contiguous,
        atomic_outputs,
        compile_options,
    )


@dataclass(frozen=True)
class _Input:
    array: mx.array
    storage: arrays.Storage

    @property
    def form(self) -> InputForm:
        return InputForm(self.array.dtype, self.array.ndim, self.array.size)


class MetalKernel:
    """A kernel made by ``metal_kernel``. Call it with keywords, as MLX's."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str,
        ensure_row_contiguous: bool,
        atomic_outputs: bool,
        compile_options: Any,
    ) -> None:
        self._mlx: Any = _mlx_metal_kernel(
            name,
            input_names,
            output_names,
            source,
            header,
            ensure_row_contiguous,
            atomic_outputs,
            compile_options,
        )
        self.name = name
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self.source = source
        self.header = header
        self.ensure_row_contiguous = ensure_row_contiguous
        self.atomic_outputs = atomic_outputs
        self.math_mode = (compile_options or {}).get("math_mode", "safe")
        self._compiled: dict[tuple[str, str], CompiledKernel] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, TemplateValue]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """Run the kernel and return its outputs, evaluated.

        ``grid`` counts threads. Outputs without ``init_value`` are poisoned (NaN, -1) before the
        kernel runs. Raises what MLX raises for bad arguments, and what ``errors`` lists for a
        source that does not compile or a kernel that cannot finish.
        """
        output_shapes = [integers(shape) for shape in output_shapes]
        grid, threadgroup = integers(grid), integers(threadgroup)
        self._validate(
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template,
            init_value=init_value,
            stream=stream,
        )
        bound = [self._input(value) for value in inputs]
        shapes = [tuple(shape) for shape in output_shapes]
        generated = self._generate(bound, output_dtypes, template or ())
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{generated.text}\n```")
        group = check_launch(grid, threadgroup, len(generated.bindings))
        compiled = self._compile(generated)
        segments = _segments(generated, bound, shapes, output_dtypes, init_value is not None)

        def write(memory: LaunchMemory) -> None:
            for index, binding in enumerate(generated.bindings):
                target = memory.view(index)
                if binding.role == "output":
                    if init_value is not None:
                        arrays.fill(target, init_value, output_dtypes[binding.position])
                    else:
                        target[:] = bytes([POISON]) * len(target)
                elif binding.role == "input":
                    bound[binding.position].storage.copy_to(target)
                else:
                    target[:] = _shape_bytes(bound[binding.position], binding.role)

        with run(
            compiled,
            segments,
            write,
            grid,
            group,
            source=generated.text,
            lints=self._lints(generated) if compiled.mode == "checked" else (),
        ) as memory:
            first = len(segments) - len(shapes)
            return [
                arrays.to_array(memory.view(first + position), shape, dtype)
                for position, (shape, dtype) in enumerate(zip(shapes, output_dtypes, strict=True))
            ]

    def generated_source(
        self,
        inputs: Sequence[Any],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, TemplateValue]] = (),
    ) -> GeneratedSource:
        """Return the complete Metal text for these inputs, as MLX prints it when verbose."""
        bound = [self._input(value) for value in inputs]
        return self._generate(bound, output_dtypes, template)

    def _validate(self, **call: Any) -> None:
        # An extent that does not fit MLX's 32 bits ends the process inside MLX: refuse it here.
        for shape in call["output_shapes"]:
            if isinstance(shape, Sequence) and any(
                isinstance(extent, int) and extent not in _INT32 for extent in shape
            ):
                raise errors.LaunchError(
                    f"output_shapes: expected extents of 32 bits, got {tuple(shape)}"
                )
        stream = call.pop("stream")
        device = getattr(stream, "device", stream)
        if stream is not None and device != mx.Device(mx.gpu) and stream not in stand_in_streams:
            raise errors.LaunchError("[metal_kernel] Only supports the GPU.")
        # MLX checks the arguments itself, and only then notices that there is no Metal (on a Mac
        # it returns lazy arrays, which nobody evaluates).
        try:
            self._mlx(**call)
        except RuntimeError as error:
            if str(error) != "[metal_kernel] No Metal back-end.":
                raise
        for shape in call["output_shapes"]:
            if any(extent < 0 for extent in shape):
                raise errors.LaunchError(
                    f"output_shapes: expected extents of at least 0, got {tuple(shape)}"
                )
        for dtype in (
            *(value.dtype for value in call["inputs"] if isinstance(value, mx.array)),
            *call["output_dtypes"],
            *(value for _, value in call["template"] or () if isinstance(value, mx.Dtype)),
        ):
            if dtype not in METAL_TYPES:
                raise errors.LaunchError("float64 is not supported on the GPU")

    def _input(self, value: Any) -> _Input:
        array = value if isinstance(value, mx.array) else mx.array(value)
        storage = arrays.storage(array)
        if self.ensure_row_contiguous and not storage.row_contiguous:
            array = mx.contiguous(array)
            storage = arrays.storage(array)
        return _Input(array, storage)

    def _generate(
        self,
        bound: Sequence[_Input],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, TemplateValue]],
    ) -> GeneratedSource:
        return generate(
            self.name,
            self.input_names,
            self.output_names,
            self.source,
            self.header,
            [each.form for each in bound],
            output_dtypes,
            template,
            self.atomic_outputs,
        )

    def _compile(self, generated: GeneratedSource) -> CompiledKernel:
        mode: Literal["plain", "checked"] = "checked" if current_recorder().checked else "plain"
        key = (mode, generated.text)
        from metalgen.simulator import sweeping

        if key not in self._compiled or not sweeping.use(self._compiled[key].path):
            from metalgen.simulator.compiler import compile_metal

            self._compiled[key] = sweeping.kept(
                lambda: compile_metal(
                    self._unit(generated),
                    generated.kernel_name,
                    mode=mode,
                    include_dirs=(mlx_include_dir(),),
                )
            )
        return self._compiled[key]

    def _unit(self, generated: GeneratedSource) -> str:
        """Return the complete translation unit; lines count in the generated text."""
        fast = "#define __FAST_MATH__ 1\n" if self.math_mode == "fast" else ""
        return f'{fast}#include "{PREAMBLE}"\n#line 1 "{SOURCE_NAME}"\n{generated.text}'

    def _lints(self, generated: GeneratedSource) -> tuple[Finding, ...]:
        from metalgen.simulator.lints import lint

        return lint(self._unit(generated), generated.kernel_name, include_dirs=(mlx_include_dir(),))


def _segments(
    generated: GeneratedSource,
    bound: Sequence[_Input],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[mx.Dtype],
    initialised: bool,
) -> list[Segment]:
    segments = []
    for binding in generated.bindings:
        if binding.role == "input":
            where = bound[binding.position].storage
            segments.append(Segment(binding.name, where.size, lead=where.lead))
        elif binding.role == "output":
            size = METAL_TYPES[dtypes[binding.position]][1]
            for extent in shapes[binding.position]:
                size *= extent
            segments.append(Segment(binding.name, size, writable=True, initialised=initialised))
        else:
            size = len(_shape_bytes(bound[binding.position], binding.role))
            segments.append(Segment(binding.name, size))
    return segments


def _shape_bytes(given: _Input, role: str) -> bytes:
    if role == "ndim":
        return given.array.ndim.to_bytes(4, "little")
    values, width = (given.array.shape, 4) if role == "shape" else (given.storage.strides, 8)
    return b"".join(value.to_bytes(width, "little", signed=True) for value in values)
