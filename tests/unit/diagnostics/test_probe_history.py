"""What a probe keeps of each step, and that it leaves no trace."""

import pytest
import torch
from torch import nn

from poprisk_integrations.diagnostics.probe import GradientHistory
from poprisk_integrations.diagnostics.probe.history import budget_counts
from poprisk_integrations.diagnostics.window_layout import sample_coordinates


def parameters(*shapes, dtype=torch.float32):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def test_small_tensors_are_kept_whole():
    params = parameters((3, 2), (4,))
    history = GradientHistory(params, steps=3)
    for step in range(2):
        for param in params:
            param.grad = torch.arange(param.numel()).view(param.shape) + 10.0 * step
        history.record()
    expected = torch.cat([torch.arange(6.0), torch.arange(4.0)])
    assert torch.equal(history.values, torch.stack([expected, expected + 10]))
    assert history.norms[1] == pytest.approx(float((expected + 10).norm()), rel=1e-6)


def test_large_tensors_are_sampled_at_fixed_coordinates_and_nothing_is_changed():
    params = parameters((1000, 1500), (1500,), (7,))
    values = params[0].grad = torch.randn(1000, 1500)
    before, state = values.clone(), torch.get_rng_state()
    history = GradientHistory(params, steps=8)
    for _ in range(2):
        history.record(scale=0.5)
    assert sum(history.counts) <= 2**19
    assert history.counts[1:] == [1500, 7]
    index = sample_coordinates(1_500_000, history.counts[0], 0)
    for row in history.values:
        assert torch.equal(row[: history.counts[0]], values.reshape(-1)[index.long()] * 0.5)
        assert not row[history.counts[0] :].any()
    assert history.norms[0] == pytest.approx(0.5 * float(values.norm()), rel=1e-5)
    assert torch.equal(values, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_counts_respect_the_budget_and_forget_no_tensor():
    numels = [10**9, 5 * 10**6, *[4096] * 300, 1]
    counts = budget_counts(numels, 2**19)
    assert sum(counts) <= 2**19
    assert all(0 < c <= n for c, n in zip(counts, numels, strict=True))
    assert counts[0] > 20 * counts[1]
    assert budget_counts([2, 3], 1) == [1, 1]
    long = GradientHistory(parameters((2000, 2000)), steps=500)
    assert 500 * sum(long.counts) <= 2**25


def test_steps_without_a_usable_gradient_are_not_kept():
    dense, embedding = nn.Parameter(torch.zeros(2)), nn.Embedding(5, 2, sparse=True)
    history = GradientHistory([dense, embedding.weight], steps=4)
    history.record()
    embedding(torch.tensor([1])).sum().backward()
    for grad in (None, torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.0])):
        dense.grad = grad
        history.record()
    assert (len(history), history.nonfinite) == (1, 1)
    assert history.present == [True, False]
    assert history.sparse == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_dtypes(dtype):
    (param,) = parameters((3,), dtype=dtype)
    history = GradientHistory([param], steps=1)
    param.grad = torch.tensor([1, 2, -2], dtype=dtype)
    history.record()
    parts = [1, 0, 2, 0, -2, 0] if dtype.is_complex else [1, 2, -2]
    assert history.values.tolist() == [parts]
    assert history.norms == [pytest.approx(3.0)]
