"""Twenty steps of every kind, as earlier releases took them: numbers that no rewrite may move.

`python -m tests.unit.optim.test_goldens` writes the files anew, on a release whose numbers are to
be kept.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.optim_problem import temporal
from tests.unit.optim.paths import EAGER, EVERY, FLAGS, HOST, launches

DIRECTORY = Path(__file__).parents[2] / "goldens" / "optim"
TRAJECTORIES = DIRECTORY / "trajectories.safetensors"
STATES, GROUPS = DIRECTORY / "states.safetensors", DIRECTORY / "groups.json"
SHAPES = ((5, 7), (3,), (), (0, 4), (2, 3, 4, 5), (57, 72))
SNAPSHOTS = (3, 20)
SAMPLE = 16  # values of a tensor, at regular distances

OPTIONS = {
    "soft": {},
    "hard": {"gate": "hard"},
    "snr": {"gate": "snr", "lambda_pop": 2.0},
    "none": {"gate": "none"},
    "paper": {"alpha": 1.0, "lambda_pop": 0.0, "gate_eps": 1e-12, "noise_mean": "raw"},
    "blended": {"gate_blend": 0.7, "gate_warmup": 3},
    "gated decay": {"gate_decay": True, "weight_decay": 0.3},
    "norm": {"preserve_norm": True},
    "maximized": {"maximize": True},
    "fresh": {"alpha": "fresh"},
    "finite": {"alpha": "finite", "batch_size": 32, "dataset_size": 160},
    "betas": {"betas": (0.5, 0.9), "eps": 1e-3, "rho": 0.9},
    "microbatch": {"noise_source": "microbatch"},
    "moments": {"noise_source": "moments"},
    "moments, snr": {"noise_source": "moments", "gate": "snr", "gate_blend": 0.7},
}
FORMATS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "states bfloat16": {"state_dtype": "bfloat16"},
    "states 8bit": {"state_dtype": "8bit", "rounding_seed": 5},
    "all bfloat16": {"dtype": torch.bfloat16, "state_dtype": "bfloat16"},
    "moments, all bfloat16": {
        "dtype": torch.bfloat16,
        "state_dtype": "bfloat16",
        "noise_source": "moments",
    },
    "bfloat16, 8bit": {"dtype": torch.bfloat16, "state_dtype": "8bit"},
}
KINDS = {**OPTIONS, **FORMATS}
SAVED = ("soft", "states bfloat16", "states 8bit", "all bfloat16")


def make(dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    return params, temporal(params, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def advance(params, optimizer, steps):
    """Steps of two backward passes each; the vector sits every third step out."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        optimizer.zero_grad()
        for _ in range(2):
            loss = torch.zeros(())
            for index, param in enumerate(params):
                grad = torch.randn(param.shape, generator=generator) + 0.2
                if index != 1 or step % 3:
                    loss = loss + (param * grad.to(param.dtype)).sum().float() / 2
            loss.backward()
        optimizer.step()


def sampled(params, optimizer):
    """Some values of all parameters and states, as one vector."""
    found = []
    for param in params:
        state = optimizer.state[param]
        for value in (param.detach(), *(state[key] for key in sorted(state))):
            flat = value.float().reshape(-1)
            found.append(flat[:: max(1, flat.numel() // SAMPLE) | 1])
    return torch.cat(found)


def trajectory(options):
    params, optimizer = make(**options)
    snapshots, step = [], 0
    for end in SNAPSHOTS:
        advance(params, optimizer, range(step, end))
        snapshots.append(sampled(params, optimizer))
        step = end
    return torch.cat(snapshots), optimizer


def as_saved(optimizer, name):
    saved = optimizer.state_dict()
    return {
        f"{name}|{index}|{key}": value.clone()
        for index, state in saved["state"].items()
        for key, value in state.items()
    }, saved["param_groups"]


def assert_close(actual, expected, share=0.0):
    """Within 2 ulp of values of about one; up to a share may lie on the next level of a format."""
    off = (actual - expected).abs() > 2 * 2**-23 * expected.abs().clamp(min=1.0)
    assert float(off.float().mean()) <= share, (actual[off], expected[off])
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-3 if share else 2**-22)


CELLS = [(impl, kind) for impl in EVERY[:4] for kind in KINDS]
# the interpreter is slow
CELLS += [("fused_triton", kind) for kind in ("paper", "all bfloat16")]


@pytest.mark.parametrize(("impl", "kind"), CELLS)
def test_trajectory(impl, kind):
    expected = load_file(TRAJECTORIES)
    actual, optimizer = trajectory({**FLAGS[impl], **KINDS[kind]})
    if kind != "norm" or impl in EAGER:  # no fused path knows the norm of a tensor
        assert optimizer.path == impl
        assert bool(launches) == (impl == "fused_triton")
    assert_close(actual, expected[f"{impl if impl in HOST else 'single_tensor'}/{kind}"])


@pytest.mark.parametrize("kind", SAVED)
def test_an_old_state_continues(kind):
    """Saved after 10 steps by the old code, it takes the other 10."""
    options = {**FLAGS["single_tensor"], **KINDS[kind]}
    params, optimizer = make(**options)
    advance(params, optimizer, range(10))
    state = {}
    for name, value in load_file(STATES).items():
        of_kind, index, key = name.split("|")
        if of_kind == kind:
            state.setdefault(int(index), {})[key] = value
    groups = json.loads(GROUPS.read_text())[kind]
    clones = [p.detach().clone().requires_grad_() for p in params]
    fresh = temporal(clones, lr=1.0, state_dtype=KINDS[kind].get("state_dtype"))
    fresh.load_state_dict({"state": state, "param_groups": groups})
    advance(clones, fresh, range(10, 20))
    actual, expected = sampled(clones, fresh), load_file(TRAJECTORIES)[f"single_tensor/{kind}"]
    assert_close(actual, expected[-len(actual) :])


def write():
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    cells = [(impl, kind) for impl in HOST for kind in KINDS]
    save_file({f"{i}/{k}": trajectory({**FLAGS[i], **KINDS[k]})[0] for i, k in cells}, TRAJECTORIES)
    states, groups = {}, {}
    for kind in SAVED:
        params, optimizer = make(**FLAGS["single_tensor"], **KINDS[kind])
        advance(params, optimizer, range(10))
        tensors, groups[kind] = as_saved(optimizer, kind)
        states |= tensors
    save_file(states, STATES)
    GROUPS.write_text(json.dumps(groups, indent=1) + "\n")


if __name__ == "__main__":
    write()
