"""A budget for everything that must survive a power cut, and the account that checks it."""

from __future__ import annotations

import pytest

from contlearn import config, run, strategies
from contlearn.errors import ContlearnError

SUPERVISED = strategies.list(kind=("class-incremental", "plug-in"))
FITTED = [name for name in SUPERVISED if name not in ("joint", "cumulative")]


def resolved(name: str, budget: int | str, **strategy: object) -> dict[str, object]:
    return config.resolve(
        {
            "scenario": {"name": "class_incremental", "dataset": "digits", "n_experiences": 2},
            "model": {"name": "resnet14"} if name == "adab2n" else {"name": "mlp", "hidden": 20},
            "strategy": {"name": name, "epochs": 1, **strategy},
            "memory_budget": budget,
        }
    )


@pytest.mark.parametrize("name", FITTED)
def test_what_is_held_at_the_end_fits_and_one_byte_less_than_the_least_is_refused(name: str) -> None:
    with pytest.raises(ContlearnError, match=r"memory_budget: .* expected at least (\d+) bytes") as refused:
        config.build(resolved(name, 100))
    least = int(str(refused.value).split("expected at least ")[1].split()[0])
    with pytest.raises(ContlearnError, match=f"at least {least} bytes"):
        config.build(resolved(name, least - 1))
    for budget in (least, least + 3000):
        strategy, stream = config.build(resolved(name, budget))
        memory = run(strategy, stream, quiet=True).memory
        assert memory["persistent"] <= budget
    assert memory["exemplars"] > 10 or memory["replay"] == 0


def test_a_larger_budget_goes_into_exemplars_and_momentum_takes_its_part() -> None:
    counts = []
    for options in ({}, {"momentum": 0.9}):
        strategy, stream = config.build(resolved("replay", "20KB", policy="reservoir", **options))
        memory = run(strategy, stream, quiet=True).memory
        # All but less than one exemplar (pixels, label, index, reservoir weight) is used.
        assert 20_000 - 84 < memory["persistent"] <= 20_000
        counts.append(memory["exemplars"])
    assert counts[1] < counts[0]


def test_nonsense_is_named() -> None:
    with pytest.raises(ContlearnError, match=r"memory_budget: expected bytes such as .* got '16 apples'"):
        config.build(resolved("replay", "16 apples"))
