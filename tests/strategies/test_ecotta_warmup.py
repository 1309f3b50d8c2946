"""EcoTTA's warm-up: what it trains, that it can be stopped, stored and read back, and its augmentation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.strategies.ecotta import EcoTTA
from contlearn.strategies.ecotta_warmup import augment, rate_factors

SHAPE = (3, 8, 8)


def adapter(*, seed=0, **options):
    stream = SimpleNamespace(input_shape=SHAPE, n_classes=3, task_labels=False)
    model = models.create("resnet14", stream, head="fixed", seed=0)
    options = {"warmup_epochs": 4, "warmup_augment": False, "guard": "off", "device": "cpu", **options}
    made = EcoTTA(model=model, **options)
    made.generator.manual_seed(seed)
    return made


class Source:
    """Three classes, each bright in a channel of its own; the order is drawn anew in each pass."""

    def __init__(self, generator=None):
        self.y = torch.arange(3).repeat(16)
        self.x = torch.rand(48, *SHAPE, generator=torch.Generator().manual_seed(0)) * 0.5
        self.x[torch.arange(48), self.y] += 0.5
        self.generator = generator
        self.passes = 0

    def __call__(self):
        self.passes += 1
        order = torch.randperm(48, generator=self.generator) if self.generator else torch.arange(48)
        for rows in order.split(16):
            yield self.x[rows], self.y[rows]


def loss(made):
    source = Source()
    return float(torch.nn.functional.cross_entropy(made.predict(source.x), source.y))


def test_the_meta_parts_learn_the_source_task_and_nothing_else_moves():
    made = adapter(warmup_epochs=8)
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    made.network.eval().meta.train()
    untrained, source = loss(made), Source()
    assert made.needs_source_data
    made.prepare_with(source)
    assert not made.needs_source_data and source.passes == 8
    made.start()
    assert loss(made) < 0.5 * untrained
    after = made.network.state_dict()
    for name, value in before.items():
        moved = not torch.equal(value, after[name])
        assert moved == name.startswith("meta."), name
    assert torch.equal(after["meta.0.norm.num_batches_tracked"], torch.tensor(24))
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_the_rates_of_ten_epochs_are_the_published_ones():
    assert rate_factors(10, "multistep") == pytest.approx([0.5, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])
    assert rate_factors(5, "multistep") == pytest.approx([0.5, 1, 0.2, 0.04, 0.008])
    assert rate_factors(4, "multistep") == pytest.approx([1, 0.2, 0.04, 0.008])
    assert rate_factors(3, "cosine") == pytest.approx([1, 0.75, 0.25])
    assert rate_factors(1, "multistep") == [1.0]
    assert rate_factors(0, "multistep") == rate_factors(0, "cosine") == []
    for epochs in range(1, 40):
        factors = rate_factors(epochs, "multistep")
        assert len(factors) == epochs and all(factor > 0 for factor in factors)


def warmed(*, stop_after=None, resume=None, **options):
    made = adapter(seed=3, warmup_augment=True, **options)
    records = {}
    source = Source(made.generator)

    def on_epoch(epoch, state):
        records[epoch] = state
        if epoch == stop_after:
            raise KeyboardInterrupt

    try:
        made.prepare_with(source, on_epoch=on_epoch, resume=resume)
    except KeyboardInterrupt:
        assert made.needs_source_data
    return made, records


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_warm_up_that_was_stopped_ends_with_the_same_bits(epoch):
    whole, records = warmed()
    assert sorted(records) == [1, 2, 3, 4]
    _, stopped = warmed(stop_after=epoch)
    assert sorted(stopped) == list(range(1, epoch + 1))
    resumed, rest = warmed(resume=stopped[epoch])
    assert sorted(rest) == list(range(epoch + 1, 5))
    assert equal(resumed.meta_state(), whole.meta_state())
    assert not equal(stopped[1], whole.meta_state())
    x = Source().x
    resumed.margin = whole.margin = 2.0
    assert torch.equal(resumed.start()(x), whole.start()(x))


def test_a_warmed_up_part_moves_to_another_adapter_by_itself_or_through_a_file(tmp_path):
    file = tmp_path / "meta.safetensors"
    first = adapter(warmup=str(file))
    first.prepare_with(Source())
    assert file.is_file()
    second = adapter(warmup=str(file), seed=9)
    assert not second.needs_source_data
    third = adapter(seed=9)
    third.load_meta(first.meta_state())
    assert not third.needs_source_data
    x = Source().x
    logits = [made.start().predict(x) for made in (first, second, third)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_options_of_the_test_time_do_not_ask_for_another_warm_up():
    options = adapter().meta_options
    assert adapter(lam=0.25, lr=0.1, update="two_step", int8_frozen=True).meta_options == options
    for other in ({"k": 5}, {"frozen_batchnorm": "source"}, {"warmup_lr": 0.1}, {"warmup_epochs": 5}):
        assert adapter(**other).meta_options != options


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda made, path: made.start(), "were not warmed up; expected prepare_with"),
        (lambda made, path: made.prepare_with(iter(Source()())), "takes 4 passes; expected a function that starts"),
        (lambda made, path: made.prepare_with(list), "pass 1 over the source data has no batch"),
        (lambda made, path: made.prepare_with(lambda: [(torch.full((4, *SHAPE), torch.inf), torch.zeros(4).long())]),
         "the loss is nan in epoch 1; expected a smaller warmup_lr"),
        (lambda made, path: made.load_meta(adapter(k=5).meta_state()), "stored meta parts do not fit"),
        (lambda made, path: made.load_meta({}), "stored meta parts do not fit"),
        (lambda made, path: adapter(warmup=str(path)).start(), "cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_warmed_up_is_refused_in_one_line(act, message, tmp_path):
    path = tmp_path / "meta.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ContlearnError, match=message) as caught:
        act(adapter(), path)
    assert "\n" not in str(caught.value)


def test_a_file_of_other_partitions_does_not_fit(tmp_path):
    path = tmp_path / "meta.safetensors"
    save_file({name: value.contiguous() for name, value in adapter(k=5).meta_state().items()}, path)
    with pytest.raises(ContlearnError, match="stored meta parts do not fit"):
        adapter(warmup=str(path)).start()


# ---------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_keeps_range_and_shape_and_leaves_its_share_of_images_alone(channels):
    images = torch.rand(400, channels, 8, 8)
    out = augment(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape and out.dtype == images.dtype
    assert float(out.min()) >= 0 and float(out.max()) <= 1
    same = (out == images).flatten(1).all(1).float().mean()
    # Neither jitter (0.4) nor blur (0.2) nor, in colour, grey (0.1): 0.432 and 0.48, four standard deviations wide.
    assert float(same) == pytest.approx(0.6 * 0.8 * (0.9 if channels == 3 else 1), abs=0.1)
    grey = (out[:, 0] == out[:, -1]).flatten(1).all(1).float().mean()
    assert float(grey) == (1.0 if channels == 1 else pytest.approx(0.1, abs=0.06))


def test_augmentation_is_decided_by_the_generator():
    images = torch.rand(20, 3, 8, 8)
    first, second, third = (augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_by_default_the_first_batch_decides_whether_images_are_augmented(shift):
    def run(augment):
        made = adapter(warmup_augment=augment, warmup_epochs=1)
        source = Source()
        source.x -= shift
        made.prepare_with(source)
        return made.meta_state()

    plain, undecided = run(False), run(None)
    assert equal(plain, undecided) == (shift > 0)
    assert shift > 0 or equal(run(True), undecided)


def test_images_that_were_normalised_cannot_be_jittered():
    with pytest.raises(ContlearnError, match=r"values in 0\.\.1, got -1\.\.1; .*warmup_augment: false"):
        augment(torch.linspace(-1, 1, 48).view(1, 3, 4, 4), torch.Generator())
