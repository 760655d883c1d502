"""One small problem for all optimizer tests: fixed gradients, shapes that break careless code."""

import copy

import torch

from poprisk_integrations import PopRiskAdamW

# matrix, vector, 0-dim, empty, channels-last-like
SHAPES = ((5, 7), (3,), (), (0, 4), (2, 3, 4, 5))


def make_params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in SHAPES
    ]


def gradients(steps, dtype=torch.float32, seed=1, signal=0.3, scale=1.0):
    """A list over steps of lists over parameters; None where a parameter sits a step out."""
    generator = torch.Generator().manual_seed(seed)
    history = []
    for t in range(steps):
        row = [
            (scale * (torch.randn(s, generator=generator, dtype=torch.float64) + signal)).to(dtype)
            for s in SHAPES
        ]
        if t % 3 == 0:
            row[1] = None
        history.append(row)
    return history


def train(make_optimizer, steps=100, dtype=torch.float32, history=None, params=None):
    """Run the optimizer over the gradient history; returns (params, optimizer)."""
    params = make_params(dtype) if params is None else params
    optimizer = make_optimizer(params)
    for row in gradients(steps, dtype) if history is None else history:
        feed(params, row)
        optimizer.step()
    return params, optimizer


def temporal(params, **options):
    """With the paper's third state, whose tensors include the default's."""
    return PopRiskAdamW(params, **{"noise_source": "temporal", **options})


def feed(params, row):
    for param, grad in zip(params, row, strict=True):
        param.grad = None if grad is None else grad.clone()


def max_ulp(actual, expected):
    """Largest distance in units of the last place of `expected`."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if e.numel():
            ulp = torch.finfo(e.dtype).eps * e.detach().abs().clamp(min=torch.finfo(e.dtype).tiny)
            worst = max(worst, float(((a - e).detach().abs() / ulp).max()))
    return worst


def snapshot(optimizer):
    """All that a refused call must leave alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))


def unchanged(optimizer, before):
    """Whether the optimizer is still as in `snapshot`, bit for bit."""
    now = snapshot(optimizer)
    return _equal(now, before)


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
