"""The experiment inside a run: what is kept, joined, estimated and resumed."""

import io
import math

import pytest
import torch

from poprisk_integrations.core.risk_curve import first_pass_estimate, late_joiner_estimate
from poprisk_integrations.diagnostics.sitting_out import SittingOut

N = 120


def measured(epoch, seed=0):
    """(losses, places, order) of an epoch: harder examples stay hard."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    hard = torch.randn(N, generator=torch.Generator().manual_seed(seed)).abs()
    losses = 1.0 / (1 + epoch) + hard + 0.1 * torch.randn(N, generator=generator)
    return losses, torch.randperm(N, generator=generator)


def run_epoch(experiment, epoch, *, batch=10, start=0, stop=None, rows=None, on_batch=None):
    """Feed an epoch as a trainer does: sitters and visitors in batches, visits after records."""
    experiment.begin_epoch(epoch)
    losses, order = measured(epoch)
    batches = order.split(batch)
    for j in range(start, len(batches) if stop is None else stop):
        index = batches[j]
        if rows is not None:
            index = index[rows(index)]
        position = j / len(batches)
        values = {"loss": losses[index], "accuracy": (losses[index] < 1).float()}
        experiment.record(index, values, position=position)
        experiment.visited(index[~experiment.sits()[index]], position)
        if experiment.window_ends((j + 1) / len(batches)):
            experiment.close_window(step=epoch * len(batches) + j + 1)


def test_the_curve_is_that_of_the_estimators():
    experiment = SittingOut(N, share=0.3, seed=5, epochs=6)
    residuals, ses, visited = None, None, torch.zeros(N, dtype=torch.bool)
    for epoch in range(6):
        experiment.begin_epoch(epoch)
        sits = experiment.sits()
        run_epoch(experiment, epoch)
        losses, order = measured(epoch)
        places = torch.empty(N)
        places[order] = torch.arange(N).div(10, rounding_mode="floor") / 12
        new = ~visited
        if epoch == 0:
            found = first_pass_estimate(losses, places)
            residuals, ses = torch.full((N,), math.nan), torch.full((N,), math.nan)
        else:
            found = late_joiner_estimate(losses[new], places[new], residuals[new], ses[new])
        residuals[new], ses[new] = found.residuals.float(), found.se
        row = experiment.history[epoch]
        assert row["estimated_test_loss"] == pytest.approx(found.value, rel=1e-6)
        assert row["estimated_test_loss_se"] == pytest.approx(found.se, rel=1e-6)
        trained = visited if epoch else ~sits
        assert row["train_loss"] == pytest.approx(float(losses[trained].mean()), rel=1e-6)
        if epoch:
            assert row["estimated_gap"] == pytest.approx(
                row["estimated_test_loss"] - row["train_loss"]
            )
        else:
            assert (row["estimated_gap"], row["estimated_gap_se"]) == (0.0, 0.0)
        assert (row["step"], row["epoch"]) == (12 * (epoch + 1), epoch + 1)
        visited |= ~sits


@pytest.mark.parametrize(
    ("examples", "epochs", "windows"),
    [(4000, 3, 4), (400, 3, 1), (4000, 5, 2), (4000, 11, 1), (4000, None, 1)],
)
def test_windows_below_an_epoch_in_short_runs(examples, epochs, windows):
    assert SittingOut(examples, epochs=epochs).windows_per_epoch == windows


def test_windows_end_at_shares_of_an_epoch():
    experiment = SittingOut(4000, epochs=2)
    experiment.begin_epoch(0)
    ends = []
    for j in range(10):
        if experiment.window_ends((j + 1) / 10):
            ends.append(j + 1)
            experiment.record(torch.arange(20), {"loss": torch.rand(20)}, position=j / 10)
            experiment.close_window(step=j + 1)
    assert ends == [3, 5, 8, 10]
    assert [row["epoch"] for row in experiment.history] == [0.25, 0.5, 0.75, 1.0]


def test_resumed_is_uninterrupted_also_within_a_window():
    whole = SittingOut(N, share=0.3, epochs=4)
    for epoch in range(4):
        run_epoch(whole, epoch)
    first = SittingOut(N, share=0.3, epochs=4)
    run_epoch(first, 0)
    run_epoch(first, 1, stop=5)
    first.join()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SittingOut(N, share=0.3, epochs=4)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(second.sits(), first.sits())
    run_epoch(second, 1, start=5)
    for epoch in (2, 3):
        run_epoch(second, epoch)
    assert second.history == whole.history


def test_of_an_example_that_comes_twice_the_first_measurement_counts():
    """The second one was made after an update on it."""
    experiment = SittingOut(20, epochs=2)
    experiment.begin_epoch(0)
    experiment.record(torch.arange(20), {"loss": torch.full((20,), 2.0)}, position=0.0)
    experiment.record(torch.arange(10), {"loss": torch.zeros(10)}, position=0.5)
    assert experiment.close_window(step=1)["estimated_test_loss"] == 2.0
    experiment.begin_epoch(1)
    experiment.record(torch.arange(20), {"loss": torch.full((20,), 2.0)}, position=0.0)
    experiment.join()  # as before a checkpoint in the middle
    experiment.record(torch.arange(20), {"loss": torch.zeros(20)}, position=0.5)
    assert experiment.close_window(step=2)["estimated_test_loss"] == 2.0


def test_what_was_not_measured_is_left_out():
    experiment = SittingOut(40, epochs=2)
    experiment.begin_epoch(0)
    losses = torch.ones(40)
    losses[20:] = math.nan
    experiment.record(torch.arange(40), {"loss": losses}, position=0.0)
    assert experiment.close_window(step=1)["estimated_test_loss"] == 1.0
    assert experiment.close_window(step=2) is None  # nothing at all
    assert len(experiment.history) == 1


def test_metrics_have_the_names_that_are_logged_while_somebody_sits():
    experiment, logged = SittingOut(N, epochs=2), []
    for epoch in range(3):  # one epoch more than was planned
        logged.append(set(experiment.metrics()))
        run_epoch(experiment, epoch)
    names = ("test_loss", "gap", "test_accuracy")
    every = {f"poprisk/estimated_{name}{end}" for name in names for end in ("", "_se")}
    assert logged == [set(), every, every]
    row = experiment.history[-1]  # everybody has joined
    assert row["estimated_test_loss"] is row["estimated_gap"] is None
    assert row["train_loss"] is not None
    assert not experiment.metrics()


def test_a_longer_run_after_a_resume_does_not_bring_trained_examples_back():
    experiment = SittingOut(N, share=0.3, epochs=2)
    for epoch in range(2):
        run_epoch(experiment, epoch)
    experiment.join()
    longer = SittingOut(N, share=0.3, epochs=10)
    longer.load_state_dict(experiment.state_dict())
    longer.begin_epoch(2)
    assert not longer.sits().any()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"examples": 0}, "examples"), ({"share": 0.0}, "share"), ({"share": 0.6}, "share")],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        SittingOut(**{"examples": 100, **arguments})


@pytest.mark.parametrize("other", [{"examples": N + 1}, {"share": 0.2}, {"seed": 1}])
def test_the_state_of_another_experiment_is_refused(other):
    experiment = SittingOut(N)
    arguments = {"examples": N, **other}
    with pytest.raises(ValueError, match=f"{next(iter(other))}="):
        SittingOut(**arguments).load_state_dict(experiment.state_dict())
