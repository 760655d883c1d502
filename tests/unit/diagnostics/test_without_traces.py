"""A forward pass in training mode that nobody can tell from none."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from poprisk_integrations.diagnostics.without_traces import WithoutTraces


class _Restless(nn.Module):
    """Counts, replaces a buffer, keeps a large table that only its first use leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("codes", torch.zeros(1 << 15))
        self.register_buffer("table", torch.ones(1 << 15))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.codes += 1
        self.mean = 0.9 * self.mean + x.mean(0)
        random.random()
        np.random.rand()  # what models draw from
        return self.drop(self.norm(x))


def _state(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


def test_buffers_and_random_numbers_come_back() -> None:
    model, x = _Restless().train(), torch.randn(8, 3)
    model(x)
    quiet = WithoutTraces(model)
    for _ in range(3):
        mean, before = model.mean, _state(model)
        numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        with quiet():
            first = model(x)
        with quiet():
            second = model(x)
        assert all(torch.equal(a, b) for a, b in zip(before, _state(model), strict=True))
        assert model.mean is mean
        assert torch.equal(numbers[0], torch.get_rng_state())
        assert numbers[1] == random.getstate()
        assert np.array_equal(numbers[2], np.random.get_state()[1])
        assert not first.requires_grad
        assert torch.equal(first, second)
        assert (first == 0).any()  # dropout
        assert model.training
        model(x)  # the others may change


def test_an_error_puts_everything_back() -> None:
    model, before = _Restless().train(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size of tensor"), WithoutTraces(model)():
        model(torch.randn(8, 4))
    assert model.count == 0
    assert torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())


def test_metrics_do_not_notice() -> None:
    model = nn.ModuleDict(
        {"all": MetricCollection([MulticlassAccuracy(3), MeanMetric()]), "list": _Listing()}
    )
    own, other = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 0])
    twin = {"accuracy": MulticlassAccuracy(3)}
    model["all"]["MulticlassAccuracy"](own, own)
    twin["accuracy"](own, own)
    quiet = WithoutTraces(model)
    with quiet():
        model["all"]["MulticlassAccuracy"](other, own)
        model["list"].update(own)
    assert model["all"]["MulticlassAccuracy"].update_count == 1
    assert model["all"]["MulticlassAccuracy"].compute() == twin["accuracy"].compute()
    assert model["list"].seen == []


class _Listing(MeanMetric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, value: Tensor) -> None:
        self.seen.append(value)


def test_only_random_numbers() -> None:
    model, before = _Restless().train(), torch.get_rng_state()
    with WithoutTraces(model).randomness():
        model(torch.randn(8, 3))
    assert torch.equal(before, torch.get_rng_state())
    assert model.count == 1
