"""Which weights are the run's result."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


class Snapshots(Callback):
    """Weights after each optimizer step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.weights[trainer.global_step] = state


def fit(root, stop, callbacks=(), ckpt_path=None, model=None, **kwargs):
    model, snapshots = model or toy.Classifier(), Snapshots()
    trainer = toy.trainer(root, [stop, snapshots, *callbacks], **kwargs)
    trainer.fit(model, toy.loader(), ckpt_path=ckpt_path)
    return model, trainer, snapshots.weights


def test_onset_restores_the_weights_of_the_onset(tmp_path):
    stop = PopRiskEarlyStopping(window=8, restore="onset")
    model, trainer, weights = fit(tmp_path, stop)
    assert trainer.global_step == stop.stopped_step == 45
    assert stop.best_model_path == str(tmp_path / "poprisk-onset-step=32.ckpt")
    toy.assert_same(model.state_dict(), weights[32])
    saved = torch.load(stop.best_model_path, weights_only=True)
    toy.assert_same(saved["state_dict"], weights[32])


def test_onset_is_restored_also_where_the_run_ends_before_the_stop(tmp_path):
    stop = PopRiskEarlyStopping(window=8, restore="onset")
    model, _, weights = fit(tmp_path, stop, max_epochs=5)
    assert stop.stopped_step is None
    toy.assert_same(model.state_dict(), weights[32])


def test_without_an_onset_the_last_weights_stay(tmp_path):
    stop = PopRiskEarlyStopping(window=8, restore="onset")
    model, _, weights = fit(tmp_path, stop, max_epochs=2)
    assert stop.best_model_path == ""
    toy.assert_same(model.state_dict(), weights[16])


def test_onset_goes_beside_modelcheckpoints_files(tmp_path):
    stop = PopRiskEarlyStopping(window=8, restore="onset")
    fit(tmp_path, stop, [ModelCheckpoint(tmp_path / "runs")], enable_checkpointing=True)
    assert stop.best_model_path == str(tmp_path / "runs" / "poprisk-onset-step=32.ckpt")


def test_resume_from_the_onset_equals_the_uninterrupted_run(tmp_path):
    first = PopRiskEarlyStopping(window=8, restore="onset")
    fit(tmp_path, first)
    again = PopRiskEarlyStopping(window=8, restore="onset")
    model, trainer, weights = fit(tmp_path, again, ckpt_path=first.best_model_path)
    assert trainer.global_step == 45
    toy.assert_same(again.state_dict(), first.state_dict())
    toy.assert_same(model.state_dict(), torch.load(first.best_model_path)["state_dict"])
    assert min(weights) == 33


def test_a_missing_onset_checkpoint_is_an_error_before_any_step(tmp_path):
    """E.g. the run so far had restore="stop", or the file was moved."""
    path = tmp_path / "later.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 36:
                trainer.save_checkpoint(path)

    fit(tmp_path, PopRiskEarlyStopping(window=8, restore="stop"), [Save()])
    with pytest.raises(FileNotFoundError, match=r"Invalid restore: 'onset'.* step 32"):
        fit(tmp_path, PopRiskEarlyStopping(window=8, restore="onset"), ckpt_path=path)


def test_an_unwritable_directory_is_an_error_before_any_step(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    trainer = toy.trainer(
        tmp_path / "file" / "runs", [PopRiskEarlyStopping(window=8, restore="onset")]
    )
    with pytest.raises(OSError, match="file"):
        trainer.fit(toy.Classifier(), toy.loader())
    assert trainer.global_step == 0


def test_a_checkpoint_that_cannot_be_loaded_safely_is_named(tmp_path):
    class Unsafe(toy.Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["an object"] = object()

    stop = PopRiskEarlyStopping(window=8, restore="onset")
    with pytest.warns(UserWarning, match=r"could not be loaded back from .*step=32"):
        model, trainer, weights = fit(tmp_path, stop, model=Unsafe())
    toy.assert_same(model.state_dict(), weights[trainer.global_step])  # fit ended well


def test_stop_names_the_checkpoint_that_was_saved_there(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    every = ModelCheckpoint(tmp_path / "a", every_n_train_steps=15, save_top_k=-1)
    model, _, weights = fit(tmp_path, stop, [every], enable_checkpointing=True)
    saved = torch.load(stop.best_model_path, weights_only=True)
    assert saved["global_step"] == 45
    toy.assert_same(saved["state_dict"], model.state_dict())
    toy.assert_same(model.state_dict(), weights[45])


def test_stop_names_nothing_where_nothing_was_saved(tmp_path):
    stop = PopRiskEarlyStopping(window=8)
    rarely = ModelCheckpoint(tmp_path / "a", every_n_train_steps=24)
    fit(tmp_path, stop, [rarely], enable_checkpointing=True)
    assert stop.stopped_step == 45
    assert stop.best_model_path == ""


@pytest.mark.parametrize("settings", [{"restore": None}, {"restore": "onset", "action": "monitor"}])
def test_none_and_monitoring_save_and_change_nothing(tmp_path, settings):
    stop = PopRiskEarlyStopping(window=8, **settings)
    model, trainer, weights = fit(tmp_path, stop)
    assert stop.onset_step == 32
    assert stop.best_model_path == ""
    assert list(tmp_path.iterdir()) == []
    toy.assert_same(model.state_dict(), weights[trainer.global_step])
