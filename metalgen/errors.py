"""The errors that metalgen raises on purpose; each room adds its own subclasses."""

from __future__ import annotations


class MetalgenError(Exception):
    """Base of every error with a message meant for the user."""


class ArgumentError(MetalgenError, ValueError):
    """An argument that cannot be used.

    The message names the argument, what was expected and what came.
    """

    def __init__(self, argument: str, expected: str, got: object) -> None:
        self.argument = argument
        self.expected = expected
        self.got = got
        super().__init__(f"{argument}: expected {expected}, but got {got!r}")

    def __reduce__(self) -> tuple[type, tuple[str, str, object]]:
        return type(self), (self.argument, self.expected, self.got)


class MissingArgument(ArgumentError):
    """An argument that was left out although something else makes it necessary."""

    def __init__(self, argument: str, reason: str) -> None:
        self.reason = reason
        super().__init__(argument, f"to be given {reason}", None)
        self.args = (f"{argument} is required {reason}",)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # type: ignore[override]
        return type(self), (self.argument, self.reason)


class InvalidSchedule(MetalgenError, ValueError):
    """A schedule that cannot run a config; ``rule`` names the rule it breaks."""

    def __init__(self, rule: str, detail: str) -> None:
        self.rule = rule
        self.detail = detail
        super().__init__(f"invalid schedule ({rule}): {detail}")

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.rule, self.detail)


class DeviceError(MetalgenError, RuntimeError):
    """A device that is not there, or that could not run a kernel."""
