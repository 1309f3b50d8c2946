"""Options of scenarios, models and strategies, read from their signatures and docstrings: there is no second schema."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Union

from contlearn.errors import ContlearnError

PLAIN = (int, float, str, bool, type(None))
_YAML_NAMES = {list: "the list", str: "the text", int: "the number", float: "the number", bool: "the value"}


@dataclass(frozen=True)
class Option:
    """One option: its type as the command line and YAML can give it, its default and its documentation."""

    name: str
    type: Any
    default: Any
    help: str


def options_of(*sources: Callable[..., Any]) -> list[Option]:
    """The keyword options of functions or classes, in order; the first to name, and to document, an option wins.

    Options that only Python can give (modules, plug-ins, callables) are left out.
    """
    found: dict[str, Option] = {}
    for source in sources:
        documented = arguments(inspect.getdoc(source) or "")
        function: Any = vars(source)["__init__"] if isinstance(source, type) else source
        function = inspect.unwrap(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if name in found and not found[name].help:
                found[name] = replace(found[name], help=documented.get(name, ""))
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name in found or name == "self":
                continue
            if parameter.default is parameter.empty:
                continue
            plain = plain_type(parameter.annotation, function)
            if plain is not None:
                default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                found[name] = Option(name, plain, default, documented.get(name, ""))
    return list(found.values())


def plain_type(annotation: Any, function: Callable[..., Any]) -> Any:
    """The part of an annotation that YAML can give, or ``None`` when there is none."""
    if isinstance(annotation, str):
        members = []
        for text in _alternatives(annotation):
            try:
                # The annotation is our own source text, never the user's.
                members.append(_evaluate(text, function))
            except NameError:
                continue
        annotation = Union[tuple(members)] if members else None  # noqa: UP007 (built from a list)
    return _plain_part(annotation)


def _plain_part(annotation: Any) -> Any:
    """What of a type YAML can give, sequences as lists; ``None`` when nothing is left."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        kept = [part for part in map(_plain_part, members) if part is not None]
        return Union[tuple(kept)] if set(kept) - {type(None)} else None  # noqa: UP007 (built from a list)
    if annotation in PLAIN or origin is Literal:
        return annotation
    if origin in (list, tuple, Sequence):
        item = _plain_part(members[0])
        return None if item is None else list[item]  # type: ignore[valid-type]
    return dict if origin is dict or annotation is dict else None


def _evaluate(text: str, function: Callable[..., Any]) -> Any:
    namespace = vars(sys.modules[function.__module__])
    return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": text}), globalns=namespace)["it"]


def _alternatives(text: str) -> list[str]:
    """``"a | list[b | c]"`` cut at its outermost bars."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def arguments(docstring: str) -> dict[str, str]:
    """The ``Args:`` section of a Google-style docstring, each text on one line."""
    from docstring_parser import parse

    return {item.arg_name: " ".join((item.description or "").split()) for item in parse(docstring).params}


def type_name(annotation: Any) -> str:
    """A type as an error message names it: ``int``, ``one of a, b``, ``list of int or null``."""
    if annotation is type(None):
        return "null"
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(str, members))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(member) for member in members)
    if origin is list:
        items = {int: "whole numbers", float: "numbers", str: "texts", str | dict: "names or mappings with a name"}
        return f"a list of {items.get(members[0]) or ', '.join(choices(members[0])) or type_name(members[0])}"
    if annotation is dict:
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def choices(annotation: Any) -> list[str]:
    """The names a type allows, wherever they stand in it; none for a type of numbers or free text."""
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return [member for member in members if isinstance(member, str)]
    return [name for member in members for name in choices(member)]


def scenario_options(name: str) -> list[Option]:
    """Options of a scenario, those of its data set included.

    Raises:
        ContlearnError: unknown scenario.
    """
    from contlearn.scenarios.registry import describe
    from contlearn.scenarios.source import load_source

    return [
        Option("dataset", str, "digits", _dataset_help()),
        *_without(options_of(describe(name).load(), load_source), "dataset"),
    ]


def _dataset_help() -> str:
    return "A data set's name (contlearn list datasets), or folder:PATH for your own images."


def model_options(name: str) -> list[Option] | None:
    """Options of a model; ``None`` when only the library that owns it knows them (timm).

    Raises:
        ContlearnError: unknown model.
    """
    from contlearn import models

    info = models.describe(name)
    common = options_of(models.create)
    if info.factory.startswith("contlearn.models._timm"):
        return None
    return [*common, *options_of(info.load_factory())]


def strategy_options(name: str) -> list[Option]:
    """Options of a strategy: the method's own, then those of the training loop.

    Raises:
        ContlearnError: unknown strategy.
    """
    from contlearn.strategies.registry import describe

    info = describe(name)
    classes = _ours(info.load())
    found = options_of(*(_ours(info.load_plugin()) if info.is_plugin else []), *classes)
    return [Option(o.name, o.type, info.defaults.get(o.name, o.default), o.help) for o in found]


def plugin_options(name: str) -> list[Option]:
    """Options of a method as a plug-in.

    Raises:
        ContlearnError: unknown name, or a method that cannot be joined to another.
    """
    from contlearn.strategies.registry import describe_plugin

    info = describe_plugin(name)
    found = options_of(*_ours(info.load_plugin()))
    return [Option(o.name, o.type, info.defaults.get(o.name, o.default), o.help) for o in found]


def _ours(cls: type) -> list[type]:
    """The class and its bases, as far as they are ours and have options."""
    return [one for one in cls.__mro__ if one.__module__.startswith("contlearn.") and "__init__" in vars(one)]


def _without(options: list[Option], *names: str) -> list[Option]:
    return [option for option in options if option.name not in names]


def require_mapping(value: Any, where: str) -> dict[str, Any]:
    """``value`` as a dictionary with text keys.

    Raises:
        ContlearnError: anything else.
    """
    if not isinstance(value, dict):
        given = "nothing" if value is None else f"{_YAML_NAMES.get(type(value), type(value).__name__)} {value!r}"
        raise ContlearnError(f"{where}: expected a mapping of options, got {given}")
    for key in value:
        if not isinstance(key, str):
            raise ContlearnError(f"{where}: expected text as key, got {key!r}")
    return value
