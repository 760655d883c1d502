"""Where a schedule peaks and how much of it is to come, against the rates that a run really has."""

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from transformers import get_scheduler

from poprisk_integrations.diagnostics.learning_rate_scaling import scale_learning_rates
from poprisk_integrations.diagnostics.schedule_outlook import ScheduleOutlook, SchedulePoint

TOTAL = 120


def sgd(*lrs_of_groups):
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in lrs_of_groups]
    return torch.optim.SGD(groups, momentum=0.9)


def named(name, **options):
    return lambda o: get_scheduler(name, o, num_training_steps=TOTAL, **options)


SCHEDULES = {
    "constant": lambda o: None,
    "linear": named("linear", num_warmup_steps=12),
    "cosine": named("cosine", num_warmup_steps=30),
    "constant with warm-up": named("constant_with_warmup", num_warmup_steps=9),
    "restarts": named("cosine_with_restarts", num_warmup_steps=10),
    "polynomial": named("polynomial", num_warmup_steps=0),
    "inverse root": named("inverse_sqrt", num_warmup_steps=7),
    "one cycle": lambda o: lrs.OneCycleLR(o, max_lr=0.4, total_steps=TOTAL),
    "step": lambda o: lrs.StepLR(o, 50, 0.1),
    "torch cosine": lambda o: lrs.CosineAnnealingLR(o, TOTAL),
    "sequence": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, 1.0, 20), lrs.CosineAnnealingLR(o, TOTAL - 20)], [20]
    ),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, step_size_up=15),
}


def run(optimizer, scheduler, steps):
    """Rates that the largest group has, step by step."""
    rates = []
    for _ in range(steps):
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:.*epoch parameter in:UserWarning")
@pytest.mark.parametrize("name", SCHEDULES)
def test_against_the_run_itself_which_notices_nothing(name):
    unwatched = sgd(0.1, 0.02)
    expected = run(unwatched, SCHEDULES[name](unwatched), TOTAL)
    optimizer = sgd(0.1, 0.02)
    scheduler = SCHEDULES[name](optimizer)
    outlook = ScheduleOutlook(optimizer, scheduler, total_steps=TOTAL)
    rates = run(optimizer, scheduler, TOTAL)
    assert rates == expected
    peak = next(t for t, rate in enumerate(rates) if rate >= 0.99 * max(rates))
    for step in range(TOTAL):
        found = outlook.at(step)
        assert found.rising is (step < peak)
        assert found.share_left == pytest.approx(sum(rates[step:]) / sum(rates))
        if rates[step] > 0:
            assert found.decay == pytest.approx(rates[-1] / rates[step])
    assert outlook.at(TOTAL).share_left == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_sees_the_same(name):
    optimizer = sgd(0.1)
    scheduler = SCHEDULES[name](optimizer)
    whole = ScheduleOutlook(optimizer, scheduler, total_steps=TOTAL)
    run(optimizer, scheduler, 40)
    resumed = ScheduleOutlook(optimizer, scheduler, total_steps=TOTAL, step=40)
    resumed.load_state_dict(whole.state_dict())
    assert all(resumed.at(t) == whole.at(t) for t in range(TOTAL))
    # Without the checkpoint's curve: at least what is to come.
    fresh = ScheduleOutlook(optimizer, scheduler, total_steps=TOTAL, step=40)
    assert fresh.at(60).decay == pytest.approx(whole.at(60).decay)


def test_a_longer_run_is_not_the_old_one():
    optimizer = sgd(0.1)
    old = ScheduleOutlook(optimizer, None, total_steps=TOTAL)
    longer = ScheduleOutlook(optimizer, None, total_steps=2 * TOTAL)
    longer.load_state_dict(old.state_dict())
    assert longer.at(TOTAL).share_left == 0.5


def test_a_cut_changes_nothing():
    optimizer = sgd(0.1)
    scheduler = SCHEDULES["linear"](optimizer)
    before = ScheduleOutlook(optimizer, scheduler, total_steps=TOTAL).at(50)
    scale_learning_rates([optimizer], [scheduler], 0.3)
    after = ScheduleOutlook(optimizer, scheduler, total_steps=TOTAL).at(50)
    assert after.share_left == pytest.approx(before.share_left)
    assert after.decay == pytest.approx(before.decay)


def test_a_schedule_by_epochs():
    optimizer = sgd(1.0)
    scheduler = lrs.StepLR(optimizer, 1, 0.5)
    outlook = ScheduleOutlook(optimizer, scheduler, total_steps=30, every=10)
    assert outlook.at(10).share_left == pytest.approx(0.75 / 1.75)
    assert outlook.at(15).share_left == pytest.approx(0.5 / 1.75)
    assert outlook.at(19).decay == pytest.approx(0.5)


def test_long_runs_keep_a_thousand_points():
    optimizer, total = sgd(0.1), 10**7
    scheduler = get_scheduler("linear", optimizer, num_training_steps=total, num_warmup_steps=10**6)
    outlook = ScheduleOutlook(optimizer, scheduler, total_steps=total)
    assert outlook.state_dict()["curve"].shape[1] <= 1025
    assert outlook.at(900_000).rising
    assert not outlook.at(1_100_000).rising
    assert outlook.at(5_500_000).share_left == pytest.approx(0.5**2 * 0.9, abs=2e-3)


class Broken(lrs.StepLR):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("make", "total"),
    [
        (lrs.ReduceLROnPlateau, TOTAL),
        (lambda o: None, None),
        (lambda o: Broken(o, 5), TOTAL),
        (lambda o: lrs.StepLR(o, 5), 10**6),
    ],
)
def test_unknown(make, total):
    optimizer = sgd(0.1)
    outlook = ScheduleOutlook(optimizer, make(optimizer), total_steps=total)
    assert outlook.at(3) == SchedulePoint(rising=False, share_left=None, decay=None)
    outlook.load_state_dict(outlook.state_dict())
    assert outlook.at(3) == SchedulePoint()


def test_a_group_without_parameters_does_not_count():
    """LoRA's group without weight decay is empty."""
    optimizer = sgd(0.1)
    optimizer.add_param_group({"params": [], "lr": 7.0})
    for make in (
        lambda o: lrs.LambdaLR(o, [lambda t: 1.0, lambda t: t]),
        lambda o: lrs.StepLR(o, 3),
    ):
        outlook = ScheduleOutlook(optimizer, make(optimizer), total_steps=30)
        assert not outlook.at(1).rising
