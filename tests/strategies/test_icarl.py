"""iCaRL against its algorithms: targets, training data, nearest class mean of exemplars."""

from __future__ import annotations

import collections
import copy
import math

import pytest
import torch

from contlearn import strategies
from contlearn.errors import ContlearnError

SOON = {"lr": 0.2, "epochs": 3, "batch_size": 5}


def icarl(model, **options):
    return strategies.create("icarl", model, **{"memory_size": 12, **SOON, **options})


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_targets_are_one_hot_for_new_classes_and_the_old_models_sigmoids_for_old_ones(stream, small, watch) -> None:
    teachers = []

    def check(strategy) -> None:
        old_classes = range(2 * strategy.clock.train_exp_counter)
        terms = []
        for image, label, output in zip(strategy.mb_x, strategy.mb_y, strategy.mb_output.detach(), strict=True):
            if old_classes:
                with torch.no_grad():
                    old = teachers[-1](image[None])[0]
            for c, logit in enumerate(output.tolist()):
                target = sigmoid(float(old[c])) if c in old_classes else float(c == int(label))
                terms.append(-target * math.log(sigmoid(logit)) - (1 - target) * math.log(1 - sigmoid(logit)))
        assert strategy.loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)

    strategy = icarl(
        small(stream, dropout=0.3),
        plugins=[
            watch(
                before_backward=check,
                after_training_exp=lambda s: teachers.append(copy.deepcopy(s.model).eval()),
            )
        ],
    )
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    assert len(teachers) == 3 and not any(p.requires_grad for p in strategy.teacher.parameters())


def test_new_data_and_all_exemplars_are_trained_on_together(stream, small, watch, identify) -> None:
    places, used = identify(stream, "train"), collections.defaultdict(collections.Counter)
    note = watch(before_forward=lambda s: used[s.clock.train_exp_counter].update(places(s.mb_x)))
    strategy, exemplars = icarl(small(stream), plugins=[note]), set()
    for index, experience in enumerate(stream.train_stream):
        strategy.train(experience, eval_streams=[])
        assert used[index] == dict.fromkeys({(index, p) for p in range(16)} | exemplars, 3)
        exemplars = set(places(torch.stack([x for x, *_ in strategy.storage_policy.buffer.train()])))
        assert len(exemplars) == 12


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def distances(strategy, images: torch.Tensor, *, mirror: bool = False) -> torch.Tensor:
    """Algorithm 1, one sample at a time: distance of each image to each class mean, infinite where there is none."""
    model = copy.deepcopy(strategy.model).eval()

    def features(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return unit(model.features(image[None])[0])

    means = {}
    for label, group in strategy.storage_policy.buffer_groups.items():
        exemplars = [image for image, *_ in group.buffer.eval()]
        exemplars += [image.flip(-1) for image in exemplars] if mirror else []
        if exemplars:
            means[label] = unit(torch.stack([features(image) for image in exemplars]).mean(0))
    found = torch.full((len(images), 6), torch.inf)
    for row, image in zip(found, images, strict=True):
        for label, mean in means.items():
            row[label] = (features(image) - mean).norm()
    assert not found.isnan().any(), "a network that gives no features"
    return found


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("memory_size", [12, 3])
def test_evaluation_answers_the_nearest_class_mean(stream, small, watch, mirror, memory_size) -> None:
    answers, images = [], []

    def note(strategy) -> None:
        answers.append(strategy.mb_output.argmax(1))
        images.append(strategy.mb_x)
        assert strategy.loss.isfinite()

    strategy = icarl(
        small(stream, hidden=32, dropout=0.3),
        mirror=mirror,
        memory_size=memory_size,  # 3: less than one exemplar per class in the end
        plugins=[watch(after_eval_iteration=note)],
    )
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        answers.clear(), images.clear()
        strategy.eval(stream.test_stream)
        answered, expected = torch.cat(answers), distances(strategy, torch.cat(images), mirror=mirror)
        torch.testing.assert_close(expected[torch.arange(18), answered], expected.min(1).values)
        assert len(answered.unique()) > 1


def test_class_means_follow_the_model_through_every_evaluation(stream, small, watch) -> None:
    outputs = []
    plugin = watch(after_eval_iteration=lambda s: outputs.append(s.mb_output))
    strategy = icarl(small(stream, hidden=32), plugins=[plugin])
    strategy.train(stream.train_stream[0], eval_streams=[])
    strategy.plugins.insert(0, watch(after_training_epoch=lambda s: s.eval(stream.test_stream[0])))
    strategy.train(stream.train_stream[1], eval_streams=[])
    outputs.clear()
    strategy.eval(stream.test_stream[0])
    images = torch.stack([x for x, *_ in stream.test_stream[0].dataset])
    torch.testing.assert_close(outputs[0], -distances(strategy, images)[:, :4].pow(2), rtol=1e-3, atol=1e-4)


def test_the_head_can_answer_instead(stream, small, watch) -> None:
    outputs = []
    plugin = watch(after_eval_iteration=lambda s: outputs.append(s.mb_output))
    strategy = icarl(small(stream), classifier="head", plugins=[plugin])
    strategy.train(stream.train_stream[0], eval_streams=[])
    strategy.eval(stream.test_stream[0])
    images = torch.stack([x for x, *_ in stream.test_stream[0].dataset])
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], strategy.model.eval()(images))


def test_a_model_without_features_or_a_wrong_classifier_is_refused(stream, small) -> None:
    with pytest.raises(ContlearnError, match="features"):
        icarl(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 6)))
    with pytest.raises(ContlearnError, match="classifier: expected nme or head, got 'ncm'"):
        icarl(small(stream), classifier="ncm")
