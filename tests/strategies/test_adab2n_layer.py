"""AdaB2N's layer against loops over single numbers, its fused function against autograd, and what it saves."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import types

import pytest
import torch
from torch import nn

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.memory.saved import SavedForBackward
from contlearn.strategies.adab2n import AdaB2NPlugin, from_batchnorm
from contlearn.strategies.adab2n_function import BalancedNorm, TaskRows, balanced_norm
from contlearn.strategies.adab2n_layer import AdaB2N, AdaB2N1d, AdaB2N2d

TASKS = [0, 1, 1, 3, 0]  # of five rows; tasks 2 and 4 are absent
SHAPES = [(5, 3), (5, 3, 4), (5, 3, 4, 2)]


class Classes:
    """An experience as far as the register looks at it."""

    def __init__(self, *labels: int) -> None:
        self.classes_in_this_experience = set(labels)


def layer_for(shape: tuple[int, ...], tasks: int = 5, **options) -> AdaB2N:
    """A layer in float64 that knows ``tasks`` tasks of one class each, with weights that are not 1 and 0."""
    layer = (AdaB2N2d if len(shape) == 4 else AdaB2N1d)(shape[1], **options)
    for task in range(tasks):
        layer.adaptation(Classes(task))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
    return layer.double()


def by_loops(layer: AdaB2N, x: torch.Tensor, tasks: list[int], *, renormalise: bool):
    """Mean, variance and row weights by section 3's formulas, one number at a time."""
    psi = layer.psi.tolist()
    counts = [tasks.count(t) for t in range(len(psi))]
    c = [math.exp(p) + n for p, n in zip(psi, counts, strict=True)]
    s = [c[t] / sum(c) / counts[t] for t in tasks]
    if renormalise:
        s = [value / sum(s) for value in s]
    mean, variance = [], []
    for channel in range(x.shape[1]):
        values = [x[i, channel].flatten().tolist() for i in range(len(x))]
        mu = sum(s[i] * sum(row) / len(row) for i, row in enumerate(values))
        mean.append(mu)
        variance.append(sum(s[i] * sum((v - mu) ** 2 for v in row) / len(row) for i, row in enumerate(values)))
    return mean, variance, s


def train_pass(layer: AdaB2N, x: torch.Tensor, tasks: list[int] | None, *, collect: bool = True):
    """Output and regulariser of a training pass."""
    known = None if tasks is None else TaskRows.of(torch.tensor(tasks), layer.register.count)
    layer.batch.open(known, collect=collect)
    y = layer(x)
    layer.batch.close()
    return y, layer.batch.penalties


# ---------------------------------------------------------------- the formulas


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_kappa_1_and_no_tasks_it_is_batch_normalisation(shape, fused) -> None:
    layer = layer_for(shape, kappa=1.0, fused=fused)
    plain = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3).double()
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if key not in ("psi", "eta")})
    n = math.prod(shape) / 3
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 2 + 1
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        before = plain.running_var.clone()
        y, expected = layer(ours), plain(theirs)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)
        torch.testing.assert_close(layer.running_mean, plain.running_mean, atol=1e-7, rtol=1e-6)
        # BatchNorm tracks the variance times n / (n - 1).
        moved = 0.9 * before + (plain.running_var - 0.9 * before) * (n - 1) / n
        torch.testing.assert_close(layer.running_var, moved, atol=1e-7, rtol=1e-6)
        layer.running_var.copy_(plain.running_var)
        layer.running_mean.copy_(plain.running_mean)  # eta is a float32 number: 0.1 to seven digits
    assert layer.psi.grad is None
    assert layer.num_batches_tracked == plain.num_batches_tracked == 3
    layer.eval(), plain.eval()
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)


def test_the_momentum_follows_the_recursion() -> None:
    layer, seen = AdaB2N2d(1, kappa=0.4), []
    for _ in range(200):
        before = layer.running_mean.clone()
        layer(torch.full((2, 1, 2, 2), 5.0))
        seen.append(((layer.running_mean - before) / (5.0 - before)).item())
    assert seen[:4] == pytest.approx([0.3981, 0.2934, 0.2343, 0.1964], abs=1e-4)
    for earlier, later in itertools.pairwise(seen[:20]):
        assert later == pytest.approx(earlier / (earlier + 0.9**0.4), rel=1e-4)
    assert layer.eta.item() == pytest.approx(1 - 0.9**0.4, rel=1e-3) == pytest.approx(0.0413, abs=1e-4)


@pytest.mark.parametrize("steps", [0, 7])
def test_kappa_0_averages_over_all_steps_and_takes_over_batchnorms_counter(steps) -> None:
    norm = nn.BatchNorm1d(2)
    for _ in range(steps):
        norm(torch.randn(4, 2))
    layer, start = from_batchnorm(norm, kappa=0.0), norm.running_mean.clone()
    means = torch.randn(5, 2)
    for mean in means:
        layer(torch.stack([mean - 1, mean + 1]))
    torch.testing.assert_close(layer.running_mean, (steps * start + means.sum(0)) / (steps + 5))


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_output_tracking_and_regulariser_are_the_loops(shape, fused, renormalise) -> None:
    layer = layer_for(shape, kappa=0.7, fused=fused, renormalise=renormalise)
    x = torch.randn(shape, dtype=torch.float64) + 2
    mean, variance, s = by_loops(layer, x, TASKS, renormalise=renormalise)
    assert sum(s) == pytest.approx(1.0) if renormalise else 0.1 < sum(s) < 0.99
    before = layer.running_mean.tolist(), layer.running_var.tolist()
    y, (penalty,) = train_pass(layer, x, TASKS)
    eta, total = 0.1**0.7, 0.0
    for c in range(3):
        scaled = (x[:, c] - mean[c]) / math.sqrt(variance[c] + 1e-5)
        torch.testing.assert_close(y[:, c], scaled * layer.weight[c] + layer.bias[c])
        running = [(1 - eta) * before[0][c] + eta * mean[c], (1 - eta) * before[1][c] + eta * variance[c]]
        assert [layer.running_mean[c].item(), layer.running_var[c].item()] == pytest.approx(running, rel=1e-6)
        total += (mean[c] - running[0]) ** 2 / 3 + (variance[c] - running[1]) ** 2 / 3
    assert penalty.item() == pytest.approx(total, rel=1e-6)


def test_the_gradient_of_psi_is_the_loops_finite_difference() -> None:
    for renormalise in (False, True):
        layer = layer_for((5, 3, 4, 2), renormalise=renormalise)
        x, direction = torch.randn(5, 3, 4, 2).double() + 2, torch.randn(5, 3, 4, 2).double()

        def loss(layer=layer, x=x, direction=direction, renormalise=renormalise) -> float:
            mean, variance, _ = by_loops(layer, x, TASKS, renormalise=renormalise)
            scaled = [(x[:, c] - mean[c]) / math.sqrt(variance[c] + 1e-5) * layer.weight[c].item() for c in range(3)]
            return sum((scaled[c] * direction[:, c]).sum().item() for c in range(3))

        (train_pass(layer, x, TASKS, collect=False)[0] * direction).sum().backward()
        found = []
        for task in range(5):
            ends = []
            for step in (1e-5, -2e-5):
                with torch.no_grad():
                    layer.psi[task] += step
                ends.append(loss())
            with torch.no_grad():
                layer.psi[task] += 1e-5
            found.append((ends[0] - ends[1]) / 2e-5)
        assert layer.psi.grad.tolist() == pytest.approx(found, rel=1e-5, abs=1e-6)
        assert all(abs(found[t]) > 1e-3 for t in (0, 1, 3))
        assert all((abs(found[t]) > 1e-3) != renormalise for t in (2, 4))  # without rows, only as released


def test_the_regularisers_gradient_does_not_pass_the_running_statistics() -> None:
    layer = AdaB2N1d(1, kappa=1.0).double()
    x = torch.tensor([[1.0], [5.0]], dtype=torch.float64, requires_grad=True)
    layer.batch.collect = True
    layer(x)
    (penalty,) = layer.batch.penalties
    # mean 3, variance 4; running mean 0 -> 0.3, running variance 1 -> 1.3.
    assert penalty.item() == pytest.approx(2.7**2 + 2.7**2, rel=1e-6)
    penalty.backward()
    # d mean / dx = 1/2; d variance / dx = (x - 3).
    assert x.grad.flatten().tolist() == pytest.approx([2 * 2.7 * (0.5 - 2), 2 * 2.7 * (0.5 + 2)], rel=1e-6)


# ---------------------------------------------------------------- the fused function


def arguments(shape, *, weighted: bool):
    x = (torch.randn(shape, dtype=torch.float64) + 1).requires_grad_()
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    psi = torch.randn(5, dtype=torch.float64, requires_grad=True) if weighted else None
    rows = TaskRows.of(torch.tensor(TASKS), 5) if weighted else None
    return (x, weight, bias, psi), rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("weighted", "renormalise", "penalise"),
    [(False, False, False), (False, False, True), (True, False, False), (True, False, True), (True, True, True)],
)
def test_gradients_are_the_numerical_ones_and_those_of_single_operations(
    shape, weighted, renormalise, penalise
) -> None:
    inputs, rows = arguments(shape, weighted=weighted)
    running = torch.randn(3).double(), torch.rand(3).double()

    def call(function, eta: float, *tensors):
        x, weight, bias, psi = tensors if weighted else (*tensors, None)
        state = (running[0].clone(), running[1].clone(), torch.tensor(eta).double())
        y, penalty = function(x, weight, bias, psi, *state, rows, 1e-5, renormalise, penalise)
        return (y, penalty) if penalise else (y,)

    given = inputs if weighted else inputs[:3]
    # With eta 0 the running statistics stay; else numerical differences would follow them, which gradients shall not.
    assert torch.autograd.gradcheck(lambda *tensors: call(BalancedNorm.apply, 0.0, *tensors), given)
    sides = []
    for function in (BalancedNorm.apply, balanced_norm):
        out = call(function, 0.3, *given)
        gradients = torch.autograd.grad([out[0].pow(3).sum(), *out[1:]], given)
        sides.append((out, gradients))
    torch.testing.assert_close(*sides)


def test_the_fused_function_takes_other_layouts_and_no_parameters() -> None:
    (x, *_), rows = arguments((5, 3, 4, 2), weighted=True)
    psi, state = torch.randn(5).double().requires_grad_(), (torch.zeros(3).double(), torch.ones(3).double())
    eta = torch.tensor(0.2).double()
    sides = []
    for function, layout in itertools.product((BalancedNorm.apply, balanced_norm), ("plain", "channels_last", "view")):
        mine = x.detach().clone()
        if layout == "channels_last":
            mine = mine.to(memory_format=torch.channels_last)
        else:
            mine = mine.transpose(2, 3).contiguous().transpose(2, 3)
        mine.requires_grad_()
        y, penalty = function(mine, None, None, psi, *(s.clone() for s in state), eta, rows, 1e-5, False, True)
        # The gradient of a mean comes as an expanded scalar.
        sides.append((y, penalty, *torch.autograd.grad(y.pow(2).mean() + y.mean() + penalty, (mine, psi))))
    for other in sides[1:]:
        torch.testing.assert_close(sides[0], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_taken_in_float32(dtype) -> None:
    layer = AdaB2N2d(3)
    for task in range(2):
        layer.adaptation(Classes(task))
    x = (torch.randn(6, 3, 8, 8) * 0.1 + 30).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    other = copy.deepcopy(layer)
    (y, (penalty,)), (expected, (its,)) = train_pass(layer, x, [0] * 5 + [1]), train_pass(other, wide, [0] * 5 + [1])
    assert (y.dtype, penalty.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(layer.running_var, other.running_var)
    torch.testing.assert_close(penalty, its)
    direction = torch.randn_like(expected)
    ((y.float() * direction).sum() + penalty).backward()
    ((expected * direction).sum() + its).backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=0.05, atol=0.05 * wide.grad.abs().max().item())


def saved_bytes(model: nn.Module, x: torch.Tensor, tasks: list[int] | None, *, collect: bool) -> int:
    shared = next((m.batch for m in model.modules() if isinstance(m, AdaB2N)), None)
    for layer in model.modules():
        if isinstance(layer, AdaB2N):
            layer.batch = shared
    if shared is not None:
        shared.open(None if tasks is None else TaskRows.of(torch.tensor(tasks), 2), collect=collect)
    saved = SavedForBackward([*model.parameters(), *model.buffers()])
    with saved.watching():
        loss = model(x).square().sum()
        if collect and shared is not None:
            loss = loss + torch.stack(shared.penalties).sum()
    loss.backward()
    return saved.peak


def test_it_saves_no_more_than_batch_normalisation() -> None:
    stream = types.SimpleNamespace(input_shape=(1, 16, 16), n_classes=4, task_labels=False)

    def make(**options) -> nn.Module:
        model = models.create("resnet14", stream, seed=0, head="fixed")
        if options:
            plugin = AdaB2NPlugin(**options)
            plugin.prepare_model(model)
            for task in range(2):
                for module in model.modules():
                    if isinstance(module, AdaB2N):
                        module.adaptation(Classes(task))
        return model

    x, tasks = torch.randn(6, 1, 16, 16), [0, 0, 1, 1, 1, 0]
    batchnorm = saved_bytes(make(), x, None, collect=False)
    for rows, collect in itertools.product((None, tasks), (False, True)):
        fused = saved_bytes(make(fused=True), x, rows, collect=collect)
        # The stack of the regularisers saves nothing; without one, BatchNorm's saved means are saved, too.
        assert 0.99 * batchnorm < fused <= batchnorm, (rows, collect)
        assert saved_bytes(make(fused=False), x, rows, collect=collect) > 1.4 * batchnorm


def test_a_training_step_can_be_traced() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for norm in (AdaB2N2d(3), AdaB2N2d(3, fused=False)):
        norm.batch.collect = True

        def of(norm: AdaB2N, x: torch.Tensor) -> torch.Tensor:
            norm.batch.penalties.clear()
            x = x.detach().requires_grad_()
            loss = norm(x).pow(3).sum() + sum(norm.batch.penalties)
            return torch.autograd.grad(loss, x)[0]

        step = functools.partial(of, norm)
        x = torch.randn(4, 3, 2, 2)
        state = copy.deepcopy(norm.state_dict())
        traced = make_fx(step)(x)
        norm.load_state_dict(state)
        expected = step(x)
        norm.load_state_dict(state)
        torch.testing.assert_close(traced(x), expected)


# ---------------------------------------------------------------- state and growth


def test_a_state_dict_goes_round_with_the_momentum_and_any_number_of_tasks() -> None:
    layer = layer_for((5, 3), tasks=4).float()
    for _ in range(6):
        layer(torch.randn(5, 3))
    again = AdaB2N1d(3)
    again.load_state_dict(layer.state_dict())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in layer.state_dict().items())
    x = torch.randn(5, 3)
    layer(x), again(x)
    assert torch.equal(layer.running_mean, again.running_mean) and torch.equal(layer.eta, again.eta)
    assert layer.eta.item() < 0.2 < AdaB2N1d(3).eta.item()


def test_the_state_dict_of_batch_normalisation_loads() -> None:
    norm = nn.BatchNorm2d(3)
    for _ in range(4):
        norm(torch.randn(5, 3, 2, 2))
    for kappa, eta in ((0.0, 1 / 5), (0.4, 0.1**0.4)):
        layer = AdaB2N2d(3, kappa=kappa)
        layer(torch.randn(5, 3, 2, 2))
        layer.load_state_dict(norm.state_dict())
        assert layer.eta.item() == pytest.approx(eta) and layer.psi.tolist() == [0.0]
        assert torch.equal(layer.running_var, norm.running_var) and layer.num_batches_tracked == 4


def test_psi_grows_by_one_per_task_keeps_its_values_and_only_in_training() -> None:
    layer = AdaB2N1d(2)
    layer.adaptation(Classes(3, 4))
    assert layer.psi.tolist() == [0.0]
    with torch.no_grad():
        layer.psi.fill_(0.5)
    layer.adaptation(Classes(4, 3))  # the same classes again: no new task
    assert layer.psi.tolist() == [0.5]
    layer.eval()
    layer.adaptation(Classes(7))
    assert layer.psi.tolist() == [0.5] and layer.register.count == 1
    layer.train()
    layer.adaptation(Classes(4, 7))  # one class is new
    layer.adaptation(Classes(0))
    assert layer.psi.tolist() == [0.5, 0.0, 0.0]
    assert layer.register.rows(torch.tensor([7, 3, 0, 4])).index.tolist() == [1, 0, 2, 0]
    for label in (5, 9):
        with pytest.raises(ContlearnError, match=f"label {label} is of no experience.*expected one of"):
            layer.register.rows(torch.tensor([3, label]))


def test_rows_are_for_the_first_pass_of_as_many_samples() -> None:
    for fused in (True, False):
        layer, plain = layer_for((5, 3), fused=fused), nn.BatchNorm1d(3).double()
        plain.weight, plain.bias = layer.weight, layer.bias
        layer.batch.open(TaskRows.of(torch.tensor(TASKS), 5), collect=False)
        fewer, x = torch.randn(4, 3).double(), torch.randn(5, 3).double()
        torch.testing.assert_close(layer(fewer), plain(fewer))
        assert not torch.allclose(layer(x), plain(x))
        torch.testing.assert_close(layer(x), plain(x))


def test_a_layer_that_was_not_adapted_says_so() -> None:
    layer = AdaB2N1d(2)
    layer.batch.open(TaskRows.of(torch.tensor([0, 1]), 2), collect=False)
    with pytest.raises(ContlearnError, match="2 tasks, but psi has 1 entries"):
        layer(torch.randn(2, 2))
