"""A run's configuration: YAML and command-line overrides, checked against the signatures of what they name."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from contlearn.errors import ContlearnError, nearest
from contlearn.options import (
    Option,
    model_options,
    require_mapping,
    scenario_options,
    strategy_options,
    type_name,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SECTIONS = ("scenario", "model", "strategy")
DEFAULT_NAMES = {"scenario": "class_incremental", "model": "mlp", "strategy": "naive"}
RUN_OPTIONS = (
    Option("seed", int, 0, "Seeds the weights and every random source of training."),
    Option("threads", int | None, None, "Compute threads; small networks run faster on 1. Default: PyTorch's choice."),
    Option("loggers", list[Literal["tensorboard", "csv"]], [], "Logs beside the run's own records, in its folder."),
)
TOP_LEVEL = (*SECTIONS, *(option.name for option in RUN_OPTIONS), "description")


def load(path: str | Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ContlearnError: no such file, not YAML, not a mapping, or an unknown top-level key.
    """
    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {str(file.with_name(near[0]))!r}?" if near else ""
        raise ContlearnError(f"config {str(file)!r}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ContlearnError(f"config {str(file)!r}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ContlearnError(f"config {str(file)!r}: not valid YAML ({error})") from None
    config = require_mapping(content, f"config {str(file)!r}")
    for key in config:
        if key not in TOP_LEVEL:
            raise _unknown_key(key, TOP_LEVEL, f"config {str(file)!r}")
    return config


def resolve(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Fill in defaults and apply overrides.

    Args:
        config: content of a configuration file.
        overrides: ``--strategy.lr=0.1``-style arguments.

    Returns:
        Sections ``scenario``, ``model``, ``strategy`` (each with ``name`` and every option) and the run's options.

    Raises:
        ContlearnError: an unknown name, key or value, with the nearest valid one.
    """
    names, free = _names(config, overrides)
    parser, options = parser_for(names)
    given = {key: value for key, value in config.items() if key != "description"}
    extra: dict[str, Any] = {}
    for section in SECTIONS:
        content = dict(require_mapping(given.get(section) or {}, section))
        content.pop("name", None)
        if options[section] is None:  # timm knows its own options
            known = {option.name for option in options[f"{section}-common"] or []}
            extra = {key: content.pop(key) for key in list(content) if key not in known}
        else:
            valid = [option.name for option in options[section] or []]
            for key in content:
                if key not in valid:
                    raise _unknown_key(key, valid, f"{section} {names[section]!r}", prefix=f"{section}.")
        given[section] = content
    if options["model"] is None:
        known = {f"--model.{option.name}" for option in options["model-common"] or []}
        for argument in list(free):
            key, _, value = argument.partition("=")
            if key.startswith("--model.") and key not in known:
                extra[key.removeprefix("--model.")] = yaml.safe_load(value)
                free.remove(argument)
    parsed = _parse(parser, given, free, options)
    resolved = {section: {"name": names[section], **(parsed.get(section) or {})} for section in SECTIONS}
    resolved["model"].update(extra)
    return {**resolved, **{option.name: parsed[option.name] for option in RUN_OPTIONS}}


def parser_for(names: dict[str, str], **kwargs: Any) -> tuple[ArgumentParser, dict[str, list[Option] | None]]:
    """A parser with every option of the named scenario, model and strategy, and those options by section."""
    from jsonargparse import ArgumentParser

    options: dict[str, list[Option] | None] = {
        "scenario": scenario_options(names["scenario"]),
        "model": model_options(names["model"]),
        "strategy": strategy_options(names["strategy"]),
    }
    if options["model"] is None:
        from contlearn import models
        from contlearn.options import options_of

        options["model-common"] = [o for o in options_of(models.create) if o.name != "seed"]
    parser = ArgumentParser(exit_on_error=False, **kwargs)
    for option in RUN_OPTIONS:
        parser.add_argument(f"--{option.name}", type=option.type, default=option.default, help=option.help)
    for section in SECTIONS:
        group = parser.add_argument_group(f"{section}: {names[section]}")
        for option in options[section] or options.get(f"{section}-common") or []:
            group.add_argument(
                f"--{section}.{option.name}",
                type=option.type,
                default=option.default,
                help=option.help.replace("%", "%%") or " ",
            )
    return parser, options


def build(resolved: dict[str, Any]) -> tuple[Any, Any]:
    """Make the strategy and the stream of a resolved configuration.

    Raises:
        ContlearnError: data missing or damaged, or options that do not fit each other.
    """
    from contlearn import models, scenarios, strategies
    from contlearn.state import seed_everything

    if resolved["threads"] is not None:
        if resolved["threads"] < 1:
            raise ContlearnError(f"threads: expected at least 1, got {resolved['threads']}")
        import torch

        torch.set_num_threads(resolved["threads"])
    seed_everything(resolved["seed"])
    stream = scenarios.create(**resolved["scenario"])
    model_spec = dict(resolved["model"])
    model = models.create(model_spec.pop("name"), stream, seed=resolved["seed"], **model_spec)
    strategy_spec = dict(resolved["strategy"])
    strategy = strategies.create(strategy_spec.pop("name"), model, **strategy_spec)
    return strategy, stream


def _names(config: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Name of each section, and the overrides that are not names."""
    names = dict(DEFAULT_NAMES)
    for section in SECTIONS:
        content = config.get(section)
        if isinstance(content, str):
            raise ContlearnError(f"{section}: expected a mapping with a name, as in '{section}: {{name: {content}}}'")
        if content is not None and "name" in require_mapping(content, section):
            if not isinstance(content["name"], str):
                raise ContlearnError(f"{section}.name: expected text, got {content['name']!r}")
            names[section] = content["name"]
    free: list[str] = []
    waiting: str | None = None
    for argument in overrides:
        if waiting is not None:
            names[waiting], waiting = argument, None
            continue
        match = re.fullmatch(r"--(scenario|model|strategy)\.name(?:=(.*))?", argument, flags=re.DOTALL)
        if match is None:
            free.append(argument)
        elif match.group(2) is None:
            waiting = match.group(1)
        else:
            names[match.group(1)] = match.group(2)
    if waiting is not None:
        raise ContlearnError(f"--{waiting}.name: expected a name after it")
    return names, free


def _parse(
    parser: ArgumentParser, given: dict[str, Any], overrides: list[str], options: dict[str, list[Option] | None]
) -> dict[str, Any]:
    types = {option.name: option for option in RUN_OPTIONS}
    for section in SECTIONS:
        for option in options[section] or options.get(f"{section}-common") or []:
            types[f"{section}.{option.name}"] = option
    _check_override_names(overrides, list(types))
    try:
        base = parser.parse_object(given)
        return dict(parser.parse_args(list(overrides), namespace=base).as_dict())
    except (argparse.ArgumentError, SystemExit) as error:
        raise _explained(str(error), types, given, overrides) from None


def _check_override_names(overrides: Sequence[str], valid: list[str]) -> None:
    for argument in overrides:
        key = argument.partition("=")[0]
        if key.startswith("--") and key[2:] not in valid:
            raise _unknown_key(key[2:], valid, "command line", prefix="")
        if not argument.startswith("-"):
            continue


def _unknown_key(key: str, valid: Sequence[str], where: str, prefix: str = "") -> ContlearnError:
    close = nearest(key, valid)
    hint = f"; did you mean {prefix + close!r}?" if close else ""
    listing = ", ".join(valid) if len(valid) <= 40 else f"{len(valid)} options; see --help"
    return ContlearnError(f"{where}: unknown key {prefix + key!r}{hint} (expected one of: {listing})")


def _explained(
    message: str, types: dict[str, Option], given: dict[str, Any], overrides: Sequence[str]
) -> ContlearnError:
    """The parser's complaint in one line of ours: key, value, what was expected."""
    match = re.search(r'[Pp]arser key "([^"]+)"', message)
    key = match.group(1) if match else None
    if key is None or key not in types:
        return ContlearnError(f"configuration: {message}")
    value: Any = given
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    for position, argument in enumerate(overrides):
        name, equals, text = argument.partition("=")
        if name == f"--{key}":
            value = text if equals else next(iter(overrides[position + 1 :]), None)
    expected = type_name(types[key].type)
    hint = ""
    choices = re.findall(r"one of ([^;]*)", expected)
    if choices and isinstance(value, str):
        close = nearest(value, choices[0].split(" or ")[0].split(", "))
        hint = f"; did you mean {close!r}?" if close else ""
    return ContlearnError(f"{key}: expected {expected}, got {value!r}{hint}")
