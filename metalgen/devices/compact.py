"""Sources without what a compiler does not read.

MLX copies and hashes a kernel's whole text at every call (mlx/backend/cuda/custom_kernel.cpp), on
the thread that prepares launches: some microseconds for each 16 KiB, of which a short decoding step
has few.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from metalgen.source.digests import TEXT_OR_COMMENT

if TYPE_CHECKING:
    from metalgen.source.render import KernelSource

_FUNCTION = re.compile(
    r"^(?:template <[^\n]*>\n)?__device__ __forceinline__[^\n(]*?(\w+)\([^\n]*\{\n"
    r"(?:[^\n]*\n)*?\}\n",
    re.MULTILINE,
)
_WORD = re.compile(r"\w+")


def compact(source: KernelSource) -> KernelSource:
    """The same kernel: no comment, no indentation, and no helper function that nothing calls."""
    return dataclasses.replace(
        source,
        header=_lines(_called(source.header, source.source)),
        source=_lines(source.source),
    )


def _called(header: str, body: str) -> str:
    """A header without the functions that neither the body nor what is left of it names."""
    functions = list(_FUNCTION.finditer(header))
    words = set(_WORD.findall(body + _FUNCTION.sub("", header)))
    left = functions
    while called := [f for f in left if f[1] in words]:
        left = [f for f in left if f not in called]
        words.update(*(_WORD.findall(f[0]) for f in called))
    unused = {f.start() for f in left}
    return _FUNCTION.sub(lambda f: "" if f.start() in unused else f[0], header)


def _lines(text: str) -> str:
    text = TEXT_OR_COMMENT.sub(lambda match: match["text"] or " ", text)
    return "".join(f"{line}\n" for line in map(str.strip, text.splitlines()) if line)
