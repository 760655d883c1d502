"""Groups by name: which parameters decay, and which are gated."""

import pytest
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import param_groups


def model():
    """With names as in transformers, tied weights and frozen ones."""
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(4, 3),
            "LayerNorm": nn.LayerNorm(3),
            "router": nn.Linear(3, 2),
            "head": nn.Linear(3, 4),
            "frozen": nn.Linear(3, 4).requires_grad_(False),
        }
    )
    net["tied"] = net["head"]
    return net


NORM = {"LayerNorm.bias", "LayerNorm.weight"}
BIASES = {"head.bias", "router.bias"}
WEIGHTS = {"embed.weight", "head.weight", "router.weight"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {(0.01, None): WEIGHTS, (0.0, None): NORM | BIASES}),
        (
            {"no_gate": ("embed", "router"), "weight_decay": 0.1},
            {
                (0.1, None): {"head.weight"},
                (0.1, "none"): {"embed.weight", "router.weight"},
                (0.0, None): NORM | {"head.bias"},
                (0.0, "none"): {"router.bias"},
            },
        ),
        (
            {"no_decay": ("head",), "no_gate": "router"},
            {
                (0.01, None): NORM | {"embed.weight"},
                (0.01, "none"): {"router.bias", "router.weight"},
                (0.0, None): {"head.bias", "head.weight"},
            },
        ),
        # upper and lower case are the same
        *(
            (
                {"no_gate": (pattern,), "no_decay": (pattern,)},
                {(0.01, None): WEIGHTS | BIASES, (0.0, "none"): NORM},
            )
            for pattern in ("norm", "layernorm", "LAYERNORM")
        ),
    ],
    ids=lambda value: str(value) if "no_" in str(value) or not value else "",
)
def test_groups(options, expected):
    net = model()
    names = {id(p): n for n, p in net.named_parameters()}
    optimizer = PopRiskAdamW(param_groups(net, **options), lr=0.1)
    found = {
        (group["weight_decay"], group["gate"]): {names[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }
    assert found == {(decay, gate or "soft"): params for (decay, gate), params in expected.items()}


@pytest.mark.parametrize("argument", ["no_gate", "no_decay"])
def test_a_pattern_that_matches_nothing_is_told_what_there_is(argument):
    """GPT-2 calls its norms `ln_1`."""
    net = nn.ModuleDict({"wte": nn.Embedding(4, 3), "h": nn.ModuleList([nn.LayerNorm(3)])})
    message = f"Invalid {argument}: 'norm' matches .* their parts are wte, weight, h, bias"
    with pytest.raises(ValueError, match=message):
        param_groups(net, **{argument: ("wte", "norm")})


def test_nothing_to_train_raises():
    with pytest.raises(ValueError, match="Invalid model"):
        param_groups(model().requires_grad_(False))
