"""The stop beside the trainer's own limits and modes, and set-ups that it refuses."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from torch.utils.data import DataLoader

from poprisk_integrations.lightning import PopRiskEarlyStopping
from poprisk_integrations.lightning._upstream import MisconfigurationException
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


class Evaluated(toy.Classifier):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


def test_min_epochs_of_the_trainer_is_honoured(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    trainer = toy.trainer(tmp_path, [stop], min_epochs=12, max_epochs=20)
    trainer.fit(toy.Classifier(), toy.loader())
    # Due at 45; allowed when epoch 12 is over, not one step into epoch 13.
    assert trainer.global_step == stop.stopped_step == 12 * 8
    assert "step 96" in stop.stopping_reason


def test_min_steps_of_the_trainer_is_honoured(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    trainer = toy.trainer(tmp_path, [stop], min_steps=100, max_epochs=20)
    trainer.fit(toy.Classifier(), toy.loader())
    assert trainer.global_step == stop.stopped_step == 100


def test_a_verdict_that_had_to_wait_is_taken_back_when_signal_returns(tmp_path):
    """The trainer would keep `should_stop` and end the run as soon as it may."""

    class SignalReturns(toy.Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step < 80:
                return super().training_step(batch, batch_idx)
            return (self.net(batch[0]) - 100.0).square().mean()  # all examples agree

    stop = PopRiskEarlyStopping(window=8)
    trainer = toy.trainer(tmp_path, [stop], min_epochs=13, max_epochs=14)
    trainer.fit(SignalReturns(), toy.loader())
    assert trainer.global_step == 14 * 8  # due at 45, but not at 104, when it became allowed
    assert stop.stopped_step is None
    assert "no stop is due any more" in stop.stopping_reason


def test_own_min_steps_does_not_imply_an_epoch(tmp_path):
    stop = PopRiskEarlyStopping(window=8, min_steps=70)
    trainer = toy.trainer(tmp_path, [stop], max_epochs=20)
    trainer.fit(toy.Classifier(), toy.loader())
    assert trainer.global_step == 70


def test_one_validation_follows_a_stop_in_mid_epoch(tmp_path):
    validated_at = []

    class Validated(Evaluated):
        def on_validation_end(self):
            validated_at.append(self.global_step)

    stop = PopRiskEarlyStopping(window=8, min_steps=70)
    trainer = toy.trainer(tmp_path, [stop], num_sanity_val_steps=2, max_epochs=20)
    trainer.fit(Validated(), toy.loader(), toy.loader())
    assert stop.stopped_step == 70
    assert validated_at[-2:] == [64, 70]
    assert float(trainer.callback_metrics["poprisk/onset_step"]) == 32


def test_fast_dev_run_decides_nothing(tmp_path):
    stop = PopRiskEarlyStopping(window=4)
    trainer = toy.trainer(tmp_path, [stop], fast_dev_run=12)
    trainer.fit(Evaluated(), toy.loader(), toy.loader())
    assert stop.state_dict()["window"] is None
    assert stop.stopped_step is None


def test_evaluation_leaves_the_state_alone(tmp_path):
    stop = PopRiskEarlyStopping(window=16, action="monitor")
    trainer = toy.trainer(tmp_path, [stop], max_epochs=5)
    model = Evaluated()
    trainer.fit(model, toy.loader(), toy.loader())
    before = copy.deepcopy(stop.state_dict())
    assert before["window"]["seen"] == 8
    trainer.validate(model, toy.loader(), verbose=False)
    trainer.test(model, toy.loader(), verbose=False)
    trainer.predict(model, toy.loader())
    toy.assert_same(stop.state_dict(), before)


def test_a_checkpoint_saved_after_fit_holds_the_unfinished_window(tmp_path):
    stop = PopRiskEarlyStopping(window=16, action="monitor")
    trainer = toy.trainer(tmp_path, [stop], max_epochs=5)
    trainer.fit(toy.Classifier(), toy.loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    window = saved["callbacks"][stop.state_key]["window"]
    assert window["seen"] == 8
    assert len(window["sums"]) == 4


def test_barebones_stops_too(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    trainer = toy.trainer(
        tmp_path,
        [stop],
        barebones=True,
        logger=None,
        enable_checkpointing=None,
        enable_progress_bar=None,
        enable_model_summary=None,
    )
    trainer.fit(toy.Classifier(), toy.loader())
    assert trainer.global_step == 45


def test_an_exception_lets_go_of_the_optimizer(tmp_path):
    class Fails(toy.Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_step == 5:
                raise ArithmeticError("in the module")
            return super().training_step(batch, batch_idx)

    stop = PopRiskEarlyStopping(window=8)
    trainer = toy.trainer(tmp_path, [stop])
    with pytest.raises(ArithmeticError):
        trainer.fit(Fails(), toy.loader())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert stop.state_dict()["window"]["seen"] == 5


def test_is_picklable_before_fit(tmp_path):
    stop = pickle.loads(pickle.dumps(PopRiskEarlyStopping(window=8)))
    toy.trainer(tmp_path, [stop]).fit(toy.Classifier(), toy.loader())
    assert stop.stopped_step == 45


@pytest.mark.parametrize("action", ["stop", "monitor"])
def test_a_stream_in_a_run_without_end_is_watched(tmp_path, action):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            for _ in range(101):
                yield toy.noisy_data(32)[:]

    stop = PopRiskEarlyStopping(action=action)
    trainer = toy.trainer(tmp_path, [stop], max_epochs=1)
    trainer.fit(toy.Classifier(), DataLoader(Stream(), batch_size=None))
    assert [row["step"] for row in stop.history] == [50, 100]
    assert stop.stopped_step is None


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 8}, 32),  # an epoch
        ({"max_epochs": 7}, 10),  # a third
        ({"max_epochs": 1, "limit_train_batches": 16}, 8),  # a third, but at least 8
        # 32 batches by 3: ten steps and a short one.
        ({"max_epochs": 8, "accumulate_grad_batches": 3}, 11),
        ({"max_epochs": 7, "accumulate_grad_batches": 4}, 8),
        ({"max_epochs": 8, "overfit_batches": 9}, 9),
    ],
)
def test_auto_window(tmp_path, settings, steps):
    stop = PopRiskEarlyStopping(action="monitor")
    closed = []

    class Watch(toy.Classifier):
        def on_train_batch_end(self, *_):
            closed.append((self.global_step, stop.state_dict()["rule"]["windows"]))

    toy.trainer(tmp_path, [stop], **settings).fit(Watch(), toy.loader(batch_size=8))
    assert next(step for step, windows in closed if windows == 1) == steps


@pytest.mark.parametrize("optimizers", [1, 2])
def test_manual_optimization_is_refused(tmp_path, optimizers):
    class Manual(toy.Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(optimizers)]

        def training_step(self, batch, batch_idx):
            raise AssertionError("no step may be taken")

    trainer = toy.trainer(tmp_path, [PopRiskEarlyStopping(window=8)])
    with pytest.raises(MisconfigurationException, match=f"with {optimizers} optimizer"):
        trainer.fit(Manual(), toy.loader())


def test_lbfgs_is_refused(tmp_path):
    model = toy.Classifier(torch.optim.LBFGS)
    with pytest.raises(MisconfigurationException, match="one gradient per step, found LBFGS"):
        toy.trainer(tmp_path, [PopRiskEarlyStopping(window=8)]).fit(model, toy.loader())


class DerivedDDP(DDPStrategy):
    pass


def test_onset_weights_are_refused_where_they_are_sharded(tmp_path):
    trainer = toy.trainer(tmp_path, [])
    strategy = FSDPStrategy.__new__(FSDPStrategy)
    object.__setattr__(trainer._accelerator_connector, "strategy", strategy)
    stop = PopRiskEarlyStopping(window=8, restore="onset")
    with pytest.raises(MisconfigurationException, match=r"'onset'. Under FSDPStrategy weights are"):
        stop.setup(trainer, toy.Classifier(), "fit")


@pytest.mark.parametrize(
    ("strategy_class", "is_refused"),
    [(DeepSpeedStrategy, True), (FSDPStrategy, False), (DerivedDDP, False)],
)
def test_strategies_that_hide_gradients_are_refused(tmp_path, strategy_class, is_refused):
    """Those need accelerators; the check needs the class only."""
    trainer = toy.trainer(tmp_path, [])
    stop = PopRiskEarlyStopping(window=8)
    object.__setattr__(
        trainer._accelerator_connector, "strategy", strategy_class.__new__(strategy_class)
    )
    if is_refused:
        with pytest.raises(MisconfigurationException, match=strategy_class.__name__):
            stop.setup(trainer, toy.Classifier(), "fit")
        stop.setup(trainer, toy.Classifier(), "validate")
    else:
        stop.setup(trainer, toy.Classifier(), "fit")
