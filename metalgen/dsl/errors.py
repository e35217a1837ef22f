"""What is wrong with a score or mask function, and what to write instead."""

from __future__ import annotations

from metalgen.errors import ArgumentError


class FunctionError(ArgumentError):
    """A score or mask function that cannot become part of a kernel.

    The message names the argument, what was expected, what came, and what to write instead.
    """

    def __init__(self, argument: str, expected: str, got: object, instead: str = "") -> None:
        super().__init__(argument, expected, got)
        self.instead = instead
        text = f"{argument}: expected {expected}, but got {got}"
        self.args = (f"{text}; {instead}" if instead else text,)

    def __reduce__(self) -> tuple[type, tuple[str, str, object, str]]:  # type: ignore[override]
        return type(self), (self.argument, self.expected, str(self.got), self.instead)
