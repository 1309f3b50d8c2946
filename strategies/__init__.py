"""Continual-learning strategies on Avalanche's template, by name.

``create(name, model, ...)`` builds one, ``plugin(name, ...)`` a method that is joined to another, ``list()`` and
``describe(name)`` tell what there is. Importing this package loads neither PyTorch nor Avalanche.
"""

from __future__ import annotations

import builtins
import fnmatch
import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from contlearn.errors import ContlearnError, nearest
from contlearn.strategies.registry import STRATEGIES, StrategyInfo, describe, describe_plugin

if TYPE_CHECKING:
    from avalanche.core import SupervisedPlugin
    from torch import nn

    from contlearn.strategies.template import SupervisedTemplate

# Options that no configuration file can give.
_PYTHON_ONLY = ("criterion", "plugins", "evaluator")
_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

__all__ = ["StrategyInfo", "create", "describe", "joined", "list", "parameters", "plugin", "plugin_parameters"]


def list(
    pattern: str = "*", *, kind: str | tuple[str, ...] | None = None, joinable: bool | None = None
) -> builtins.list[str]:
    """Names of the strategies that match a shell-style pattern.

    Args:
        pattern: as in ``der*``.
        kind: only those of one kind, or of several.
        joinable: only those that can (or cannot) be joined to another as a plug-in.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    records = [STRATEGIES[name] for name in fnmatch.filter(STRATEGIES, pattern)]
    return [
        record.name
        for record in records
        if (kinds is None or record.kind in kinds) and (joinable is None or bool(record.plugin) == joinable)
    ]


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Every option ``create(name, model, ...)`` takes: the method's own first, then those of the training loop."""
    info = describe(name)
    options = plugin_parameters(name) if info.is_plugin else {}
    for cls in info.load().__mro__:
        if "__init__" not in vars(cls):
            continue
        found = inspect.signature(vars(cls)["__init__"]).parameters
        options.update({k: v for k, v in found.items() if v.kind is v.KEYWORD_ONLY and k not in options})
        if not any(p.kind is p.VAR_KEYWORD for p in found.values()):
            break
    options.pop("model", None)
    return options


def plugin_parameters(name: str) -> dict[str, inspect.Parameter]:
    """Every option ``plugin(name, ...)`` takes.

    Raises:
        ContlearnError: unknown name, or a method that cannot be joined to another.
    """
    found = inspect.signature(describe_plugin(name).load_plugin()).parameters
    return {key: parameter for key, parameter in found.items() if parameter.kind in _NAMED}


def plugin(name: str, **options: Any) -> SupervisedPlugin:
    """A method as a plug-in, to be joined to a strategy of ours or of Avalanche's.

    Args:
        name: a registered method (``list(joinable=True)``).
        options: its own options; see ``plugin_parameters(name)``.

    Raises:
        ContlearnError: unknown name or option, a value out of range, or a method that cannot be joined to another.
    """
    _check_options(f"plug-in {name!r}", options, plugin_parameters(name))
    made: SupervisedPlugin = describe_plugin(name).load_plugin()(**{**_plugin_defaults(name), **options})
    return made


def joined(
    entries: Iterable[str | Mapping[str, Any] | SupervisedPlugin] | None,
) -> builtins.list[SupervisedPlugin]:
    """Plug-ins from what ``plugins`` may hold: names, ``{"name": ..., option: value}``, or ready objects.

    Raises:
        ContlearnError: unknown name or option, or the same method twice.
    """
    if isinstance(entries, str | Mapping):
        raise ContlearnError(f"plugins: expected a list of plug-ins, got {entries!r}")
    made: builtins.list[SupervisedPlugin] = []
    for entry in entries or ():
        if isinstance(entry, str | Mapping):
            name, options = _named(entry)
            made.append(plugin(name, **options))
        else:
            made.append(entry)
    classes = [type(one) for one in made if type(one).__module__.startswith("contlearn.strategies.")]
    for index, cls in enumerate(classes):
        if cls in classes[:index]:
            raise ContlearnError(f"plugins: {cls.__name__} is given twice; expected each method once")
    return made


def create(name: str, model: nn.Module, **options: Any) -> SupervisedTemplate:
    """Build a strategy by name.

    Args:
        name: a registered strategy (``list()``); the name of a plug-in gives fine-tuning with that plug-in.
        model: network to train.
        options: options of the method and of the training loop; see ``parameters(name)``. ``plugins`` takes other
            methods by name (``"nap"``, ``{"name": "nap", "every": 10}``) and Avalanche plug-in objects.

    Raises:
        ContlearnError: unknown strategy or option, or a value out of range.
    """
    info = describe(name)
    known = parameters(name)
    _check_options(f"strategy {name!r}", options, known)
    resolved = {**info.defaults, **options}
    loop, others = dict(resolved), options.get("plugins") or ()
    for entry in others if not isinstance(others, str | Mapping) else ():
        other = _named(entry)[0] if isinstance(entry, str | Mapping) else None
        if other == name:
            raise ContlearnError(f"plugins: {name!r} is given twice; expected each method once")
        if other in info.excludes:
            raise ContlearnError(f"plugins: strategy {name!r} cannot be joined by {other!r}; expected another method")
    if info.is_plugin:
        own = {key: loop.pop(key) for key in plugin_parameters(name) if key in loop}
        loop["plugins"] = [plugin(name, **own), *joined(others)]
    strategy: SupervisedTemplate = info.load()(model=model, **loop)
    given = {**{key: parameter.default for key, parameter in known.items()}, **resolved}
    strategy.spec = {
        "name": name,
        **{key: _plain(value) for key, value in given.items() if key not in _PYTHON_ONLY and _storable(value)},
    }
    if "plugins" in known:
        strategy.spec["plugins"] = [_plugin_spec(entry) for entry in others if isinstance(entry, str | Mapping)]
    return strategy


def _check_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    for option in options:
        if option not in known:
            close = nearest(option, known)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ContlearnError(f"{owner} has no option {option!r}{hint} (expected one of: {', '.join(known)})")


def _named(entry: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of an entry of ``plugins``."""
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ContlearnError(f"plugins: expected a name, or a mapping with one as in '{{name: l2}}', got {entry!r}")
    return name, options


def _plugin_defaults(name: str) -> dict[str, Any]:
    """Defaults of the registry that the plug-in itself takes."""
    own = plugin_parameters(name)
    return {key: value for key, value in describe(name).defaults.items() if key in own}


def _plugin_spec(entry: str | Mapping[str, Any]) -> dict[str, Any]:
    """An entry of ``plugins`` with every option filled in."""
    name, options = _named(entry)
    given = {key: parameter.default for key, parameter in plugin_parameters(name).items()}
    given.update({**_plugin_defaults(name), **options})
    return {"name": name, **{key: _plain(value) for key, value in given.items() if _storable(value)}}


def _storable(value: Any) -> bool:
    if isinstance(value, tuple | builtins.list):
        return all(_storable(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _storable(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | builtins.list) else value
