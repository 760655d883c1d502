"""A copy of weights comes back whole, and into the same tensors."""

import torch
from torch import nn

from poprisk_integrations.diagnostics.cooldown import KeptWeights


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_last_copy_comes_back():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    kept, states, places = KeptWeights(net), [], [p.data_ptr() for p in net.parameters()]
    assert kept.is_empty
    for step in range(4):
        net(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        states.append({name: t.clone() for name, t in net.state_dict().items()})
        if step in (0, 2):
            kept.keep()
    kept.load()
    assert all(torch.equal(t, states[2][name]) for name, t in net.state_dict().items())
    assert [p.data_ptr() for p in net.parameters()] == places
    assert not any(torch.equal(states[0][n], states[2][n]) for n in ("0.weight", "1.running_mean"))


def test_frozen_weights_are_left_out_and_the_rest_outlives_a_checkpoint():
    one, other = model(), model()
    one[0].requires_grad_(False)
    kept, again = KeptWeights(one), KeptWeights(other)
    kept.keep()
    state = kept.state_dict()
    assert "0.weight" not in state
    assert {"2.weight", "1.running_mean"} <= state.keys()
    again.load_state_dict(state)
    nn.init.zeros_(other[2].weight)
    assert again.load()
    assert torch.equal(other[2].weight, one[2].weight)
