"""A run's configuration: YAML and command-line overrides, checked against the signatures of what they name."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import yaml

from contlearn.errors import ContlearnError, nearest
from contlearn.options import (
    Option,
    choices,
    model_options,
    plugin_options,
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
    Option(
        "memory_budget",
        int | str | None,
        None,
        "Bytes (16MB) of everything that must survive a power cut: weights, method state and exemplars; the number of "
        "exemplars follows.",
    ),
    Option("threads", int | None, None, "Compute threads; small networks run faster on 1. Default: PyTorch's choice."),
    Option("loggers", list[Literal["tensorboard", "csv"]], [], "Logs beside the run's own records, in its folder."),
)
TOP_LEVEL = (*SECTIONS, *(option.name for option in RUN_OPTIONS), "description")
FLAGS = ("out", "resume", "quiet", "help")


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: ``1e-3`` is a number, and a key that is given twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key, following in zip(sorted(keys), sorted(keys)[1:], strict=False):
            if key == following:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def load(path: str | Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ContlearnError: no such file, not YAML, not a mapping, or an unknown top-level key.
    """
    config = require_mapping(read(path), f"config {str(path)!r}")
    for key in config:
        if key not in TOP_LEVEL:
            raise _unknown_key(key, TOP_LEVEL, f"config {str(path)!r}")
    return config


def read(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        ContlearnError: no such file (with the nearest), not readable, or not YAML.
    """
    file = Path(path)
    try:
        return _yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {str(file.with_name(near[0]))!r}?" if near else ""
        raise ContlearnError(f"config {str(file)!r}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ContlearnError(f"config {str(file)!r}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ContlearnError(f"config {str(file)!r}: not valid YAML ({error})") from None


def resolve(config: dict[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Fill in defaults and apply overrides.

    Args:
        config: content of a configuration file.
        overrides: arguments such as ``--strategy.lr=0.1`` or ``--strategy.lr 0.1``.

    Returns:
        Sections ``scenario``, ``model``, ``strategy`` (each with ``name`` and every option) and the run's options.

    Raises:
        ContlearnError: an unknown name, key or value, with the nearest valid one.
    """
    names, free = section_names(config, overrides)
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
                try:
                    extra[key.removeprefix("--model.")] = _yaml(value)
                except yaml.YAMLError:
                    raise ContlearnError(f"{key[2:]}: expected a YAML value, got {value!r}") from None
                free.remove(argument)
    parsed = _parse(parser, given, free, _types(options))
    resolved = {section: {"name": names[section], **(parsed.get(section) or {})} for section in SECTIONS}
    resolved["model"].update(extra)
    if is_test_time(names["strategy"]) and resolved["model"].get("head") == "auto":
        resolved["model"]["head"] = "fixed"  # nothing new is learned there that a head could grow for
    if "plugins" in resolved["strategy"]:
        resolved["strategy"]["plugins"] = _resolved_plugins(resolved["strategy"]["plugins"] or [])
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

        options["model-common"] = options_of(models.create)
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
    stream = make_stream(resolved)
    return build_on(stream, resolved), stream


def build_on(stream: Any, resolved: dict[str, Any]) -> Any:
    """The strategy of a resolved configuration, with its model, for a stream that is there already."""
    from contlearn import models, strategies

    model_spec = dict(resolved["model"])
    if model_spec.get("seed") is None:
        model_spec["seed"] = resolved["seed"]
    name = model_spec.pop("name")
    try:
        model = models.create(name, stream, **model_spec)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise ContlearnError(
            f"model {name!r}: not enough memory for the weights that its options ask for; expected a smaller model"
        ) from None
    strategy_spec = dict(resolved["strategy"])
    if resolved.get("memory_budget") is not None and is_test_time(strategy_spec["name"]):
        raise ContlearnError(
            f"memory_budget: a test-time strategy such as {strategy_spec['name']!r} keeps no exemplars to fit into it; "
            "expected none"
        )
    strategy = strategies.create(strategy_spec.pop("name"), model, **strategy_spec)
    if resolved.get("memory_budget") is not None:
        from contlearn.memory import budget

        budget.apply(strategy, stream, resolved["memory_budget"])
    return strategy


def is_test_time(strategy: str) -> bool:
    """Whether a registered strategy is a test-time adapter."""
    from contlearn.strategies.registry import describe

    return describe(strategy).kind == "test-time"


def make_stream(resolved: dict[str, Any]) -> Any:
    """The stream of a resolved configuration; sets its thread count and seeds every random source on the way.

    Raises:
        ContlearnError: data missing or damaged.
    """
    from contlearn import scenarios
    from contlearn.state import seed_everything

    if resolved["threads"] is not None:
        if resolved["threads"] < 1:
            raise ContlearnError(f"threads: expected at least 1, got {resolved['threads']}")
        import torch

        torch.set_num_threads(resolved["threads"])
    seed_everything(resolved["seed"])
    return scenarios.create(**resolved["scenario"])


def join_values(arguments: Sequence[str]) -> list[str]:
    """Arguments ``--key value`` as ``--key=value``, so that no value is taken for something else."""
    joined: list[str] = []
    for argument in arguments:
        last = joined[-1] if joined else ""
        if last.startswith("--") and "=" not in last and last[2:] not in FLAGS and not argument.startswith("--"):
            joined[-1] = f"{last}={argument}"
        else:
            joined.append(argument)
    return joined


def section_names(config: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Name of each section, and the overrides that are not names.

    Raises:
        ContlearnError: a section that is no mapping, a name that is no text or is missing.
    """
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
    for argument in join_values(overrides):
        match = re.fullmatch(r"--(scenario|model|strategy)\.name(?:=(.*))?", argument, flags=re.DOTALL)
        if match is None:
            free.append(argument)
        elif match.group(2) is None:
            raise ContlearnError(f"{argument}: expected a name after it")
        else:
            names[match.group(1)] = match.group(2)
    return names, free


def _yaml(text: str) -> Any:
    loader = _Loader(text)  # what yaml.safe_load does, with the two rules above
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _resolved_plugins(entries: Sequence[str | dict[str, Any]]) -> list[dict[str, Any]]:
    """Every entry as a mapping of its name and all its options."""
    from jsonargparse import ArgumentParser

    resolved = []
    for index, entry in enumerate(entries):
        where = f"strategy.plugins[{index}]"
        given = {"name": entry} if isinstance(entry, str) else dict(require_mapping(entry, where))
        name = given.pop("name", None)
        if not isinstance(name, str):
            raise ContlearnError(f"{where}: expected a name, or a mapping with one as in '{{name: l2}}', got {entry!r}")
        types = {option.name: option for option in plugin_options(name)}
        for key in given:
            if key not in types:
                raise _unknown_key(key, list(types), f"{where} {name!r}")
        parser = ArgumentParser(exit_on_error=False)
        for option in types.values():
            parser.add_argument(f"--{option.name}", type=option.type, default=option.default)
        try:
            resolved.append({"name": name, **_parse(parser, given, [], types)})
        except ContlearnError as error:
            raise ContlearnError(f"{where}.{error}") from None
    return resolved


def _types(options: dict[str, list[Option] | None]) -> dict[str, Option]:
    """Every option of a run by its key."""
    types = {option.name: option for option in RUN_OPTIONS}
    for section in SECTIONS:
        for option in options[section] or options.get(f"{section}-common") or []:
            types[f"{section}.{option.name}"] = option
    return types


def _parse(
    parser: ArgumentParser, given: dict[str, Any], overrides: list[str], types: dict[str, Option]
) -> dict[str, Any]:
    _check_overrides(overrides, types)
    try:
        base = parser.parse_object(given)
        parsed = dict(parser.parse_args(list(overrides), namespace=base).as_dict())
    except (argparse.ArgumentError, SystemExit) as error:
        raise _explained(str(error), types, given, overrides) from None
    for key, option in types.items():
        optional = option.default is None or type(None) in get_args(option.type)
        value = _at(parsed, key)
        if value is None and not optional:
            raise ContlearnError(f"{key}: expected {type_name(option.type)}, got null")
        if isinstance(value, int | float) and not abs(value) < 2**63:
            raise ContlearnError(f"{key}: expected a finite number below 2**63, got {value}")
    return parsed


def _check_overrides(overrides: Sequence[str], types: dict[str, Option]) -> None:
    for argument in overrides:
        key, equals, _ = argument.partition("=")
        if not key.startswith("--"):
            raise ContlearnError(
                f"command line: unexpected argument {argument!r}; expected options such as --strategy.lr=0.1"
            )
        # The parser takes --loggers+=csv as one more item of the list.
        appends = key.endswith("+") and get_origin(types.get(key[2:-1], RUN_OPTIONS[0]).type) is list
        if key[2:] not in types and not appends:
            raise _unknown_key(key[2:], [*types, *FLAGS], "command line", prefix="")
        if not equals:
            raise ContlearnError(f"{key}: expected {type_name(types[key[2:].rstrip('+')].type)} after it")


def _at(values: Any, key: str) -> Any:
    """The value at a dotted key, or ``None``."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _unknown_key(key: str, valid: Sequence[str], where: str, prefix: str = "") -> ContlearnError:
    close = nearest(key, valid)
    hint = f"; did you mean {prefix + close!r}?" if close else ""
    listing = ", ".join(valid) if len(valid) <= 60 else f"{len(valid)} options; see --help"
    return ContlearnError(f"{where}: unknown key {prefix + key!r}{hint} (expected one of: {listing})")


def _explained(
    message: str, types: dict[str, Option], given: dict[str, Any], overrides: Sequence[str]
) -> ContlearnError:
    """The parser's complaint in one line of ours: key, value, what was expected."""
    match = re.search(r'[Pp]arser key "([^"]+)"', message)
    key = match.group(1) if match else None
    if key is None or key not in types:
        return ContlearnError(f"configuration: {message}")
    value: Any = _at(given, key)
    for argument in overrides:
        name, _, text = argument.partition("=")
        if name.rstrip("+") == f"--{key}":
            value = text
    names = choices(types[key].type)
    wrong = [word for word in re.findall(r"[\w-]+", str(value)) if word not in names]
    close = next(filter(None, (nearest(word, names) for word in wrong)), None)
    hint = f"; did you mean {close!r}?" if close else ""
    return ContlearnError(f"{key}: expected {type_name(types[key].type)}, got {value!r}{hint}")
