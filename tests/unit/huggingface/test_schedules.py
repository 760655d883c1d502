"""A cut rate is `factor` times the uncut one ever after, under all of Trainer's schedules."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from transformers import SchedulerType, get_scheduler

from poprisk_integrations.diagnostics.learning_rate_scaling import scale_learning_rates

STEPS, CUT = 40, 13
OPTIONS = {
    "cosine_with_min_lr": {"min_lr": 0.01},
    "cosine_warmup_with_min_lr": {"min_lr": 0.01},
    "warmup_stable_decay": {"num_decay_steps": 10},
    "polynomial": {"lr_end": 0.01},
    "reduce_lr_on_plateau": {"patience": 3},
}


def _learning_rates(name, cut_at):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = torch.optim.SGD(groups, lr=0.2, momentum=0.9)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=5,
        num_training_steps=STEPS,
        scheduler_specific_kwargs=OPTIONS.get(name, {}),
    )
    wants_metric = name in ("reduce_lr_on_plateau", "greedy")
    seen = []
    for step in range(STEPS):
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step(*[1.0] * wants_metric)
        if step + 1 == cut_at:
            wrapped = scheduler if wants_metric else AcceleratedScheduler(scheduler, [optimizer])
            scale_learning_rates([optimizer], [wrapped], 0.3)
    return torch.tensor(seen, dtype=torch.float64)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_the_schedule_keeps_the_cut(name):
    Accelerator(cpu=True)
    whole, cut = (_learning_rates(name, at) for at in (None, CUT))
    expected = whole.clone()
    expected[CUT:] *= 0.3
    torch.testing.assert_close(cut, expected)
