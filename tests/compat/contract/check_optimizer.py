"""`PopRiskAdamW` alone: learns, is AdamW with the gate off, and continues from a state dict."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW

PATHS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    return x, x[:, :1] + 0.1 * torch.randn(256, 1, generator=generator)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    x, y = _data()
    loss = torch.zeros(())
    for step in steps:
        rows = torch.arange(32) + 32 * (step % 8)
        optimizer.zero_grad()
        loss = (model(x[rows]) - y[rows]).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("gate", ["soft", "hard", "snr", "none"])
def test_learns(gate: str) -> None:
    model = _model()
    first = _train(model, torch.optim.SGD(model.parameters(), lr=0.0), range(1))
    last = _train(model, PopRiskAdamW(model.parameters(), lr=1e-2, gate=gate), range(200))
    assert last < 0.2 * first


@pytest.mark.parametrize("path", ["single", "foreach"])
def test_gate_off_is_adamw(path: str) -> None:
    one, other = _model(), _model()
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, **PATHS[path]}
    _train(one, PopRiskAdamW(one.parameters(), gate="none", **options), range(100))
    _train(other, torch.optim.AdamW(other.parameters(), **options), range(100))
    assert all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("path", ["single", "foreach"])
def test_state_dict_round_trip(path: str) -> None:
    whole = _model()
    optimizer = PopRiskAdamW(whole.parameters(), lr=1e-2, **PATHS[path])
    _train(whole, optimizer, range(20))
    resumed = copy.deepcopy(whole)
    again = PopRiskAdamW(resumed.parameters(), lr=1e-3, **PATHS[path])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(whole, optimizer, range(20, 40))
    _train(resumed, again, range(20, 40))
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_paths_agree() -> None:
    weights = []
    for options in PATHS.values():
        model = _model()
        _train(model, PopRiskAdamW(model.parameters(), lr=1e-2, **options), range(20))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-4, atol=1e-6)


def test_adamw_checkpoints_go_in_and_out() -> None:
    model = _model()
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2)
    _train(model, theirs, range(5))
    ours = PopRiskAdamW(model.parameters(), lr=1e-2)
    ours.load_state_dict(theirs.state_dict())
    _train(model, ours, range(5, 10))
    theirs.load_state_dict(ours.state_dict())
    assert _train(model, theirs, range(10, 15)) < 10
