"""F and its error from the sampled coordinates against all of them, in real training."""

import pytest
import torch
from torch import nn

from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.diagnostics.window_layout import LARGEST_WHOLE

WINDOW = 8

pytestmark = pytest.mark.slow


def classifier():
    """784-512-512-10 on noisy labels of a hidden linear rule, with inputs of decaying variance."""
    model = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    x = torch.randn(640, 784) * torch.arange(1, 785) ** -0.3
    y = (x @ torch.randn(784, 10)).argmax(1)
    flipped = torch.rand(640) < 0.3
    y[flipped] = torch.randint(0, 10, (int(flipped.sum()),))

    def loss(rows):
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    return model, loss


def language_model():
    """An embedding of 2048 x 64, tied to nothing, on tokens of Zipf frequency."""
    model = nn.Sequential(nn.Embedding(2048, 64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2048))
    frequency = 1.0 / torch.arange(1, 2049)
    tokens = torch.multinomial(frequency, 640 * 17, replacement=True).view(640, 17)

    def loss(rows):
        logits = model(tokens[rows, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[rows, 1:].flatten())

    return model, loss


@pytest.mark.parametrize("problem", [classifier, language_model])
def test_sample_is_within_five_percent_in_95_percent_of_the_windows(problem):
    model, loss = problem()
    params = list(model.parameters())
    assert sum(p.numel() > LARGEST_WHOLE for p in params) >= 2
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    windows = [GradientWindow(WINDOW, accumulator=kind) for kind in ("exact", "sample")]
    results = []
    for step in range(20 * WINDOW):
        if step % 20 == 0:
            order = torch.randperm(640)
        loss(order[step % 20 * 32 :][:32]).backward()
        for window in windows:
            window.add(params)
        optimizer.step()
        optimizer.zero_grad()
        if windows[0].is_full:
            results.append([window.close() for window in windows])
    ratios = torch.tensor([[r.ratio for r in pair] for pair in results])
    errors = torch.tensor([[r.ratio_se for r in pair] for pair in results])
    off = (ratios[:, 1] / ratios[:, 0] - 1).abs()
    assert (off < 0.05).float().mean() >= 0.95
    # The standard error is the spread of few norms: a smaller sample shows in it first.
    of_error = (errors[:, 1] / errors[:, 0]).log2()
    assert of_error.median().abs() < 0.25
    assert (of_error.abs() < 1).all()
    # Both windows read the risk decrease from the same sample.
    assert all(a.risk_decrease == b.risk_decrease for a, b in results)
