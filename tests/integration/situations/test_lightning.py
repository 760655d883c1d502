"""Situations that users of Lightning reported, with the stop, the cut and the optimizer added.

Each trains beside the same run without our callbacks: where these only watch, its weights are
the same to the bit, and no exception of ours ends it.
"""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from poprisk_integrations.core.learning_rate_cut import LearningRateCutRule
from poprisk_integrations.lightning import PopRiskEarlyStopping, PopRiskLRCut
from tests.integration.lightning import toy

pytestmark = [
    *toy.third_party_warnings,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def watchers():
    return [
        PopRiskEarlyStopping(criterion="signal", window=8, action="monitor"),
        PopRiskLRCut(window=8),
    ]


def fit(root, callbacks, model=None, data=None, ckpt_path=None, **kwargs):
    torch.manual_seed(1)
    model = model or toy.Classifier()
    trainer = toy.trainer(root, callbacks, **{"max_epochs": 6, **kwargs})
    trainer.fit(model, toy.loader() if data is None else data, ckpt_path=ckpt_path)
    return model, trainer


def same_as_without(root, make_callbacks, make_model=toy.Classifier, data=None, **kwargs):
    """Ours first and ours last; returns the stop of the second."""
    alone, _ = fit(root, make_callbacks(), make_model(), data, **kwargs)
    for is_first in (True, False):
        ours = watchers()
        theirs = make_callbacks()
        order = [*ours, *theirs] if is_first else [*theirs, *ours]
        model, _ = fit(root, order, make_model(), data, **kwargs)
        toy.assert_same(model.state_dict(), alone.state_dict())
        assert [callback.switched_off for callback in ours] == [None, None]
    return ours[0]


class WithBackbone(toy.Classifier):
    def __init__(self):
        super().__init__()
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net[2].parameters(), lr=1e-2)


def unfreezing():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.5)


def test_a_backbone_is_unfrozen_in_mid_run(tmp_path):
    stop = same_as_without(tmp_path, lambda: [unfreezing()], WithBackbone)
    assert [row["step"] for row in stop.history] == [8, 16, 24, 32, 40, 48]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resume_that_freezes_again_what_was_unfrozen(tmp_path):
    """The run goes on with other trained parameters than the checkpoint's window had."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=28, save_top_k=-1)
    fit(tmp_path, [unfreezing(), *watchers(), saver], WithBackbone(), enable_checkpointing=True)
    ours = watchers()
    with pytest.warns(UserWarning, match="does not fit the trained parameters"):
        _, trainer = fit(
            tmp_path, [unfreezing(), *ours], WithBackbone(), ckpt_path=tmp_path / "step=28.ckpt"
        )
    assert trainer.current_epoch == 6
    assert ours[0].history[3]["step"] == 28 + 8


def test_a_one_cycle_whose_groups_are_fewer_than_the_optimizers(tmp_path, monkeypatch):
    """A cut must not fail where a group was added that no schedule knows."""

    class Grows(WithBackbone):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            one = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=10_000)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": one, "interval": "step"}}

    monkeypatch.setattr(LearningRateCutRule, "update", lambda self, *, step, **_: step == 40)
    cut = PopRiskLRCut(window=8, factor=0.1)
    _, trainer = fit(tmp_path, [unfreezing(), cut], Grows(), max_epochs=5)
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert cut.switched_off is None
    assert rates[0] == pytest.approx(0.5e-3)


def test_weights_are_averaged_and_batch_norm_gets_an_epoch_of_its_own(tmp_path):
    """That epoch has no backward pass, one batch more and all of it as one accumulation."""

    class Normed(toy.Classifier):
        def __init__(self):
            super().__init__()
            self.net.insert(1, torch.nn.BatchNorm1d(32))

    def averaging():
        return [StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=2)]

    stop = same_as_without(tmp_path, averaging, Normed)
    assert [row["step"] for row in stop.history] == [8, 16, 24, 32, 40, 48]
    assert stop.state_dict()["setup"]["accumulation_steps"] == 1


@pytest.mark.filterwarnings("ignore:.*pruning")
def test_a_model_is_pruned_while_it_trains(tmp_path):
    stop = same_as_without(tmp_path, lambda: [ModelPruning("l1_unstructured", amount=0.2)])
    assert len(stop.history) == 6


class FindsLR(LearningRateFinder):
    def __init__(self):
        super().__init__(num_training_steps=10, update_attr=False)

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


def test_a_learning_rate_finder_runs_in_mid_run(tmp_path):
    """It saves and restores the run, our state included."""
    stop = same_as_without(tmp_path, lambda: [FindsLR()])
    assert [row["step"] for row in stop.history] == [8, 16, 24, 32, 40, 48]
    assert stop.history[-1]["lr_sum"] == pytest.approx(0.48)


class FindsBatchSize(BatchSizeFinder):
    def __init__(self):
        super().__init__(init_val=32, max_trials=1, steps_per_trial=1)

    def on_fit_start(self, trainer, pl_module):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            self.scale_batch_size(trainer, pl_module)


class OfBatchSize(toy.Classifier):
    def __init__(self):
        super().__init__()
        self.batch_size = 16

    def train_dataloader(self):
        return toy.loader(batch_size=self.batch_size)


def test_a_batch_size_finder_runs_in_mid_run(tmp_path):
    stop = PopRiskEarlyStopping(criterion="signal", window=8, action="monitor")
    model = OfBatchSize()
    trainer = toy.trainer(tmp_path, [stop, FindsBatchSize()], max_epochs=6)
    trainer.fit(model)
    found = stop.state_dict()["setup"]
    assert found["batch_size"] == model.batch_size != 16
    assert found["epoch_steps"] == 256 // model.batch_size
    assert stop.switched_off is None


def test_a_loader_is_made_anew_by_hand_in_mid_run(tmp_path):
    """A curriculum: from epoch 2 on twice the data."""

    class Curriculum(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                pl_module.n = 512
                trainer.fit_loop._combined_loader = None
                trainer.fit_loop.setup_data()

    class Reads(toy.Classifier):
        n = 256

        def train_dataloader(self):
            return toy.loader(n=self.n)

    ours = watchers()
    trainer = toy.trainer(tmp_path, [*ours, Curriculum()], max_epochs=4)
    trainer.fit(Reads())
    assert trainer.global_step == 16 + 32
    assert ours[0].state_dict()["setup"]["epoch_steps"] == 16


def test_accumulation_over_more_batches_than_there_are(tmp_path, caplog):
    """Lightning steps at the end of each epoch: every step takes all the data."""
    with caplog.at_level(logging.INFO):
        _, trainer = fit(
            tmp_path,
            [PopRiskEarlyStopping(criterion="signal")],
            accumulate_grad_batches=64,
            max_epochs=12,
        )
    start = next(r.message for r in caplog.records if "PopRiskEarlyStopping" in r.message)
    assert trainer.global_step == 12
    assert "each step takes all the data" in start


def test_a_batch_sampler_of_ones_own(tmp_path, caplog):
    class Bucketed(BatchSampler):
        def __iter__(self):
            yield from sorted(super().__iter__(), key=sum)

    data = toy.noisy_data(256, toy.FLIPS)
    sampler = Bucketed(SequentialSampler(data), 32, drop_last=False)
    stop = PopRiskEarlyStopping(criterion="signal", window=8)
    with caplog.at_level(logging.INFO):
        _, trainer = fit(tmp_path, [stop], data=DataLoader(data, batch_sampler=sampler))
    assert trainer.global_step == 48
    start = next(r.message for r in caplog.records if "PopRiskEarlyStopping" in r.message)
    assert "the sampler is a Bucketed" in start
    assert "set epoch_steps to the optimizer steps of one pass" in start


def test_iterators_that_are_no_loaders(tmp_path):
    """As DALI's: with a length and no data set to ask."""

    class Batches:
        def __len__(self):
            return 8

        def __iter__(self):
            yield from toy.loader()

    for given, stopped in ((8, 45), (None, None)):
        stop = PopRiskEarlyStopping(criterion="signal", window=8, epoch_steps=given)
        fit(tmp_path, [stop], data=Batches(), max_epochs=8)
        assert stop.stopped_step == stopped


def test_double_precision(tmp_path):
    stop = PopRiskEarlyStopping(criterion="signal", window=8)
    _, trainer = fit(tmp_path, [stop], precision="64-true", max_epochs=20)
    assert trainer.global_step == stop.stopped_step == 45


def test_a_fourier_layer_with_complex_weights(tmp_path):
    class Fourier(toy.Classifier):
        def __init__(self):
            super().__init__()
            self.spectral = torch.nn.Parameter(torch.ones(9, dtype=torch.cfloat))

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = torch.fft.irfft(torch.fft.rfft(x) * self.spectral, n=16)
            return super().training_step((x, y), batch_idx)

    stop = same_as_without(tmp_path, list, Fourier)
    assert all(row["signal_ratio"] > 0 for row in stop.history)


def test_sparse_embeddings(tmp_path):
    class Embeds(toy.Classifier):
        def __init__(self):
            super().__init__()
            torch.manual_seed(7)
            self.net = torch.nn.EmbeddingBag(20, 4, sparse=True)

        def configure_optimizers(self):
            return torch.optim.SparseAdam(list(self.net.parameters()), lr=1e-2)

    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 20, (64, 3), generator=g), torch.randint(0, 4, (64,), generator=g)
    data = DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    stop = same_as_without(tmp_path, list, Embeds, data)
    assert all(row["signal_ratio"] > 0 for row in stop.history)


def test_a_fit_after_a_fit_with_one_trainer(tmp_path):
    """The second has other data: nothing of it has been seen."""
    stop = PopRiskEarlyStopping(criterion="signal", window=8, action="monitor")
    model, trainer = fit(tmp_path, [stop], max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    with pytest.warns(UserWarning, match="it knows nothing of the steps before 16"):
        trainer.fit(model, toy.loader(shuffle=True))
    assert [(row["step"], row["reused"]) for row in stop.history] == [(24, False), (32, True)]
