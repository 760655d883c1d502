"""An onset needs data seen before: what counts as a second pass, and set-ups that cannot stop."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from poprisk_integrations.lightning import PopRiskEarlyStopping
from poprisk_integrations.lightning._upstream import MisconfigurationException
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


class Repeats(IterableDataset):
    """The same 8 batches over and over, in one epoch of Lightning's."""

    def __iter__(self):
        for _ in range(20):
            yield from toy.loader()


def fit(root, stop, data=None, **kwargs):
    trainer = toy.trainer(root, [stop], **{"max_epochs": 20, **kwargs})
    trainer.fit(toy.Classifier(), toy.loader() if data is None else data)
    return trainer


def test_a_loader_that_repeats_inside_needs_the_length_of_its_pass(tmp_path):
    def endless():
        return DataLoader(Repeats(), batch_size=None)

    known = PopRiskEarlyStopping(window=8, epoch_steps=8)
    fit(tmp_path, known, endless(), max_epochs=1)
    plain = PopRiskEarlyStopping(window=8)
    fit(tmp_path, plain)
    assert known.stopped_step == plain.stopped_step == 45

    unknown = PopRiskEarlyStopping(window=8)
    trainer = fit(tmp_path, unknown, endless(), max_epochs=1)
    assert unknown.onset_step is None
    assert trainer.global_step == 160


@pytest.mark.parametrize(("epoch_steps", "onset"), [(32, 40), (33, 48), (24, 32)])
def test_reuse_is_decided_at_the_windows_start(tmp_path, epoch_steps, onset):
    """F falls below 1 in the window of steps 25-32."""
    stop = PopRiskEarlyStopping(window=8, epoch_steps=epoch_steps)
    fit(tmp_path, stop)
    assert stop.onset_step == onset


def test_a_window_that_began_in_the_first_epoch_is_fresh(tmp_path):
    stop = PopRiskEarlyStopping(window=28, action="monitor")  # of epochs of 24 steps
    fit(tmp_path, stop, toy.loader(n=256, batch_size=10), max_epochs=4, limit_train_batches=24)
    assert len(stop.history) == 3
    assert stop.onset_step != 28


def test_a_stream_longer_than_the_run_never_stops(tmp_path):
    stop = PopRiskEarlyStopping(window=8, epoch_steps=10**9, action="monitor")
    fit(tmp_path, stop)
    assert stop.onset_step is None
    assert stop.history[-1]["signal_ratio"] < 1


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({}, {"max_epochs": 1}, "cannot stop this run: its 8 steps are one pass over the data"),
        ({"min_steps": 161}, {}, "min_steps=161 is beyond its 160 steps"),
        ({}, {"max_steps": 15}, "would end at step 16, the run ends at 15"),
    ],
)
def test_a_run_that_cannot_stop_says_so_once(tmp_path, caplog, arguments, settings, message):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, PopRiskEarlyStopping(window=8, **arguments), **settings)
    start, end = [r.message for r in caplog.records if "PopRisk" in r.message]
    assert message in start
    assert "did not stop this run: " in end


def test_two_stops_are_refused_before_any_step(tmp_path):
    stops = [PopRiskEarlyStopping(window=8), PopRiskEarlyStopping(window=9)]
    trainer = toy.trainer(tmp_path, stops)
    with pytest.raises(MisconfigurationException, match="'stop' on 2 PopRiskEarlyStopping"):
        trainer.fit(toy.Classifier(), toy.loader())
    assert trainer.global_step == 0


def test_nothing_to_train_is_refused_before_any_step(tmp_path):
    class Frozen(toy.Classifier):
        def configure_optimizers(self):
            self.requires_grad_(False)
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = toy.trainer(tmp_path, [PopRiskEarlyStopping(window=8)])
    with pytest.raises(MisconfigurationException, match="none of the optimizer's requires a grad"):
        trainer.fit(Frozen(), toy.loader())
    assert trainer.global_step == 0
