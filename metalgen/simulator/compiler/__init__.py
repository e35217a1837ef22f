"""The compiler front: Metal source to a shared object that the runtime executes."""

from __future__ import annotations

from .front import SOURCE_NAME, BufferParameter, CompiledKernel, compile_metal

__all__ = ["SOURCE_NAME", "BufferParameter", "CompiledKernel", "compile_metal"]
