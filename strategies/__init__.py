"""Continual-learning strategies on Avalanche's template, by name.

``create(name, model, ...)`` builds one, ``list()`` and ``describe(name)`` tell what there is. Importing this package
loads neither PyTorch nor Avalanche.
"""

from __future__ import annotations

import builtins
import fnmatch
import inspect
from typing import TYPE_CHECKING, Any

from contlearn.errors import ContlearnError, nearest
from contlearn.strategies.registry import STRATEGIES, StrategyInfo, describe

if TYPE_CHECKING:
    from torch import nn

    from contlearn.strategies.template import SupervisedTemplate

# Options that no configuration file can give.
_PYTHON_ONLY = ("criterion", "plugins", "evaluator")

__all__ = ["StrategyInfo", "create", "describe", "list", "parameters"]


def list(pattern: str = "*", *, kind: str | None = None) -> builtins.list[str]:
    """Names of the strategies that match a shell-style pattern, optionally of one kind."""
    return [name for name in fnmatch.filter(STRATEGIES, pattern) if kind is None or STRATEGIES[name].kind == kind]


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Every option ``create(name, model, ...)`` takes: the method's own first, then those of the training loop."""
    options: dict[str, inspect.Parameter] = {}
    for cls in describe(name).load().__mro__:
        if "__init__" not in vars(cls):
            continue
        found = inspect.signature(vars(cls)["__init__"]).parameters
        options.update({k: v for k, v in found.items() if v.kind is v.KEYWORD_ONLY and k not in options})
        if not any(p.kind is p.VAR_KEYWORD for p in found.values()):
            break
    options.pop("model", None)
    return options


def create(name: str, model: nn.Module, **options: Any) -> SupervisedTemplate:
    """Build a strategy by name.

    Args:
        name: a registered strategy (``list()``).
        model: network to train.
        options: options of the method and of the training loop; see ``parameters(name)``.

    Raises:
        ContlearnError: unknown strategy or option, or a value out of range.
    """
    info = describe(name)
    known = parameters(name)
    for option in options:
        if option not in known:
            close = nearest(option, known)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ContlearnError(
                f"strategy {name!r} has no option {option!r}{hint} (expected one of: {', '.join(known)})"
            )
    resolved = {**info.defaults, **options}
    strategy: SupervisedTemplate = info.load()(model=model, **resolved)
    given = {**{key: parameter.default for key, parameter in known.items()}, **resolved}
    strategy.spec = {
        "name": name,
        **{key: _plain(value) for key, value in given.items() if key not in _PYTHON_ONLY and _storable(value)},
    }
    return strategy


def _storable(value: Any) -> bool:
    if isinstance(value, tuple | builtins.list):
        return all(_storable(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | builtins.list) else value
