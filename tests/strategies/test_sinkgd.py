"""SinkGD: the iteration against a plain loop, Adam for the rest, no state for matrices, heads that grow."""

from __future__ import annotations

import json
import math

import pytest
import torch
from avalanche.models.dynamic_optimizers import update_optimizer
from safetensors.torch import load, save
from torch import nn
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import make_fx

from contlearn import models, scenarios
from contlearn.errors import ContlearnError
from contlearn.memory.account import snapshot
from contlearn.state import Decoder, Encoder, Samples
from contlearn.strategies.naive import Naive
from contlearn.strategies.sinkgd import SinkGD, is_matrix, parameter_groups, sinkgd_direction


def by_hand(rows: list[list[float]], steps: int) -> list[list[float]]:
    """The iteration in Python's double precision, element by element."""
    m, n = len(rows), len(rows[0])
    for _ in range(steps):
        rows = [[v * math.sqrt(n) / math.hypot(*row) for v in row] for row in rows]
        columns = [[v * math.sqrt(m) / math.hypot(*column) for v in column] for column in zip(*rows, strict=True)]
        rows = [list(row) for row in zip(*columns, strict=True)]
    return rows


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", [(3, 5), (6, 2), (4, 2, 3, 3)])
def test_the_direction_is_the_one_of_a_plain_loop(shape, steps) -> None:
    gradient = torch.randn(shape) * torch.rand(shape[0]).view(-1, *[1] * (len(shape) - 1))
    found = sinkgd_direction(gradient, steps)
    assert found.shape == gradient.shape
    expected = torch.tensor(by_hand(gradient.flatten(1).double().tolist(), steps))
    torch.testing.assert_close(found.flatten(1), expected.float(), rtol=1e-4, atol=1e-5)


def test_columns_have_their_norm_and_rows_nearly() -> None:
    gradient = torch.randn(20, 50) * torch.rand(20, 1).add(0.1)
    found = sinkgd_direction(gradient)
    m, n = gradient.shape
    torch.testing.assert_close(found.norm(dim=0), torch.full((n,), m**0.5))
    torch.testing.assert_close(found.norm(dim=1), torch.full((m,), n**0.5), rtol=1e-2, atol=0)
    assert float((sinkgd_direction(gradient, 1).norm(dim=1) / n**0.5 - 1).abs().max()) > float(
        (found.norm(dim=1) / n**0.5 - 1).abs().max()
    )


def test_the_direction_knows_no_scale_and_keeps_zeros() -> None:
    gradient = torch.randn(60, 40)
    gradient[2], gradient[:, 1] = 0, 0
    found = sinkgd_direction(gradient)
    assert found.isfinite().all() and not found[2].any() and not found[:, 1].any()
    for factor in (2.0**-90, 2.0**90):
        assert torch.equal(sinkgd_direction(gradient * factor), found)
    for shape in ((3, 3), (300, 200)):
        assert not sinkgd_direction(torch.zeros(shape)).any()
    assert sinkgd_direction(gradient.half()).dtype == torch.half
    torch.testing.assert_close(sinkgd_direction(gradient.half()), found.half(), rtol=1e-2, atol=1e-2)


def test_the_direction_is_traced_to_one_graph() -> None:
    network = nn.Linear(5, 3)
    x = torch.randn(7, 5)

    def step(weights):
        gradients = grad(lambda w: functional_call(network, w, (x,)).square().sum())(weights)
        return weights["weight"] - 0.1 * sinkgd_direction(gradients["weight"])

    weights = {name: p.detach() for name, p in network.named_parameters()}
    graph = make_fx(step)(weights)
    torch.testing.assert_close(graph(weights), step(weights))
    other = {name: p + torch.randn_like(p) for name, p in weights.items()}
    torch.testing.assert_close(graph(other), step(other))


# ---------------------------------------------------------------- the optimizer


def trained(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 7) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_is_no_matrix_and_what_is_marked_has_adams_steps(decay) -> None:
    def fresh() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((6,), (1, 5), (5, 1), (1, 4, 3), (4, 3))
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    mine, theirs = fresh(), fresh()
    groups = [{"params": mine[:4]}, {"params": mine[4:], "adam": True}]
    trained(SinkGD(groups, 0.02, weight_decay=decay, betas=(0.8, 0.9)), mine)
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    trained(kind(theirs, 0.02, weight_decay=decay, betas=(0.8, 0.9)), theirs)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_a_matrix_steps_by_its_direction_and_has_no_state() -> None:
    matrix, vector = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(4))
    optimizer = SinkGD([matrix, vector], 0.1, lr_scale=0.5, steps=3, weight_decay=0.2)
    before = matrix.detach().clone()
    trained(optimizer, [matrix, vector], steps=1)
    expected = before * (1 - 0.05 * 0.2) - 0.05 * sinkgd_direction(matrix.grad, 3)
    torch.testing.assert_close(matrix.detach(), expected)
    assert list(optimizer.state) == [vector]
    assert optimizer.moment_bytes() == 2 * 4 * 4


def test_adams_rate_can_differ_and_follows_the_schedule() -> None:
    vector = nn.Parameter(torch.zeros(1))
    optimizer = SinkGD([vector], 0.5, adam_lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    moved = []
    for _ in range(2):
        before = float(vector.detach())
        vector.grad = torch.ones(1)
        optimizer.step()  # the first steps of Adam on equal gradients have the length of its rate
        schedule.step()
        moved.append(before - float(vector.detach()))
    assert moved == pytest.approx([0.01, 0.005], rel=1e-4)


def test_what_is_told_apart_in_a_model(stream) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden, self.head = nn.Embedding(9, 4), nn.Linear(4, 5), nn.Linear(5, 2)

    model = Tokens()
    encoder, apart = parameter_groups(model, model.parameters())
    assert {id(p) for p in encoder["params"]} == {id(p) for p in model.hidden.parameters()}
    assert not encoder["adam"] and apart["adam"] and len(apart["params"]) == 3
    assert [is_matrix(p) for p in model.hidden.parameters()] == [True, False]
    model = nn.Sequential(nn.Conv2d(1, 2, 3))  # nothing in it is an output layer
    assert [len(group["params"]) for group in parameter_groups(model, model.parameters())] == [2, 0]


def test_rows_of_a_head_that_grows_stay_with_adam(stream, small) -> None:
    model = small(stream, hidden_layers=2)
    strategy = Naive(model=model, optimizer="sinkgd", lr=0.02, batch_size=8, device="cpu")
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        named = {id(p): name for name, p in model.named_parameters()}
        groups = [{named[id(p)] for p in group["params"]} for group in strategy.optimizer.param_groups]
        assert groups[1] == {"head.weight", "head.bias"} and groups[0] == set(named.values()) - groups[1]
        with_state = {named[id(p)] for p, held in strategy.optimizer.state.items() if held}
        assert with_state == {name for name in named.values() if name.endswith("bias")} | {"head.weight"}
        moments = 2 * 4 * (8 + 8 + model.head.weight.numel() + model.head.bias.numel())
        assert snapshot(strategy).optimizer == moments == strategy.optimizer.moment_bytes()


def test_a_head_that_is_added_goes_to_adam() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.ModuleDict({"a": nn.Linear(4, 2)})})
    optimizer = SinkGD(parameter_groups(model, model.parameters()), 0.1)
    known = update_optimizer(optimizer, dict(model.named_parameters()), None, reset_state=True)
    model["head"]["b"] = nn.Linear(4, 3)
    update_optimizer(optimizer, dict(model.named_parameters()), known)
    assert {id(p) for p in model["head"].parameters()} == {id(p) for p in optimizer.param_groups[1]["params"]}


def test_it_learns(stream, small) -> None:
    model = small(stream)
    strategy = Naive(model=model, optimizer="sinkgd", lr=0.05, epochs=60, batch_size=8, device="cpu",
                     lr_schedule="cosine")  # fmt: skip
    strategy.train(stream.train_stream[0], eval_streams=[])
    losses = strategy.epoch_losses
    assert losses[-1] < 0.5 * losses[0]


def test_a_stored_run_goes_on_with_the_same_bits(made_up) -> None:
    stream = scenarios.class_incremental(made_up(), n_experiences=2)

    def fresh() -> Naive:
        model = models.create("mlp", stream, hidden=8, seed=0)
        strategy = Naive(model=model, optimizer="sinkgd", lr=0.03, weight_decay=0.01, batch_size=9, device="cpu")
        strategy.generator.manual_seed(3)
        return strategy

    strategy = fresh()
    strategy.train(stream.train_stream[0], eval_streams=[])
    encoder = Encoder(strategy, Samples(stream))
    state, tensors = json.loads(json.dumps(encoder.strategy_state())), load(save(encoder.tensors))
    again = fresh()
    Decoder(again, Samples(stream), tensors).strategy_state(state, experiences_done=[stream.train_stream[0]])
    for one in (strategy, again):
        torch.manual_seed(5)
        one.train(stream.train_stream[1], eval_streams=[])
    left, right = strategy.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": -1.0}, "lr: expected at least 0.0, got -1.0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"betas": (0.9, 1.0)}, "betas: expected two numbers"),
        ({"lr": 0.0, "adam_lr": 0.1}, "adam_lr: expected none with lr 0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected at least 0.0, got nan"),
    ],
)
def test_mistakes_get_one_line(options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        SinkGD([nn.Parameter(torch.zeros(2))], **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_strategy_that_has_no_momentum_for_it_says_so(stream, small) -> None:
    with pytest.raises(ContlearnError, match="momentum: only sgd takes it"):
        Naive(model=small(stream), optimizer="sinkgd", momentum=0.9, device="cpu")
    weight = nn.Embedding(4, 3, sparse=True)
    weight(torch.tensor([1])).sum().backward()
    with pytest.raises(ContlearnError, match="expected dense gradients"):
        SinkGD(weight.parameters(), 0.1).step()
