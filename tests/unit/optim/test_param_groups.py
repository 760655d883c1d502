import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import param_groups


def model():
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(4, 3),
            "layernorm": nn.LayerNorm(3),
            "router": nn.Linear(3, 2),
            "head": nn.Linear(3, 4),
        }
    )


def names(groups, net):
    by_id = {id(p): n for n, p in net.named_parameters()}
    return {
        (g["weight_decay"], g.get("gate")): sorted(by_id[id(p)] for p in g["params"])
        for g in groups
    }


def test_four_groups():
    net = model()
    groups = param_groups(net, no_gate=("embed", "router"), weight_decay=0.1)
    assert names(groups, net) == {
        (0.1, None): ["head.weight"],
        (0.1, "none"): ["embed.weight", "router.weight"],
        (0.0, None): ["head.bias", "layernorm.bias", "layernorm.weight"],
        (0.0, "none"): ["router.bias"],
    }


def test_no_decay_by_name_and_optimizer_accepts_the_groups():
    net = model()
    groups = param_groups(net, no_decay=("head",), no_gate="router")
    assert names(groups, net)[(0.0, None)] == ["head.bias", "head.weight"]
    optimizer = PopRiskAdamW(groups, lr=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 7
    assert {g["gate"] for g in optimizer.param_groups} == {"soft", "none"}


class Bert(nn.Module):
    """Names as in transformers' BERT."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {"word_embeddings": nn.Embedding(4, 3), "LayerNorm": nn.LayerNorm(3)}
        )
        self.pooler = nn.Linear(3, 3)


@pytest.mark.parametrize("pattern", ["norm", "layernorm", "LayerNorm", "LAYERNORM"])
def test_upper_and_lower_case_are_the_same(pattern):
    net = Bert()
    for argument, expected in (("no_gate", {"gate": "none"}), ("no_decay", {"weight_decay": 0.0})):
        chosen = [
            group
            for group in param_groups(net, **{argument: (pattern,)})
            if expected.items() <= group.items()
        ]
        ids = {id(p) for group in chosen for p in group["params"]}
        norm = net.embeddings["LayerNorm"]
        assert {id(norm.weight), id(norm.bias)} <= ids
        assert id(net.pooler.weight) not in ids


def test_a_refusal_names_the_parts_that_there_are():
    """GPT-2 calls its norms `ln_1`."""
    net = nn.ModuleDict({"wte": nn.Embedding(4, 3), "h": nn.ModuleList([nn.LayerNorm(3)])})
    with pytest.raises(ValueError, match="their parts are wte, weight, h, bias"):
        param_groups(net, no_gate=("norm",))


def test_frozen_and_tied_parameters():
    net = model()
    net["embed"].weight.requires_grad_(False)
    net["head2"] = net["head"]
    assert sum(len(g["params"]) for g in param_groups(net)) == 6


@pytest.mark.parametrize("argument", ["no_gate", "no_decay"])
def test_pattern_that_matches_nothing_raises(argument):
    with pytest.raises(ValueError, match=f"Invalid {argument}: 'gates' matches no parameter name"):
        param_groups(model(), **{argument: ("head", "gates")})


def test_nothing_to_train_raises():
    net = model().requires_grad_(False)
    with pytest.raises(ValueError, match="Invalid model"):
        param_groups(net)
    assert torch.is_tensor(net["head"].weight)
