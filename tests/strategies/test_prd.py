"""PRD in training: whose gradients go where, what moves at which rate, what a prediction may be, stopping, export."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from contlearn import config, models, run, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.models import Classifier, GrowingHead
from contlearn.running import RunInterrupted
from contlearn.strategies.prd_losses import prototype_scores, relation_distillation
from contlearn.strategies.prd_network import Projector, Prototypes, TaskPrototypes, add_prototypes
from contlearn.strategies.prd_teacher import taken

SOON = {"lr": 0.05, "epochs": 2, "batch_size": 8, "device": "cpu"}
RELATIONS = ("samples", "classes")


def train(strategy: Any, stream: Any, count: int = 3) -> Any:
    for experience in list(stream.train_stream)[:count]:
        strategy.train(experience, eval_streams=[])
    return strategy


def gradients(strategy: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in strategy.model.named_parameters() if p.numel()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


# ---------------------------------------------------------------- network


def test_the_network_is_encoder_projector_and_bias_free_prototypes(stream, normed) -> None:
    model = strategies.create("prd", normed(stream)).model
    assert [type(part) for part in model.projector] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    shapes = [tuple(part.weight.shape) for part in model.projector if isinstance(part, nn.Linear)]
    assert shapes == [(8, 8), (8, 8), (128, 8)]
    assert isinstance(model.head, Prototypes) and dict(model.head.named_parameters()).keys() == {"weight"}


def test_scores_are_cosines_and_old_rows_keep_their_bits_when_rows_are_added() -> None:
    head = Prototypes(5, 2)
    before, features = head.weight.detach().clone(), torch.randn(4, 5)
    head.grow(3)
    assert torch.equal(head.weight[:2], before) and head.weight.shape == (3, 5)
    expected = torch.cosine_similarity(features.unsqueeze(1), head.weight.unsqueeze(0), dim=2)
    torch.testing.assert_close(head(features), expected)
    other = Prototypes(5)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight) and set(head.state_dict()) == {"weight"}


def test_prototypes_start_as_a_linear_layers_rows() -> None:
    torch.manual_seed(4)
    head = Prototypes(400, 50)
    assert head.weight.abs().max() <= 1 / 20 and head.weight.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


def test_the_projectors_seed_gives_its_weights_and_draws_from_nothing_else(stream, small) -> None:
    held = torch.get_rng_state()
    first, again, other = (Projector(8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), held)
    assert torch.equal(first[0].weight, again[0].weight) and not torch.equal(first[0].weight, other[0].weight)


def test_a_head_of_any_kind_becomes_prototypes_and_what_is_there_stays(made_up, small) -> None:
    stream = scenarios.task_incremental(made_up(), n_experiences=3)
    for head, kind in (("task", TaskPrototypes), ("growing", Prototypes), ("fixed", Prototypes)):
        model = small(stream, head=head)
        add_prototypes(model)
        assert type(model.head) is kind and model.head.out_features == 0
        projector = model.projector
        add_prototypes(model)
        assert model.projector is projector


# ---------------------------------------------------------------- gradients


def test_the_attraction_gives_the_encoder_no_gradient_and_the_prototypes_all_of_theirs(stream, normed) -> None:
    strategy = train(strategies.create("prd", normed(stream), **SOON), stream, 2)
    strategy.relations.classes.new, strategy.is_training = [2, 3], True
    strategy.relations.tensors = taken(strategy.model)
    y = torch.tensor([2, 3] * 6)
    strategy.mbatch = [torch.rand(12, 1, 4, 4), y, torch.zeros_like(y)]
    found = {}
    for beta in (0.0, 3.0):
        strategy.beta = beta
        strategy.model.train()
        strategy.mb_output = strategy.forward()
        found[beta] = gradients(strategy, strategy.criterion())
    for name, gradient in found[3.0].items():
        if name != "head.weight":
            assert torch.equal(gradient, found[0.0][name]) and gradient.norm() > 0, name
    pull = found[3.0]["head.weight"] - found[0.0]["head.weight"]
    assert pull[2:].norm() > 0.05 and torch.equal(pull[:2], 0 * pull[:2])
    assert torch.equal(found[0.0]["head.weight"][2:], torch.zeros(2, 8))


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_student_equal_to_its_teacher_pays_nothing_and_is_pulled_nowhere(stream, normed, relation) -> None:
    strategy = train(strategies.create("prd", normed(stream), relation=relation, **SOON), stream, 2)
    model, relations = strategy.model.eval(), strategy.relations
    relations.classes.new, relations.tensors = [], taken(model)
    x = torch.rand(12, 1, 4, 4)
    loss = relations.loss(model, x, model.features(x))
    assert loss.requires_grad and abs(loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(strategy, loss).values())
    with torch.no_grad():
        model.head.weight[1] += torch.linspace(-1, 1, 8)
    loss = relations.loss(model, x, model.features(x))
    found = gradients(strategy, loss)
    assert loss.item() > 1e-5 and found["head.weight"].norm() > 1e-6 and found["backbone.1.weight"].norm() > 1e-6


def test_a_teacher_in_train_mode_agrees_with_a_student_on_the_same_batch_and_in_eval_mode_does_not(
    stream, normed
) -> None:
    x, losses = torch.rand(12, 1, 4, 4), {}
    for mode in ("eval", "train"):
        torch.manual_seed(0)
        strategy = train(strategies.create("prd", normed(stream), teacher_mode=mode, **SOON), stream, 2)
        model, relations = strategy.model.train(), strategy.relations
        relations.classes.new, relations.tensors = [], taken(model)
        before = {name: held.clone() for name, held in relations.tensors.items()}
        losses[mode] = relations.loss(model, x, model.features(x)).item()
        still = all(torch.equal(held, before[name]) for name, held in relations.tensors.items())
        assert still == (mode == "eval")  # its statistics drift with every batch
    assert abs(losses["train"]) < 1e-6 < losses["eval"]


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_distillation_is_over_old_tasks_only_and_takes_the_model_before_this_experience(
    stream, normed, watch, relation
) -> None:
    """The loss of a whole iteration, from the pieces, with a teacher that is a plain copy."""
    kept: list[Any] = []
    compared: list[int] = []

    @torch.no_grad()
    def check(strategy: Any) -> None:
        new = sorted(strategy.experience.classes_in_this_experience)
        features = strategy.model.features(strategy.mb_x)
        total = 0.0
        for first in range(0, new[0], 2):
            columns, teacher = slice(first, first + 2), kept[-1]
            before = prototype_scores(teacher.features(strategy.mb_x), teacher.head.weight[columns])
            now = prototype_scores(features, strategy.model.head.weight[columns])
            total += relation_distillation(now, before, relation).item()
        found = strategy.relations.loss(strategy.model, strategy.mb_x, features)
        assert found.item() == pytest.approx(total, rel=1e-4, abs=1e-7)
        compared.append(new[0])

    def copied(strategy: Any) -> None:
        kept.append(copy.deepcopy(strategy.model).eval())

    plugins = [watch(after_training_exp=copied, after_backward=check)]
    train(strategies.create("prd", normed(stream), relation=relation, plugins=plugins, **SOON), stream)
    assert set(compared) == {0, 2, 4}


# ---------------------------------------------------------------- updates


def test_prototypes_move_at_their_own_rate_without_momentum_and_decay(stream, normed, watch) -> None:
    before: dict[str, torch.Tensor] = {}
    seen: list[float] = []

    def after(strategy: Any) -> None:
        rows = strategy.model.head.weight
        rate = 0.3 * (1.0 if strategy.clock.train_exp_epochs == 0 else 0.1)
        torch.testing.assert_close(rows.detach(), before["rows"] - rate * rows.grad, rtol=1e-5, atol=1e-7)
        seen.append(rate)

    options = {
        **SOON, "momentum": 0.9, "weight_decay": 0.1, "prototypes_lr": 0.3, "lr_schedule": "multistep",
        "milestones": [1],
    }  # fmt: skip
    plugins = [
        watch(
            before_update=lambda s: before.update(rows=s.model.head.weight.detach().clone()), after_update=after
        )
    ]
    train(strategies.create("prd", normed(stream), plugins=plugins, **options), stream)
    assert {round(rate, 4) for rate in seen} == {0.3, 0.03}


def test_old_prototypes_move_with_the_distillation_and_with_nothing_else(stream, normed) -> None:
    for alpha in (0.0, 4.0):
        strategy = strategies.create("prd", normed(stream), alpha=alpha, momentum=0.9, weight_decay=0.1, **SOON)
        train(strategy, stream, 1)
        old = strategy.model.head.weight.detach().clone()
        strategy.train(stream.train_stream[1], eval_streams=[])
        assert torch.equal(strategy.model.head.weight[:2], old) == (alpha == 0.0)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sinkgd"])
def test_other_optimizers_keep_the_group_apart(stream, normed, optimizer) -> None:
    strategy = strategies.create(
        "prd", normed(stream), optimizer=optimizer, weight_decay=0.1, prototypes_lr=0.02, **SOON
    )
    train(strategy, stream)
    *_, own = strategy.optimizer.param_groups
    assert [p is strategy.model.head.weight for p in own["params"]] == [True]
    assert (own["lr"], own["weight_decay"]) == (0.02, 0.0)
    assert all(parameter.isfinite().all() for parameter in strategy.model.parameters())


def test_an_optimizer_object_must_hold_the_prototypes(stream, small) -> None:
    model = small(stream)
    with pytest.raises(ContlearnError, match="optimizer: it does not hold the prototypes"):
        strategies.create("prd", model, optimizer=torch.optim.SGD(small(stream).parameters(), lr=0.1))
    add_prototypes(model)
    strategy = strategies.create("prd", model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1)
    train(strategy, stream)
    assert [len(group["params"]) for group in strategy.optimizer.param_groups] == [8, 1]


def test_the_first_experience_may_be_longer_and_prototypes_keep_their_rate(stream, small, watch) -> None:
    rates: list[tuple[float, ...]] = []
    plugin = watch(
        before_training_epoch=lambda s: rates.append(tuple(group["lr"] for group in s.optimizer.param_groups))
    )
    options = {**SOON, "lr": 1.0, "prototypes_lr": 0.5, "first_experience": {"epochs": 3, "lr": 0.25}}
    train(strategies.create("prd", small(stream), plugins=[plugin], **options), stream)
    assert rates == [(0.25, 0.5)] * 3 + [(1.0, 0.5)] * 4


def test_the_stream_and_its_labels_are_left_as_they_were(stream, small, watch) -> None:
    wanted = [list(experience.dataset.targets) for experience in stream.train_stream]
    labels: set[int] = set()
    plugin = watch(after_backward=lambda s: labels.update(s.mb_y.tolist()))
    train(strategies.create("prd", small(stream), plugins=[plugin], **SOON), stream)
    assert labels == set(range(6))
    assert [list(experience.dataset.targets) for experience in stream.train_stream] == wanted


def test_black_and_white_are_the_streams(made_up, small) -> None:
    stream = scenarios.class_incremental(made_up(mean=(0.2,), std=(0.5,)), n_experiences=3)
    strategy = train(strategies.create("prd", small(stream), **SOON), stream, 1)
    assert strategy.augment.black == pytest.approx((-0.4,)) and strategy.augment.white == pytest.approx((1.6,))


# ---------------------------------------------------------------- memory


def test_the_teacher_is_what_can_move_and_lives_while_an_experience_is_trained(stream, normed, watch) -> None:
    model = normed(stream)
    model.backbone[1].requires_grad_(False)
    held: list[set[str]] = []
    plugin = watch(before_training_epoch=lambda s: held.append(set(s.relations.tensors)))
    strategy = strategies.create("prd", model, plugins=[plugin], momentum=0.9, **{**SOON, "epochs": 1})
    found = run(strategy, stream, quiet=True)
    moving = {f"backbone.{name}" for name, p in model.backbone.named_parameters() if p.requires_grad}
    moving |= {f"backbone.{name}" for name, _ in model.backbone.named_buffers()} | {"head.weight"}
    assert held == [set(), moving, moving] and "backbone.1.weight" not in moving
    assert strategy.relations.tensors == {}
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    sizes = {name: tensors[name].numel() * tensors[name].element_size() for name in moving}
    assert found.memory["method_state.teacher"] == sum(sizes.values()) == found.memory["method_state"]
    everything = sum(t.numel() * t.element_size() for t in tensors.values())
    trained = sum(p.numel() * 4 for name, p in model.named_parameters() if p.requires_grad)
    assert found.memory["weights"] == everything and found.memory["trainable_weights"] == trained
    assert found.memory["persistent"] == everything + found.memory["optimizer"]
    assert found.memory["optimizer"] == trained - sizes["head.weight"]  # prototypes have no momentum


# ---------------------------------------------------------------- predictions


def test_no_answer_is_ever_an_unseen_class(stream, small, watch) -> None:
    answers: list[int] = []
    plugin = watch(after_eval_iteration=lambda s: answers.extend(s.mb_output.argmax(1).tolist()))
    strategy = strategies.create("prd", small(stream), plugins=[plugin], **SOON)
    for index, experience in enumerate(stream.train_stream):
        strategy.train(experience, eval_streams=[])
        strategy.model.head.grow(6)  # prototypes that were never trained
        with torch.no_grad():  # and would win
            features = strategy.model.eval().features(torch.rand(1, 1, 4, 4))
            strategy.model.head.weight[2 * index + 2 :] = features
        answers.clear()
        strategy.eval(stream.test_stream)
        assert len(answers) == 18 and set(answers) <= set(range(2 * index + 2))


def test_with_task_ids_answers_are_of_the_samples_task(made_up, small, watch) -> None:
    stream = scenarios.task_incremental(made_up(), n_experiences=3)
    answers: list[tuple[int, int]] = []
    plugin = watch(
        after_eval_iteration=lambda s: answers.extend(
            zip(s.mb_task_id.tolist(), s.mb_output.argmax(1).tolist(), strict=True)
        )
    )
    strategy = train(strategies.create("prd", small(stream), plugins=[plugin], **SOON), stream)
    strategy.eval(stream.test_stream)
    assert len(answers) == 18 and all(answer // 2 == task for task, answer in answers)


def test_classes_that_return_are_not_distilled_as_old_ones(made_up, watch) -> None:
    stream = scenarios.blurry(made_up(), n_experiences=3, seed=1)
    met: list[set[int]] = []
    checked: list[bool] = []

    def check(strategy: Any) -> None:
        old = {label for classes in met for label in classes} - set(strategy.relations.classes.new)
        assert set(strategy.relations.classes.old) == old
        known = [label for task in strategy.relations.tasks for label in task]
        assert len(known) == len(set(known))  # each class is of one task
        checked.append(any(met) and len(old) < len(set().union(*met)))

    def note(strategy: Any) -> None:
        met.append({int(label) for label in strategy.experience.classes_in_this_experience})

    model = models.create("mlp", stream, seed=0, hidden=8)
    plugins = [watch(before_backward=check, after_training_exp=note)]
    train(strategies.create("prd", model, plugins=plugins, **SOON), stream)
    assert any(checked)


# ---------------------------------------------------------------- runs


@pytest.fixture
def coloured(made_up) -> Callable[..., Any]:
    """A stream of images with three channels, and a network with BatchNorm for it."""

    def make() -> tuple[Any, nn.Module]:
        data = made_up(side=8)
        changed = {name: getattr(data, name).repeat(1, 3, 1, 1) for name in ("train_images", "test_images")}
        stream = scenarios.class_incremental(
            type(data)(**{**vars(data), **changed, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2)}), n_experiences=3
        )
        return stream, models.create("slim_resnet18", stream, width=2, seed=0)

    return make


def test_a_run_stopped_in_the_middle_ends_with_the_same_bits(coloured, watch, tmp_path: Path) -> None:
    def go(out: str, *, at: int = -1, resume: bool = False) -> Any:
        stream, model = coloured()

        def stop(strategy: Any) -> None:
            if strategy.clock.train_iterations == at:
                os.kill(os.getpid(), signal.SIGTERM)

        options = {**SOON, "momentum": 0.9, "lr_schedule": "cosine", "first_experience": {"epochs": 3}}
        strategy = strategies.create("prd", model, plugins=[watch(after_training_iteration=stop)], **options)
        return run(strategy, stream, out=tmp_path / out, resume=resume, quiet=True)

    whole = go("whole")
    for at in (3, 9, 12):  # 6 iterations, then 4 and 4: in the longer first experience, at a border's and within
        with pytest.raises(RunInterrupted):
            go(f"pieces{at}", at=at)
        again = go(f"pieces{at}", resume=True)
        one, other = (tmp_path / name / "model.safetensors" for name in ("whole", f"pieces{at}"))
        assert one.read_bytes() == other.read_bytes()
        assert again.accuracy_matrix == whole.accuracy_matrix and again.memory == whole.memory


def test_it_learns_digits_task_by_task_and_keeps_them() -> None:
    stream = scenarios.task_incremental("digits", n_experiences=5)
    found = {}
    for name, own in (("prd", {"flip": False, "prototypes_lr": 0.1}), ("naive", {})):
        model = models.create("mlp", stream, seed=0, hidden=100, dropout=0.0)
        strategy = strategies.create(
            name, model, lr=0.1, momentum=0.9, epochs=6, batch_size=64, device="cpu", **own
        )
        found[name] = run(strategy, stream, quiet=True).metrics
    assert found["prd"]["final_accuracy"] > 0.8 and found["prd"]["forgetting"] < 0.1


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*prd*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_load(path) -> None:
    raw = yaml.safe_load(path.read_text())
    resolved = config.resolve(config.load(path))
    assert resolved["strategy"]["name"] == "prd" and len(CONFIGS) == 5
    assert {key: resolved["strategy"][key] for key in raw["strategy"]} == raw["strategy"]
    if "paper" in raw["description"]:
        wanted = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": 128, "epochs": 100, "alpha": 4.0}
        assert {key: resolved["strategy"][key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": -1.0}, "alpha: expected at least 0, got -1.0"),
        ({"beta": float("nan")}, "beta: expected at least 0, got nan"),
        ({"temperature": 0.0}, "temperature: expected more than 0, got 0.0"),
        ({"distil_temperature": 0.0}, "distil_temperature: expected more than 0, got 0.0"),
        ({"relation": "class"}, "relation: expected samples or classes, got 'class'"),
        ({"teacher_mode": "test"}, "teacher_mode: expected eval or train, got 'test'"),
        ({"prototype_lr": 0.1}, "did you mean 'prototypes_lr'"),
        ({"views": 0}, "views: expected at least 1, got 0"),
    ],
)
def test_mistakes_get_one_line(stream, small, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        strategies.create("prd", small(stream), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_another_make_is_refused() -> None:
    with pytest.raises(ContlearnError, match=r"expected a model of contlearn\.models, got Sequential"):
        strategies.create("prd", nn.Sequential(nn.Flatten(), nn.Linear(16, 6)))


# ---------------------------------------------------------------- export


def tiny(stream: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8)
        )
        model = Classifier(backbone, GrowingHead(8), feature_dim=8)
    model.input_shape = stream.input_shape
    return model


@pytest.mark.parametrize("teacher_mode", ["eval", "train"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_a_device_trains_the_same_experiences(stream, watch, relation, teacher_mode) -> None:
    """The declared step, with the runner's copies and masks between experiences, beside the training loop itself."""
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    plugin = watch(before_forward=lambda s: batches.append((s.mb_x, s.mb_y)))
    strategy = strategies.create(
        "prd", tiny(stream), relation=relation, teacher_mode=teacher_mode, lr=0.05, momentum=0.9, weight_decay=0.01,
        prototypes_lr=0.2, epochs=2, batch_size=16, device="cpu",
    )  # fmt: skip
    experiences = list(stream.train_stream)
    strategy.train(experiences[0], eval_streams=[])
    step = strategy.declare_step(batch_size=32, input_shape=(1, 4, 4), classes=6)  # room is made in the loop's, too
    state = {name: held.clone() for name, held in step.state.items()}
    strategy.relations.tensors = {}
    strategy.plugins.append(plugin)
    for index in (1, 2):
        batches.clear()
        strategy.train(experiences[index], eval_streams=[])
        seen, old = ((torch.arange(6) < 2 * (index + more)).float() for more in (1, 0))
        assert len(batches) == 2
        for x, y in batches:
            given = {"x": x, "y": y, "lr": torch.tensor([0.05]), "class_mask": seen, "old_class_mask": old}
            assert set(given) == set(step.inputs)
            state.update(step.compute(state, given)[1])
        state.update({target: state[source] for target, source in step.copies.items() if source in state})
    for name, held in strategy.model.state_dict().items():
        if name in state:
            torch.testing.assert_close(state[name], held, rtol=1e-4, atol=1e-6, msg=name)
    assert state["method.0.task"][:4].tolist() == [0.0, 0.0, 1.0, 1.0] and step.rates == {"lr": 0.05}
    assert {name for name, role in step.roles.items() if role == "weight"} == set(
        dict(strategy.model.named_parameters())
    )


def test_the_other_relation_is_lowered_to_standard_operators_too(stream) -> None:
    """``samples`` is among all methods that export; ``classes`` compares every class with those of its own task."""
    from contlearn.edge.capture import capture, capture_predict
    from contlearn.edge.onnx import lower
    from contlearn.edge.verify import verify

    strategy = strategies.create("prd", tiny(stream), relation="classes", **{**SOON, "flip": False})
    train(strategy, stream, 2)
    step = strategy.declare_step(batch_size=8, input_shape=(1, 4, 4), classes=6)
    adapt = lower(capture(step))
    report = verify(step, adapt, lower(capture_predict(step)), many=False)
    assert report.figures["loss"] <= 1e-5 and report.figures["update"] <= 1e-3, report
    assert {node.domain for node in adapt.graph.node} <= {"", "ai.onnx"}
