"""PopRiskAdamW over Adam's groups, and schedulers that follow."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import lr_scheduler as lrs

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning.callbacks.optimizer import poprisk_adamw_from, rebind_scheduler


def two_groups():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return [
        {"params": list(model[0].parameters()), "lr": 0.1, "betas": (0.8, 0.99), "name": "first"},
        {"params": list(model[1].parameters()), "gate": "none", "weight_decay": 0.0},
    ]


def test_settings_carry_over_group_by_group():
    adam = torch.optim.AdamW(two_groups(), lr=0.02, eps=1e-6, weight_decay=0.3, maximize=True)
    ours = poprisk_adamw_from(adam, {"gate": "hard", "rho": 0.9})
    first, second = ours.param_groups
    assert (first["lr"], first["betas"], first["name"]) == (0.1, (0.8, 0.99), "first")
    assert (second["lr"], second["betas"], second["weight_decay"]) == (0.02, (0.9, 0.999), 0.0)
    for group, theirs in zip(ours.param_groups, adam.param_groups, strict=True):
        assert all(p is q for p, q in zip(group["params"], theirs["params"], strict=True))
        assert (group["eps"], group["maximize"], group["rho"]) == (1e-6, True, 0.9)
        assert not {"amsgrad", "differentiable"} & group.keys()
    assert (first["gate"], second["gate"]) == ("hard", "none")  # the group's own option wins
    assert first["weight_decay"] == 0.3


def test_the_adam_is_left_as_it_is():
    adam = torch.optim.AdamW(two_groups(), lr=0.02)
    before = copy.deepcopy(adam.state_dict())
    poprisk_adamw_from(adam, {})
    assert adam.state_dict() == before


def test_groups_added_later_get_adams_defaults():
    adam = torch.optim.AdamW(two_groups(), lr=0.02, weight_decay=0.3)
    ours = poprisk_adamw_from(adam, {"gate": "hard"})
    ours.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    added = ours.param_groups[-1]
    assert (added["lr"], added["weight_decay"], added["gate"]) == (0.02, 0.3, "hard")


def test_how_adam_computes_its_step_does_not_carry_over():
    """`foreach` would turn our fused paths off, and refuse `fused=True`."""
    parameter = nn.Parameter(torch.zeros(2))
    adam = torch.optim.AdamW([{"params": [parameter], "foreach": True}], foreach=True)
    assert poprisk_adamw_from(adam, {}).param_groups[0]["foreach"] is None
    assert poprisk_adamw_from(adam, {"fused": True}).param_groups[0]["fused"] is True
    assert poprisk_adamw_from(adam, {"foreach": True}).path == "foreach"


def test_named_parameters_and_tensor_rates_carry_over():
    model = nn.Linear(2, 2)
    adam = torch.optim.AdamW(model.named_parameters(), lr=torch.tensor(0.25))
    ours = poprisk_adamw_from(adam, {})
    assert ours.param_groups[0]["param_names"] == ["weight", "bias"]
    assert float(ours.param_groups[0]["lr"]) == 0.25


def _with_state(params):
    optimizer = torch.optim.AdamW(params)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    return optimizer


def _with_hook(params):
    optimizer = torch.optim.AdamW(params)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "cannot replace SGD: only torch.optim.Adam"),
        (torch.optim.NAdam, "cannot replace NAdam"),
        (PopRiskAdamW, "cannot replace PopRiskAdamW"),
        (lambda p: type("MyAdamW", (torch.optim.AdamW,), {})(p), "cannot replace MyAdamW"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "coupled"),
        (lambda p: torch.optim.Adam([{"params": p, "weight_decay": 0.1}]), "coupled"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "no amsgrad"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "not differentiable"),
        (_with_state, "has state already"),
        (_with_hook, "hooks are registered"),
    ],
)
def test_what_would_be_lost_is_refused(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        poprisk_adamw_from(make([nn.Parameter(torch.zeros(2))]), {})


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=True, capturable=True),
    ],
)
def test_what_carries_over_is_accepted(make):
    assert isinstance(poprisk_adamw_from(make([nn.Parameter(torch.zeros(2))]), {}), PopRiskAdamW)


def test_adam_with_decoupled_decay_is_accepted():
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(2))], weight_decay=0.1)
    if "decoupled_weight_decay" not in adam.defaults:
        pytest.skip("this torch has no Adam(decoupled_weight_decay=...)")
    adam = torch.optim.Adam(adam.param_groups, weight_decay=0.1, decoupled_weight_decay=True)
    adam.param_groups[0]["decoupled_weight_decay"] = True
    assert poprisk_adamw_from(adam, {}).param_groups[0]["weight_decay"] == 0.1


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.3, total_steps=8),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=4),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 2), lrs.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.9)]
    ),
    "nested": lambda o: lrs.SequentialLR(
        o,
        [
            lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 2), lrs.ExponentialLR(o, 0.9)]),
            lrs.ExponentialLR(o, 0.5),
        ],
        [3],
    ),
}


def rates(optimizer, scheduler, steps=7):
    seen = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        optimizer.step()
        if isinstance(scheduler, lrs.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
        seen.append([(float(g["lr"]), g["betas"]) for g in optimizer.param_groups])
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_set_the_same_rates(name, tensor_lr):
    def make(factory):
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        optimizer = torch.optim.AdamW(two_groups(), lr=lr, foreach=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's nested schedulers step each other
            return optimizer, factory(optimizer)

    adam, scheduler = make(SCHEDULERS[name])
    expected = rates(adam, scheduler)
    old, scheduler = make(SCHEDULERS[name])
    new = poprisk_adamw_from(old, {})
    rebind_scheduler(scheduler, old, new)
    assert [float(g["lr"]) for g in new.param_groups] == [float(g["lr"]) for g in old.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "optimizer.step() has been overridden", above all
        found = rates(new, scheduler)
    assert found == expected
    assert len({str(row) for row in found}) > 1
    # And the state that a checkpoint holds is theirs.
    assert scheduler.state_dict().keys() == make(SCHEDULERS[name])[1].state_dict().keys()


def test_other_schedulers_with_an_optimizer_are_rebound():
    class Warmup:
        def __init__(self, optimizer, after):
            self.optimizer = optimizer
            self.after_scheduler = after

    old = torch.optim.AdamW(two_groups(), lr=0.1)
    inner = lrs.ExponentialLR(old, 0.5)
    outer = Warmup(old, {"then": [inner]})
    new = poprisk_adamw_from(old, {})
    rebind_scheduler(outer, old, new)
    assert outer.optimizer is new
    assert inner.optimizer is new


def test_a_scheduler_that_hides_its_optimizer_is_refused():
    class Hides:
        def __init__(self, optimizer):
            self._target = optimizer

    old = torch.optim.AdamW(two_groups(), lr=0.1)
    with pytest.raises(MisconfigurationException, match="cannot re-bind Hides"):
        rebind_scheduler(Hides(old), old, poprisk_adamw_from(old, {}))
