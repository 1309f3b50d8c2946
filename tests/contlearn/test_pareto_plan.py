"""What a sweep's YAML may say, what it means, and one clear line for what it may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from contlearn.errors import ContlearnError
from contlearn.pareto.plan import Cell, expand
from contlearn.pareto.specification import check, load

BASE = {
    "scenario": {"dataset": "digits", "n_experiences": 5},
    "model": {"name": "mlp", "hidden": 8},
    "strategy": {"epochs": 1},
}


def sweep(**content: Any) -> dict[str, Any]:
    return {"base": BASE, "strategies": {"naive": {}, "replay": {}}, **content}


def cells(**content: Any) -> list[Cell]:
    return expand(check(sweep(**content)))


def refused(content: Any, *, seeds: int | None = None) -> str:
    with pytest.raises(ContlearnError) as caught:
        expand(check(content, seeds=seeds))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- cells


def test_every_strategy_meets_every_budget_and_seed_and_one_without_memory_each_seed_once() -> None:
    found = cells(budgets=["8KB", "16KiB", 1000], seeds=2)
    assert [(cell.strategy, cell.budget, cell.seed) for cell in found] == [
        (name, budget, seed)
        for seed in (0, 1)
        for name, budget in (("naive", None), ("replay", 8000), ("replay", 16384), ("replay", 1000))
    ]
    assert found[1].config["strategy"]["memory_budget"] == 8000
    assert found[1].config["strategy"]["epochs"] == 1
    assert [cell.config["seed"] for cell in found] == [0] * 4 + [1] * 4
    assert all(cell.memory_size is None for cell in found)


def test_exemplars_become_the_option_that_counts_them() -> None:
    naive, replay, agem = cells(strategies={"naive": {}, "replay": {}, "agem": {}}, memory_sizes=[52])
    assert replay.config["strategy"]["memory_size"] == 52 and replay.memory_size == 52
    assert agem.config["strategy"]["patterns_per_experience"] == 10  # of each of five experiences
    assert naive.memory_size is None and naive.budget is None


def test_labels_name_variants_of_one_strategy_and_axes_vary_what_they_name() -> None:
    found = cells(
        strategies={"naive": {}, "herding": {"name": "replay", "policy": "herding"}},
        axes={"strategy.lr": [0.05, 0.1], "strategy.batch_size_memory": [4], "model.hidden": [8]},
    )
    assert [cell.label for cell in found] == [
        "naive, lr=0.05, hidden=8",
        "naive, lr=0.1, hidden=8",
        "herding, lr=0.05, batch_size_memory=4, hidden=8",
        "herding, lr=0.1, batch_size_memory=4, hidden=8",
    ]
    assert [cell.config["strategy"]["lr"] for cell in found] == [0.05, 0.1, 0.05, 0.1]
    assert "strategy.batch_size_memory" not in found[0].axes
    assert found[2].strategy == "replay" and found[2].config["strategy"]["policy"] == "herding"


def test_axes_that_end_alike_are_named_in_full() -> None:
    axes = {"scenario.seed": [1], "scenario.n_experiences": [2], "model.head": ["fixed"]}
    assert cells(strategies={"naive": {}}, axes=axes)[0].label == "naive, seed=1, n_experiences=2, head=fixed"


def test_a_cell_is_known_by_its_configuration() -> None:
    few, more = cells(budgets=[8000], seeds=1), cells(budgets=[8000, 9000], seeds=[0, 5], strategies={
        "naive": {}, "ewc": {}, "renamed": {"name": "replay"}
    })  # fmt: skip
    assert {cell.id for cell in few} < {cell.id for cell in more}
    changed = cells(budgets=[8000], base={**BASE, "strategy": {"epochs": 2}})
    assert not {cell.id for cell in few} & {cell.id for cell in changed}
    assert all(Path(cell.id).name == cell.id for cell in more)


def test_a_cell_has_one_thread_unless_the_sweep_says_more() -> None:
    assert cells()[0].config["threads"] == 1
    assert cells(base={**BASE, "threads": 3})[0].config["threads"] == 3
    assert check(sweep(base={**BASE, "threads": None})).threads == 1


def test_the_written_configuration_means_the_same() -> None:
    content = sweep(budgets=["8KB"], axes={"strategy.lr": [0.1]}, seeds=2, description="a  sweep")
    specification = check(content)
    assert check(specification.as_config()) == specification
    assert specification.description == "a sweep" and specification.most_cells == 4
    assert check(content, seeds=7).seeds == list(range(7))


def test_the_shipped_sweep_is_as_large_as_promised() -> None:
    specification = check(load(Path(__file__).parents[2] / "configs" / "pareto_digits.yaml"))
    found = expand(specification)
    assert len(specification.strategies) >= 6 and len(specification.budgets) == 5 and len(specification.seeds) == 3
    assert len({cell.label for cell in found}) == len(specification.strategies)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("64kbytes", "64KB"), ("64K", "64KB"), ("1,5 MB", "1.5MB"), ("64 kibi", "64KiB"), ("16 megabytes", "16MB"),
        ("about 3gigs", "3GB"), ("many", None), ("0KB", None), ("-8KB", "8KB"),
    ],
)  # fmt: skip
def test_a_budget_that_is_none_names_the_nearest_that_is(text: str, nearest: str | None) -> None:
    message = refused(sweep(budgets=[text]))
    assert message.startswith("budgets: expected whole bytes such as 65536, 64KB") and repr(text) in message
    assert re.findall(r"did you mean '(.*)'\?", message) == ([nearest] if nearest else [])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([], ["sweep: expected a mapping"]),
        ({"base": BASE}, ["strategies: missing"]),
        (sweep(strategies={}), ["strategies: expected at least one"]),
        (sweep(strategies=["naive"]), ["strategies: expected a mapping", "list"]),
        (sweep(strategies={"naive": {}, "replya": {}}), ["unknown strategy 'replya'", "did you mean 'replay'"]),
        (sweep(strategies={"x": {"name": 3}}), ["strategies.x.name: expected text, got 3"]),
        (sweep(strategies={"naive": {"lrr": 1}}), ["strategies.naive", "strategy.lrr", "did you mean 'strategy.lr'"]),
        (sweep(strategies={"naive": {"lr": "fast"}}), ["strategies.naive: strategy.lr: expected a number, got 'fast'"]),
        (sweep(strategies={"naive": {}, "again": {"name": "naive"}}), ["'naive' and 'again' are the same"]),
        (sweep(strategy={}), ["unknown key 'strategy'", "did you mean 'strategies'"]),
        (sweep(base=3), ["base: expected a mapping with text keys, got 3"]),
        (sweep(base={"seed": 1}), ["base.seed", "seeds: 3"]),
        (sweep(base={"strategy": {"name": "ewc"}}), ["base.strategy.name"]),
        (sweep(base={"models": {}}), ["base: unknown key 'models'", "did you mean 'model'"]),
        (sweep(base={"scenario": {"name": "clas_incremental"}}), ["base.scenario", "did you mean 'class_incremental'"]),
        (sweep(base={"threads": 0}), ["base.threads: expected a whole number of at least 1, got 0"]),
        (sweep(budgets=[]), ["budgets: expected a list that is not empty"]),
        (sweep(budgets="8KB"), ["budgets: expected a list", "'8KB'"]),
        (sweep(budgets=["8KB", 8000]), ["budgets: 8000 is given twice"]),
        (sweep(budgets=[8000], memory_sizes=[10]), ["budgets and memory_sizes: expected one of them"]),
        (sweep(memory_sizes=[0]), ["memory_sizes: expected a whole number of at least 1, got 0"]),
        (sweep(memory_sizes=[3], strategies={"agem": {}}), ["agem", "expected at least 5, got 3"]),
        (sweep(budgets=[8000], strategies={"naive": {}}), ["budgets: none of the strategies naive has a memory"]),
        (sweep(budgets=[8000], strategies={"replay": {"memory_size": 9}}), ["strategies.replay.memory_size:"]),
        (sweep(axes={}), ["axes: expected at least one"]),
        (sweep(axes=None), ["axes: expected a mapping"]),
        (sweep(axes={"strategy.lr": []}), ["axes.strategy.lr: expected a list of values", "[]"]),
        (sweep(axes={"strategy.lr": 0.1}), ["axes.strategy.lr: expected a list of values", "0.1"]),
        (sweep(axes={"strategy.lr": [1, 1.0]}), ["axes.strategy.lr: 1.0 is given twice"]),
        (sweep(axes={"stratgy.lr": [1]}), ["axes: expected names such as", "did you mean 'strategy.lr'"]),
        (sweep(axes={"strategy.name": ["naive"]}), ["strategy.name is no axis"]),
        (sweep(axes={"strategy.ewc_lambda": [1]}), ["axes.strategy.ewc_lambda: none of the strategies naive, replay"]),
        (sweep(axes={"strategy.policy": ["herding"]}, strategies={"replay": {"policy": "herding"}}), ["as an axis"]),
        (sweep(axes={"model.hiden": [1]}), ["unknown key 'model.hiden'", "did you mean 'model.hidden'"]),
        (sweep(seeds=0), ["seeds: expected a whole number of at least 1, got 0"]),
        (sweep(seeds=[]), ["seeds: expected", "empty"]),
        (sweep(seeds=[1, 1]), ["seeds: 1 is given twice"]),
        (sweep(seeds=True), ["seeds: expected a whole number"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(content: Any, parts: list[str]) -> None:
    message = refused(content)
    assert all(part in message for part in parts), message


def test_a_file_is_read_as_that_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("axes: {strategy.lr: [1e-3]}\nstrategies: {naive: }\n")
    assert load(tmp_path / "sweep.yaml") == {"axes": {"strategy.lr": [0.001]}, "strategies": {"naive": None}}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "not valid YAML"), ("- naive", "expected a mapping"), ("\x00", "not valid YAML"),
        ("seeds: 1\nseeds: 2", "'seeds' is given twice"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ContlearnError, match=part):
        load(tmp_path / "sweep.yaml")
    with pytest.raises(ContlearnError, match=r"no such file; did you mean .*sweep\.yaml"):
        load(tmp_path / "swep.yaml")
