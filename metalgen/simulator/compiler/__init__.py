"""The compiler front: Metal source to a shared object that the runtime executes."""

from __future__ import annotations

from .entry import BufferParameter
from .front import CompiledKernel, compile_metal
from .language import SOURCE_NAME

__all__ = ["SOURCE_NAME", "BufferParameter", "CompiledKernel", "compile_metal"]
