"""Finding the arrays that a function captures, and making them arguments.

MLX's trace shows captured arrays as anonymous constants, and shows how a lazy one is computed. With
captured arrays as arguments the trace names them, nothing is evaluated, and gradients reach them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx

MAX_ITEMS = 256
"""Items of a list or dictionary that may hold functions or arrays; longer ones are data."""


def names_used(code: types.CodeType) -> set[str]:
    """Global names and attributes that a function and the functions inside it use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_used(constant)
    return names


def lift(function: Callable[..., Any]) -> tuple[list[mx.array], Callable[..., Any]]:
    """The arrays that a function captures, and what makes it use others instead.

    Looks into closures, defaults, global variables, ``functools.partial``, bound methods, the
    functions that are reached so, tuples, lists and dictionaries, and those attributes of objects,
    of their classes and of modules that the functions name, as in ``self.bias``. What ``mx.grad``
    returns cannot be rebuilt: its arrays are only scheduled for evaluation, so that the trace shows
    them and not their making.

    Returns:
        The arrays, each once, and ``rebuild(arrays)``, which returns a function like the given one
        that captures `arrays` in their place. Nothing of the given function is changed.
    """
    search = _Search()
    search.scan(function, set())
    if search.hidden:
        # Inside a transformation of MLX it refuses; the trace then shows how they are made.
        schedule: Any = mx.async_eval
        with contextlib.suppress(RuntimeError, ValueError):
            schedule(*search.hidden)
    arrays = list(search.found.values())

    def rebuild(replacements: list[mx.array]) -> Callable[..., Any]:
        swap = {id(old): new for old, new in zip(arrays, replacements, strict=True)}
        rebuilt: Callable[..., Any] = _Rebuilding(search.holders, swap).value(function)
        return rebuilt

    return arrays, rebuild if arrays else lambda _: function


class _Search:
    """Walks what functions capture; `holders` are the things that lead to an array."""

    def __init__(self) -> None:
        self.found: dict[int, mx.array] = {}
        self.hidden: list[mx.array] = []
        self.holders: dict[int, Any] = {}
        self.seen: dict[tuple[int, frozenset[str]], bool] = {}

    def scan(self, value: Any, names: set[str]) -> bool:
        """Whether an array is found in a value, of whose attributes `names` are used."""
        if isinstance(value, mx.array):
            self.found.setdefault(id(value), value)
            return True
        parts, names = _parts(value, names)
        if parts is None:
            return False
        key = (id(value), frozenset(names))
        if key in self.seen:
            return self.seen[key]
        self.seen[key] = False
        if _is_opaque(value):
            inner = _Search()
            for part in parts.values():
                inner.scan(part, names)
            self.hidden += inner.found.values()
            return False
        holds = [self.scan(part, names) for part in list(parts.values())]
        if any(holds):
            self.holders[id(value)] = (value, parts, names)
        self.seen[key] = any(holds)
        return any(holds)


class _Rebuilding:
    """Copies of everything that leads to an array, with other arrays in the end."""

    def __init__(self, holders: dict[int, Any], swap: dict[int, mx.array]) -> None:
        self.holders = holders
        self.swap = swap
        self.done: dict[int, Any] = {}

    def value(self, value: Any) -> Any:
        if isinstance(value, mx.array):
            return self.swap.get(id(value), value)
        if id(value) not in self.holders:
            return value
        if id(value) not in self.done:
            self.done[id(value)] = self._copy(value)
        return self.done[id(value)]

    def _copy(self, value: Any) -> Any:
        _, parts, _ = self.holders[id(value)]
        kind = type(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(self.value(value.__func__), self.value(value.__self__))
        if kind is functools.partial:
            keywords = {name: self.value(each) for name, each in value.keywords.items()}
            arguments = [self.value(each) for each in value.args]
            return functools.partial(self.value(value.func), *arguments, **keywords)
        if kind in (tuple, list):
            return kind(self.value(each) for each in value)
        if kind is dict:
            return {name: self.value(each) for name, each in value.items()}
        if kind is types.ModuleType:
            twin = types.ModuleType(value.__name__)
            vars(twin).update(vars(value))
        else:
            twin = copy.copy(value)
        self.done[id(value)] = twin
        for name, part in parts.items():
            self._set(twin, name, part)
        if "__call__" in parts:  # the object is called: by its own method, on the twin
            return types.MethodType(self.value(parts["__call__"]), twin)
        return twin

    def _set(self, twin: Any, name: str, part: Any) -> None:
        """Give a twin its own part, whether it was the object's or its class's."""
        own = getattr(twin, "__dict__", {})
        stored = inspect.getattr_static(type(twin), name, None)
        if isinstance(twin, dict) and name in twin:
            twin[name] = self.value(part)
        elif name in own or isinstance(twin, types.ModuleType):
            own[name] = self.value(part)
        elif isinstance(stored, types.MemberDescriptorType):  # of __slots__
            stored.__set__(twin, self.value(part))
        elif id(part) in self.holders or isinstance(part, mx.array):
            new = self.value(part)
            bound = {types.FunctionType: twin, classmethod: type(twin)}.get(type(stored))
            own[name] = new if bound is None else types.MethodType(new, bound)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        scope = dict(function.__globals__)
        cells = [types.CellType() for _ in function.__closure__ or ()]
        code, name = function.__code__, function.__name__
        twin = types.FunctionType(code, scope, name, None, tuple(cells) or None)
        self.done[id(function)] = twin  # before its parts, which may lead back to it
        for cell, new in zip(function.__closure__ or (), cells, strict=True):
            if filled(cell):
                new.cell_contents = self.value(cell.cell_contents)
        for name in names_used(code) & function.__globals__.keys():
            scope[name] = self.value(function.__globals__[name])
        if function.__defaults__:
            twin.__defaults__ = tuple(map(self.value, function.__defaults__))
        if function.__kwdefaults__:
            keywords = function.__kwdefaults__.items()
            twin.__kwdefaults__ = {name: self.value(each) for name, each in keywords}
        return twin


def filled(cell: types.CellType) -> bool:
    """Whether a variable of a closure has a value yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _is_opaque(value: Any) -> bool:
    """What passes for a function, as that of mx.grad does, and is none."""
    return type(value) is not types.FunctionType and isinstance(value, types.FunctionType)


def _parts(value: Any, names: set[str]) -> tuple[dict[Any, Any] | None, set[str]]:
    """What a value holds, where arrays may be among it, and the attribute names used inside."""
    kind = type(value)
    if isinstance(value, types.FunctionType):
        if (value.__module__ or "").split(".")[0] in ("mlx", "numpy"):
            return None, names
        used = names_used(value.__code__)
        parts: list[Any] = [c.cell_contents for c in value.__closure__ or () if filled(c)]
        parts += value.__defaults__ or ()
        parts += (value.__kwdefaults__ or {}).values()
        parts += [value.__globals__[n] for n in used if n in value.__globals__]
        return dict(enumerate(parts)), used | names
    if kind is types.MethodType:
        return {0: value.__func__, 1: value.__self__}, names_used_by(value.__func__) | names
    if kind is functools.partial:
        return dict(enumerate([value.func, *value.args, *value.keywords.values()])), names
    if kind in (tuple, list, dict):
        items = value.items() if kind is dict else enumerate(value)
        return (dict(items) if len(value) <= MAX_ITEMS else None), names
    if isinstance(value, types.ModuleType):
        library = value.__name__.partition(".")[0] in LIBRARIES
        held = {} if library else vars(value)
        return {n: held[n] for n in names if n in held} or None, names
    if isinstance(value, (type, str, bytes, int, float)) or value is None:
        return None, names
    return _parts_of_object(value, names)


LIBRARIES = sys.stdlib_module_names | {"metalgen", "mlx", "numpy"}
"""Modules whose attributes are not looked at."""


def _parts_of_object(value: Any, names: set[str]) -> tuple[dict[Any, Any] | None, set[str]]:
    """The attributes that are used, by methods too, and the names that those methods add."""
    call = inspect.getattr_static(type(value), "__call__", None)
    called = type(call) is types.FunctionType
    parts: dict[Any, Any] = {}
    if called and not names:  # nothing else is done with it
        parts["__call__"] = call
    names, left = set(names), names | (names_used_by(call) if called else set())
    own = getattr(value, "__dict__", None)
    held = (own or {}) | (value if isinstance(value, dict) else {})  # as mlx.nn keeps parameters
    while left:
        name = left.pop()
        names.add(name)
        if name in held:
            parts[name] = held[name]
            continue
        shared = inspect.getattr_static(type(value), name, None)
        if isinstance(shared, types.MemberDescriptorType):
            with contextlib.suppress(AttributeError):  # without a value
                parts[name] = shared.__get__(value)
            continue
        function = shared.fget if isinstance(shared, property) else shared
        function = getattr(function, "__func__", function)
        left |= names_used_by(function) - names
        if own is not None and not isinstance(shared, property) and isinstance(function, OF_CLASS):
            parts[name] = function
    return parts or None, names


OF_CLASS = (types.FunctionType, mx.array, tuple, list, dict)
"""What of a class a twin of one of its objects gets for itself."""


def names_used_by(function: Any) -> set[str]:
    """`names_used` of a function; of anything else, none."""
    code = getattr(function, "__code__", None)
    return names_used(code) if code else set()
