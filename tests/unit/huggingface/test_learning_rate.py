"""A cut learning rate is `factor` times the uncut one ever after, whatever the scheduler."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from torch.optim import lr_scheduler as schedulers
from transformers import get_scheduler

from poprisk_integrations.huggingface.callbacks.learning_rate import (
    check_scheduler,
    scale_learning_rates,
)

STEPS, CUT = 40, 13
FACTORS = (0.3, 1.0)  # the second group is at its lowest


def _named(name, **options):
    return lambda o: get_scheduler(
        name, o, num_warmup_steps=5, num_training_steps=STEPS, scheduler_specific_kwargs=options
    )


SCHEDULERS = {
    "none": lambda o: None,
    "linear": _named("linear"),
    "cosine": _named("cosine"),
    "constant_with_warmup": _named("constant_with_warmup"),
    "warmup_stable_decay": _named("warmup_stable_decay", num_decay_steps=10),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "StepLR": lambda o: schedulers.StepLR(o, 10),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.1, 0.2], total_steps=STEPS + 1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], 6, cycle_momentum=False),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 5), schedulers.ExponentialLR(o, 0.9)], [20]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=3),
}


def _learning_rates(make, cut_at):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = make(optimizer)
    seen = []
    for step in range(STEPS):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
        if step + 1 == cut_at:
            check_scheduler(scheduler)
            scale_learning_rates(optimizer, scheduler, FACTORS)
    return torch.tensor(seen, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # torch's own SequentialLR
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_keeps_the_cut(name):
    whole, cut = (_learning_rates(SCHEDULERS[name], at) for at in (None, CUT))
    expected = whole.clone()
    expected[CUT:] *= torch.tensor(FACTORS, dtype=torch.float64)
    torch.testing.assert_close(cut, expected)
    assert cut[CUT, 0] != whole[CUT, 0]


def test_through_accelerates_wrapper_and_a_tensor_learning_rate():
    Accelerator(cpu=True)
    lr = torch.tensor(0.1)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(()))], lr=lr, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 1.0)
    scale_learning_rates(optimizer, AcceleratedScheduler(scheduler, [optimizer]), [0.5])
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == pytest.approx(0.05)
    assert float(scheduler.base_lrs[0]) == pytest.approx(0.05)


def test_a_scheduler_that_would_overwrite_it_is_refused():
    class WarmupLR:
        """Like DeepSpeed's: sets the groups from lists of its own."""

    with pytest.raises(ValueError, match="PopRiskLRCut cannot work with WarmupLR"):
        check_scheduler(WarmupLR())
