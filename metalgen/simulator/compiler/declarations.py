"""Finds the functions that a host may call, and makes plain functions of them.

Kernels lose what only Metal has (the word `kernel`, attributes), and are noted with their
parameters. Explicit instantiations of kernels are noted and removed. Functions that the simulator
does not execute (of the graphics pipeline, or with textures among their parameters) are removed,
and noted with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .attributes import attribute_end, attribute_list
from .errors import TransformError
from .integers import evaluate, named_integers
from .kernels import ATTRIBUTES, Declared, Instantiation, Kernel, Parameter, Scope
from .tokens import Tokens

# The words and attributes that make a function one that a host may call.
_STAGES = frozenset("kernel vertex fragment mesh object visible intersection stitchable".split())
_WORDS = frozenset(("kernel", "vertex", "fragment"))
_NOT_EXECUTED = {
    "texture": "a texture",
    "depth": "a depth texture",
    "sampler": "a sampler",
    "imageblock": "an imageblock",
    "stage_in": "the output of another stage",
    "payload": "a mesh payload",
    "acceleration_structure": "an acceleration structure",
    "function_table": "a function table",
    "command_buffer": "a command buffer",
    "tensor": "a tensor",
    "patch": "a patch",
}


class Declarations:
    """One walk over the declarations of `tokens` outside of functions and classes."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.found = Declared()
        self._integers: Mapping[str, int] | None = None

    def integers(self) -> Mapping[str, int]:
        """The integers that the source names."""
        if self._integers is None:
            self._integers = named_integers(self.tokens)
        return self._integers

    def read(self) -> Declared:
        """Rewrites the functions, and returns what there are."""
        for start, end, scope in self._statements():
            self._statement(start, end, scope)
        return self.found

    def _statements(self) -> Iterator[tuple[int, int, Scope]]:
        """First and last position, and namespaces, of what ends with `;`, or with a body."""
        tokens = self.tokens
        scopes: list[tuple[int, Scope]] = [(len(tokens), ())]
        at = start = 0
        while at < len(tokens):
            if at >= scopes[-1][0]:
                scopes.pop()
                at += 1
                start = at
                continue
            word = tokens.word(at)
            if word == "{":
                close = tokens.close(at)
                names = self._namespace(start, at)
                if names is not None:
                    scopes.append((close, (*scopes[-1][1], *names)))
                    start = at = at + 1
                    continue
                at = close
                before = tokens.word(start)
                # A class or an initialiser goes on to its `;`, a function's body ends it.
                if tokens.word(at + 1) == ";" or before in ("typedef", "struct", "union", "enum"):
                    at += 1
                    continue
                yield start, at, scopes[-1][1]
                start = at + 1
            elif word in ("(", "["):
                at = tokens.close(at)
            elif word == ";":
                yield start, at, scopes[-1][1]
                start = at + 1
            at += 1

    def _namespace(self, start: int, brace: int) -> Scope | None:
        """The names that the `{` at `brace` opens: () of a linkage, None if it is no namespace."""
        words = self.tokens.words[start:brace]
        if words[:1] == ["inline"]:
            words = words[1:]
        if words[:1] == ["namespace"]:
            return tuple(word for word in words[1:] if word != "::") or ("",)
        return () if len(words) == 2 and words[0] == "extern" else None

    def _statement(self, start: int, end: int, scope: Scope) -> None:
        tokens = self.tokens
        if tokens.word(start) == "template" and tokens.word(start + 1) != "<":
            self._instantiation(start, end, scope)
            return
        at = start
        while tokens.word(at) == "template":
            close = tokens.close_angle(at + 1)
            if close is None:
                return
            at = close + 1
        head = at
        stage, last, marks = "", head - 1, []
        while at < end and tokens.word(at) not in ("(", "{", "=", ";"):
            close = attribute_end(tokens, at)
            if close is not None:
                names = {name for name, _ in attribute_list(tokens, at, close)} & _STAGES
                if names:
                    stage, last = sorted(names)[0], close
                    marks.append((at, close))
                at = close
            elif tokens.word(at) == "__attribute__":
                at = tokens.close(at + 1)
            elif tokens.word(at) in _WORDS and at == last + 1:
                stage, last = tokens.word(at), at
                marks.append((at, at))
            elif tokens.word(at) in ("static", "inline", "extern") and at == last + 1:
                last = at
            at += 1
        words = tokens.words[head:end]
        if tokens.word(end) == ";" and "constexpr" in words and not {"=", "(", "{"} & set(words):
            tokens.remove(start, end)  # of a class's constant once more, which says nothing new
        elif stage and tokens.word(at) == "(":
            self._function(stage, marks, start, at, end, scope)

    def _function(
        self,
        stage: str,
        marks: list[tuple[int, int]],
        start: int,
        opening: int,
        end: int,
        scope: Scope,
    ) -> None:
        tokens = self.tokens
        name_at = opening - 1
        if tokens.word(name_at) == ">":  # of an explicit specialisation
            name_at = (tokens.open_angle(name_at) or 1) - 1
        name = tokens.word(name_at)
        if not tokens.is_name(name_at) or name_at <= marks[-1][1]:
            raise TransformError("a kernel's declaration has no name", tokens.place(opening)[1])
        full = "::".join([*filter(None, scope), name])
        if stage not in ("kernel", "visible", "stitchable"):
            self.found.refused[full] = f"is a {stage} function"
            tokens.remove(start, end)
            return
        for at, close in marks:
            tokens.blank(at, close)
        # `inline`, so that the kernels that are not called make no code.
        tokens.set(marks[-1][0], "inline" if stage == "kernel" else "")
        if stage != "kernel":
            return
        specialised = tokens.word(start) == "template" and tokens.word(start + 2) == ">"
        try:
            parameters = self._parameters(opening, full)
        except _NotExecuted as reason:
            self.found.refused[full] = str(reason)
            tokens.remove(start, end)
            return
        if not specialised:
            template = tokens.word(start) == "template"
            line = tokens.place(name_at)[1]
            self.found.kernels[full] = Kernel(name, parameters, template, line, scope)

    def _parameters(self, opening: int, kernel: str) -> tuple[Parameter, ...]:
        tokens = self.tokens
        found: list[Parameter] = []
        following = {"buffer": 0, "threadgroup": 0}
        inside = tokens.words[opening + 1 : tokens.close(opening)]
        if inside in ([], ["void"]):
            return ()
        for first, last in tokens.split(opening + 1, tokens.close(opening) - 1):
            parameter = self._parameter(first, last, following, kernel)
            if parameter.kind in following:
                following[parameter.kind] = parameter.index + 1
            found.append(parameter)
        return tuple(found)

    def _parameter(
        self, first: int, last: int, following: Mapping[str, int], kernel: str
    ) -> Parameter:
        tokens = self.tokens
        named: dict[str, list[str]] = {}
        words: list[str] = []
        i = first
        while i <= last:
            end = attribute_end(tokens, i)
            if end is not None:
                named |= dict(attribute_list(tokens, i, end))
                i = end + 1
            else:
                words.append(tokens.word(i))
                i += 1
        name, kind = words[-1], " ".join(words[:-1])
        for attribute in named:
            if attribute in ATTRIBUTES:
                return Parameter(name, "position", kind, attribute=attribute)
        for part, what in _NOT_EXECUTED.items():
            if any(part in word for word in (*words[:-1], *named)):
                raise _NotExecuted(
                    f"takes {what} (parameter {name!r}), which the simulator does not have"
                )
        place = tokens.place(first)[1]
        for what, given in (
            ("threadgroup", "threadgroup" in named or "threadgroup" in words),
            ("buffer", "buffer" in named or "device" in words or "constant" in words),
        ):
            if given:
                index = self._index(named.get(what, []), following[what], name, kernel, place)
                return Parameter(name, what, kind, index)  # type: ignore[arg-type]
        raise TransformError(
            f"parameter {name!r} of kernel {kernel!r} needs an attribute such as [[buffer(0)]] or "
            "[[thread_position_in_grid]], but has " + (", ".join(named) or "none"),
            place,
        )

    def _index(self, words: list[str], following: int, name: str, kernel: str, line: int) -> int:
        if not words:
            return following
        value = evaluate(words, {})
        if value is None:
            value = evaluate(words, self.integers())
        if value is None:
            raise TransformError(
                f"parameter {name!r} of kernel {kernel!r}: the index {' '.join(words)!r} is no "
                "integer expression that the simulator can evaluate",
                line,
            )
        return value

    def _instantiation(self, at: int, last: int, scope: Scope) -> None:
        """Notes and removes `template [[host_name("n")]] [[kernel]] T name<...>(...);`."""
        tokens = self.tokens
        host_name, is_kernel, i = "", False, at + 1
        while True:
            end = attribute_end(tokens, i)
            if end is not None:
                for name, argument in attribute_list(tokens, i, end):
                    if name == "host_name":
                        host_name = "".join(word.strip('"') for word in argument)
                    is_kernel |= name == "kernel"
                i = end + 1
            elif tokens.word(i) == "kernel":
                is_kernel, i = True, i + 1
            else:
                break
        if not is_kernel and not host_name:
            return
        stop = last - 1  # the last token of the name and its template arguments
        parameters = ""
        while (opening := tokens.opening(stop)) and tokens.word(stop) == "]":
            stop = opening - 1  # attributes after the parameters
        if tokens.word(stop) == ")":
            opening = tokens.opening(stop)
            parameters = self._types(opening + 1, stop - 1)
            stop = opening - 1
        start, arguments = stop, ""
        if tokens.word(stop) == ">":
            opening_angle = tokens.open_angle(stop)
            if opening_angle is None:
                return
            arguments = tokens.source(opening_angle, stop)
            start = opening_angle - 1
        first = start
        while tokens.word(first - 1) == "::" and tokens.is_name(first - 2):
            first -= 2
        kernel = "".join(tokens.words[first : start + 1])
        expression = tokens.source(first, start) + (f" {arguments}" if arguments else "")
        signature = "" if arguments else f"void (*)({parameters})"
        line = tokens.place(start)[1]
        name = host_name or expression
        self.found.instantiations[name] = Instantiation(
            name, expression, kernel, scope, signature, line
        )
        tokens.remove(at, last)

    def _types(self, first: int, last: int) -> str:
        """The parameters first..last without their attributes."""
        words, i = [], first
        while i <= last:
            end = attribute_end(self.tokens, i)
            if end is None:
                words.append(self.tokens.word(i))
            i = i + 1 if end is None else end + 1
        return " ".join(words)


class _NotExecuted(Exception):
    """A parameter of a kind that the simulator does not have."""
