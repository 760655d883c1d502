"""The stop beside the trainer's own limits and modes, and set-ups that it refuses."""

import copy
import logging

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


class Evaluated(toy.Classifier):
    val_dataloader = staticmethod(toy.loader)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"min_steps": 161}, {"max_epochs": 20}, "min_steps=161 is beyond its 160 steps"),
        ({}, {"max_steps": 15}, "would end at step 16, the run ends at 15"),
    ],
)
def test_a_run_that_cannot_stop_says_so_once(tmp_path, caplog, arguments, settings, message):
    with caplog.at_level(logging.INFO):
        toy.fit(tmp_path, toy.signal(**arguments), **settings)
    start, end = [r.message for r in caplog.records if "PopRisk" in r.message]
    assert message in start
    assert "did not stop this run: " in end


def test_one_validation_follows_a_stop_in_mid_epoch(tmp_path):
    validated_at = []

    class Validated(Evaluated):
        def on_validation_end(self):
            validated_at.append(self.global_step)

    stop = toy.signal(min_steps=70)
    toy.fit(tmp_path, stop, model=Validated(), num_sanity_val_steps=2)
    assert stop.stopped_step == 70
    assert validated_at[-2:] == [64, 70]


def test_fast_dev_run_decides_nothing(tmp_path):
    stop = toy.signal(window=4)
    toy.fit(tmp_path, stop, fast_dev_run=12)
    assert stop.state_dict()["window"] is None
    assert stop.stopped_step is None


def test_evaluation_leaves_the_state_alone_and_a_later_checkpoint_holds_it(tmp_path):
    stop = toy.watch(window=16)
    model, trainer = toy.fit(tmp_path, stop, model=Evaluated(), max_epochs=5)
    before = copy.deepcopy(stop.state_dict())
    assert before["window"]["seen"] == 8
    trainer.validate(model, toy.loader(), verbose=False)
    trainer.test(model, toy.loader(), verbose=False)
    trainer.predict(model, toy.loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    toy.assert_same(stop.state_dict(), before)
    toy.assert_same(saved["callbacks"][stop.state_key], before)


def test_barebones_stops_too(tmp_path):
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"barebones": True, **dict.fromkeys(names)}
    _, trainer = toy.fit(tmp_path, toy.signal(), **settings)
    assert trainer.global_step == 45


def test_an_exception_lets_go_of_the_optimizer(tmp_path):
    class Fails(toy.Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                raise ArithmeticError("in the module")
            return super().training_step(batch, batch_idx)

    stop = toy.signal()
    trainer = toy.trainer(tmp_path, [stop])
    with pytest.raises(ArithmeticError):
        trainer.fit(Fails(), toy.loader())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert stop.state_dict()["window"]["seen"] == 5


def test_a_stream_in_a_run_without_end_is_watched(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for _ in range(101):
                yield toy.noisy_data(32)[:]

    stop = toy.signal(window="auto")
    toy.fit(tmp_path, stop, data=DataLoader(Stream(), batch_size=None), max_epochs=1)
    assert [row["step"] for row in stop.history] == [50, 100]
    assert stop.stopped_step is None


# Refused before any step; a monitor says so instead, and lets train.


class Manual(toy.Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def frozen():
    model = toy.Classifier(lambda params: torch.optim.SGD(params, lr=0.1))
    model.net.requires_grad_(False)
    model.training_step = lambda batch, batch_idx: None
    return model


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Manual, "needs automatic optimization .* with 2 optimizer"),
        (lambda: toy.Classifier(torch.optim.LBFGS), "one gradient per step, found LBFGS"),
        (frozen, "none of the optimizer's requires a grad"),
    ],
    ids=["manual", "LBFGS", "nothing to train"],
)
def test_where_gradients_cannot_be_read(tmp_path, make, reason):
    trainer = toy.trainer(tmp_path, [toy.signal()])
    with pytest.raises(MisconfigurationException, match=reason):
        trainer.fit(make(), toy.loader())
    assert trainer.global_step == 0
    with pytest.warns(UserWarning, match=f"it measures nothing in this run: .*{reason}") as caught:
        _, trainer = toy.fit(tmp_path, toy.watch(), model=make(), max_epochs=1)
    assert len([w for w in caught if "PopRisk" in str(w.message)]) == 1
    assert trainer.current_epoch == 1


def test_two_stops_are_refused_before_any_step(tmp_path):
    trainer = toy.trainer(tmp_path, [toy.signal(), toy.signal(window=9)])
    with pytest.raises(MisconfigurationException, match="'stop' on 2 PopRiskEarlyStopping"):
        trainer.fit(toy.Classifier(), toy.loader())
    assert trainer.global_step == 0


class DerivedDDP(DDPStrategy):
    pass


@pytest.mark.parametrize(
    ("strategy_class", "arguments", "reason"),
    [
        (DeepSpeedStrategy, {}, "cannot run under DeepSpeedStrategy"),
        (FSDPStrategy, {"restore": "onset"}, "'onset'. Under FSDPStrategy weights are"),
        (FSDPStrategy, {}, ""),
        (DerivedDDP, {"restore": "onset"}, ""),
    ],
)
def test_strategies_that_hide_gradients_or_weights_are_refused(
    tmp_path, strategy_class, arguments, reason
):
    """Those need accelerators; the check needs the class only."""
    trainer, stop = toy.trainer(tmp_path), toy.signal(**arguments)
    strategy = strategy_class.__new__(strategy_class)
    object.__setattr__(trainer._accelerator_connector, "strategy", strategy)
    stop.setup(trainer, toy.Classifier(), "validate")
    if not reason:
        stop.setup(trainer, toy.Classifier(), "fit")
        return
    with pytest.raises(MisconfigurationException, match=reason):
        stop.setup(trainer, toy.Classifier(), "fit")
