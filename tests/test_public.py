"""What is public holds together: whatever the signature of a public name mentions is public as well."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator

import dnw

KNOWN = {
    "Defaults": "the type of dnw.DEFAULTS, which is public",
    "Exchange": "what a wiring gives the parameters that it hands out; nobody else makes one",
    "WiredLayer": "what dnw.wire gives the wiring that it makes; nobody else makes one",
    "Instruction": "what compiled networks consist of: read from one, made by the compiler alone",
    "Chain": "the attributes of dnw.models.GraphChain, so that counting need not import models",
    "DormantConfig": "a part of dnw.train.Config, set by overrides",
    "RuleConfig": "a part of dnw.train.Config, set by overrides",
    "DensityConfig": "a part of dnw.train.Config, set by overrides",
    "FloorConfig": "a part of dnw.train.Config, set by overrides",
    "TicketConfig": "a part of dnw.train.Config, set by overrides",
}
"""Classes that public signatures mention although they are not public, and why that is so."""
CONSTRUCTED = ("__init__", "__call__", "__getitem__", "__iter__")


def public() -> dict[str, object]:
    """Everything that is listed, by its full name; what is listed and not there raises AttributeError."""
    found = {f"dnw.{name}": getattr(dnw, name) for name in dnw.__all__ if name not in dnw._ROOMS}
    for room in dnw._ROOMS:
        module = getattr(dnw, room)
        found |= {f"dnw.{room}.{name}": getattr(module, name) for name in module.__all__}
    return found


def signatures(name: str, thing: object, root: str) -> Iterator[tuple[str, object]]:
    """What carries annotations in a public name: a function, or the methods, properties and fields of a class."""
    if inspect.isfunction(thing):
        yield name, thing
    elif inspect.isclass(thing):
        for base in (base for base in thing.__mro__ if base.__module__.partition(".")[0] == root):
            yield f"{name} as {base.__name__}", base
            for member, value in vars(base).items():
                function = getattr(value, "fget", None) or getattr(value, "__func__", None) or getattr(value, "func", value)
                if inspect.isfunction(function) and (not member.startswith("_") or member in CONSTRUCTED):
                    yield f"{name}.{member}", function


def mentioned(hint: object) -> Iterator[type]:
    """The classes in an annotation, also within others."""
    if isinstance(hint, (list, tuple)):
        for part in hint:
            yield from mentioned(part)
        return
    if isinstance(hint, type):
        yield hint
    if isinstance(origin := typing.get_origin(hint), type):
        yield origin
    yield from mentioned(typing.get_args(hint))


def missing(things: dict[str, object], root: str = "dnw") -> dict[str, set[str]]:
    """Classes below a module that are mentioned and not among the things, by name, each with where it is mentioned."""
    listed = list(things.values())
    names = {name.rpartition(".")[2]: thing for name, thing in things.items()}
    found: dict[str, set[str]] = {}
    for name, thing in things.items():
        for where, annotated in signatures(name, thing, root):
            for argument, hint in typing.get_type_hints(annotated, localns=names).items():
                for kind in mentioned(hint):
                    if not argument.startswith("_") and kind.__module__.partition(".")[0] == root and kind not in listed:
                        found.setdefault(kind.__name__, set()).add(f"{where}: {argument}")
    return found


def test_public_signatures_mention_public_classes():
    found = missing(public())
    new = {name: sorted(where) for name, where in found.items() if name not in KNOWN}
    assert not new, f"list these in __all__, or above with the reason why they are not public: {new}"
    assert not KNOWN.keys() - found.keys(), "no longer mentioned, or public by now: take them off the list above"


class Hidden:
    """Stands for a class that is not public."""


class Shown:
    field: list[Hidden]

    def method(self) -> Hidden: ...  # type: ignore[empty-body]

    @property
    def attribute(self) -> dict[str, Hidden]: ...  # type: ignore[empty-body]

    @classmethod
    def made(cls, other: Hidden | None) -> Shown: ...  # type: ignore[empty-body]

    def _private(self, other: Hidden) -> None: ...


def takes(function: Callable[[Hidden], Shown]) -> None: ...


def test_every_place_of_a_signature_is_looked_at():
    things = {"Shown": Shown, "takes": takes}
    places = {
        "Shown as Shown: field",
        "Shown.method: return",
        "Shown.attribute: return",
        "Shown.made: other",
        "takes: function",
    }
    assert missing(things, __name__) == {"Hidden": places}
    assert missing({**things, "Hidden": Hidden}, __name__) == {}
