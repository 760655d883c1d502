"""After a cut, every scheduler of torch gives `factor` times what it would have given."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.swa_utils import SWALR

from poprisk_integrations.diagnostics.learning_rate_scaling import (
    cut_factor,
    largest_lr,
    scale_learning_rates,
)

FACTOR, CUT_AT, STEPS = 0.3, 7, 40


class Triangle(torch_schedulers.LRScheduler):
    """A user's own, with rates in attributes as public warm-up schedulers keep them."""

    def __init__(self, optimizer, warmup_start_lr, peak_lr, end_lr, warmup_steps=10):
        self.warmup_start_lr, self.peak_lr, self.end_lr = warmup_start_lr, peak_lr, end_lr
        self.warmup_steps = warmup_steps
        super().__init__(optimizer)

    def get_lr(self):
        share = abs(self.last_epoch / self.warmup_steps - 1)
        far = self.warmup_start_lr if self.last_epoch < self.warmup_steps else self.end_lr
        return [min(share, 1) * far + max(1 - share, 0) * self.peak_lr for _ in self.base_lrs]


SCHEDULERS = {
    "LambdaLR": lambda o: torch_schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: torch_schedulers.MultiplicativeLR(o, lambda step: 0.95),
    "SWALR": lambda o: SWALR(o, swa_lr=[0.5, 0.05], anneal_epochs=12),
    "a user's own": lambda o: Triangle(o, 1e-3, 0.2, 1e-2),
    "StepLR": lambda o: torch_schedulers.StepLR(o, 5, gamma=0.5),
    "MultiStepLR": lambda o: torch_schedulers.MultiStepLR(o, [3, 20], gamma=0.1),
    "ExponentialLR": lambda o: torch_schedulers.ExponentialLR(o, 0.9),
    "LinearLR": lambda o: torch_schedulers.LinearLR(o, 0.1, 1.0, total_iters=20),
    "ConstantLR": lambda o: torch_schedulers.ConstantLR(o, 0.5, total_iters=20),
    "PolynomialLR": lambda o: torch_schedulers.PolynomialLR(o, total_iters=30),
    "CosineAnnealingLR": lambda o: torch_schedulers.CosineAnnealingLR(o, 30, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: torch_schedulers.CosineAnnealingWarmRestarts(
        o, 10, eta_min=1e-3
    ),
    "OneCycleLR": lambda o: torch_schedulers.OneCycleLR(o, [0.1, 1.0], total_steps=STEPS + 1),
    "CyclicLR": lambda o: torch_schedulers.CyclicLR(o, 1e-3, 0.1, step_size_up=6),
    "ReduceLROnPlateau": lambda o: torch_schedulers.ReduceLROnPlateau(o, patience=4),
    "SequentialLR": lambda o: torch_schedulers.SequentialLR(
        o,
        [torch_schedulers.LinearLR(o, 0.1), torch_schedulers.CosineAnnealingLR(o, 25)],
        milestones=[10],
    ),
    "ChainedScheduler": lambda o: torch_schedulers.ChainedScheduler(
        [torch_schedulers.ExponentialLR(o, 0.9), torch_schedulers.ConstantLR(o, 0.5)], optimizer=o
    ),
}
# torch's SequentialLR passes an epoch on, which torch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")


def make(name, as_tensor=False):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in (0.1, 1.0)]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    if as_tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    return optimizer, SCHEDULERS[name](optimizer)


def go_on(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        optimizer.step()
        is_plateau = isinstance(scheduler, torch_schedulers.ReduceLROnPlateau)
        scheduler.step(*[1.0] * is_plateau)
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    return torch.tensor(rates, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_from_the_cut(name):
    uncut = go_on(*make(name), STEPS)
    optimizer, scheduler = make(name)
    before = go_on(optimizer, scheduler, CUT_AT)
    scale_learning_rates([optimizer], [scheduler], FACTOR)
    now = torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
    torch.testing.assert_close(now, FACTOR * before[-1])
    after = go_on(optimizer, scheduler, STEPS - CUT_AT)

    assert torch.equal(before, uncut[:CUT_AT])
    torch.testing.assert_close(after, FACTOR * uncut[CUT_AT:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_resumed_scheduler_goes_on_from_the_cut(name):
    optimizer, scheduler = make(name)
    go_on(optimizer, scheduler, CUT_AT)
    scale_learning_rates([optimizer], [scheduler], FACTOR)
    second, resumed = make(name)
    second.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    steps = STEPS - CUT_AT
    assert torch.equal(go_on(second, resumed, steps), go_on(optimizer, scheduler, steps))


def test_a_floor_of_reduce_on_plateau_stays():
    optimizer, _ = make("StepLR")
    plateau = torch_schedulers.ReduceLROnPlateau(optimizer, patience=0, min_lr=0.02)
    scale_learning_rates([optimizer], [plateau], FACTOR)
    rates = go_on(optimizer, plateau, 20)
    assert rates.min() == 0.02


def test_rates_in_tensors_are_cut_in_place():
    optimizer, scheduler = make("LambdaLR", as_tensor=True)
    kept = optimizer.param_groups[1]["lr"]
    scale_learning_rates([optimizer], [scheduler], FACTOR)
    assert optimizer.param_groups[1]["lr"] is kept
    assert float(kept) == pytest.approx(FACTOR)
    assert largest_lr(optimizer) == pytest.approx(FACTOR)


def test_a_floor_limits_the_cut_of_the_largest_rate():
    sharded = SimpleNamespace(param_groups=[{"params": [], "lr": 0.1}, {"params": [], "lr": 1.0}])
    for optimizer in (make("ExponentialLR")[0], sharded):  # ZeRO-3 shows all groups empty
        assert largest_lr(optimizer) == 1.0
        assert cut_factor([optimizer], 0.3, 0.0) == 0.3
        assert cut_factor([optimizer], 0.3, 0.5) == 0.5
        assert cut_factor([optimizer], 0.3, 1.0) == cut_factor([optimizer], 0.3, 2.0) == 1.0
    scale_learning_rates([sharded], [None], 0.5)
    assert [group["lr"] for group in sharded.param_groups] == [0.05, 0.5]
