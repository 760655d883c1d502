"""Which weights are the run's result, and which files."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


class Snapshots(Callback):
    """Weights after each optimizer step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = {k: v.clone() for k, v in pl_module.state_dict().items()}
        self.weights[trainer.global_step] = state


def fit(root, stop, *callbacks, **settings):
    snapshots = Snapshots()
    model, trainer = toy.fit(root, stop, snapshots, *callbacks, **settings)
    return model, trainer, snapshots.weights


def onset():
    return toy.signal(restore="onset")


def test_onset_restores_the_weights_of_the_onset(tmp_path):
    stop = onset()
    model, trainer, weights = fit(tmp_path, stop)
    assert trainer.global_step == stop.stopped_step == 45
    assert stop.best_model_path == str(tmp_path / "poprisk-onset-step=32.ckpt")
    toy.assert_same(model.state_dict(), weights[32])
    saved = torch.load(stop.best_model_path, weights_only=True)
    toy.assert_same(saved["state_dict"], weights[32])
    # Resumed from there, a run equals the uninterrupted one.
    again = onset()
    model, trainer, weights = fit(tmp_path, again, ckpt_path=stop.best_model_path)
    assert trainer.global_step == 45
    toy.assert_same(again.state_dict(), stop.state_dict())
    toy.assert_same(model.state_dict(), saved["state_dict"])
    assert min(weights) == 33


@pytest.mark.parametrize(("epochs", "step"), [(5, 32), (2, 16)])
def test_onset_where_the_run_ends_before_the_stop_or_the_onset(tmp_path, epochs, step):
    stop, saver = onset(), ModelCheckpoint(tmp_path / "runs")
    settings = {"enable_checkpointing": True, "max_epochs": epochs}
    model, _, weights = fit(tmp_path, stop, saver, **settings)
    assert stop.stopped_step is None
    toy.assert_same(model.state_dict(), weights[step])
    # Beside ModelCheckpoint's files.
    path = str(tmp_path / "runs" / "poprisk-onset-step=32.ckpt")
    assert stop.best_model_path == (path if step == 32 else "")


def test_a_missing_onset_checkpoint_is_an_error_before_any_step(tmp_path):
    """E.g. the run so far had restore="stop", or the file was moved."""
    saver = toy.SaveAt(tmp_path, 36)
    fit(tmp_path, toy.signal(restore="stop"), saver)
    with pytest.raises(FileNotFoundError, match=r"Invalid restore: 'onset'.* step 32"):
        fit(tmp_path, onset(), ckpt_path=saver.path)


def test_an_unwritable_directory_is_an_error_before_any_step(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    model = toy.Classifier()
    with pytest.raises(OSError, match="file"):
        fit(tmp_path / "file" / "runs", onset(), model=model)
    toy.assert_same(model.state_dict(), toy.Classifier().state_dict())


def test_an_onset_that_cannot_be_saved_does_not_end_the_run(tmp_path, monkeypatch):
    save = Trainer.save_checkpoint

    def fails(self, path, *args, **kwargs):
        if "onset" in str(path):
            raise OSError(28, "No space left on device")
        return save(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", fails)
    stop = onset()
    with pytest.warns(UserWarning, match="could not be written to .*No space left"):
        _, trainer, _ = fit(tmp_path, stop)
    assert trainer.global_step == stop.stopped_step == 45
    assert stop.best_model_path == ""


def test_a_checkpoint_that_cannot_be_loaded_safely_is_named(tmp_path):
    class Unsafe(toy.Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["an object"] = object()

    with pytest.warns(UserWarning, match=r"could not be loaded back from .*step=32"):
        model, trainer, weights = fit(tmp_path, onset(), model=Unsafe())
    toy.assert_same(model.state_dict(), weights[trainer.global_step])  # fit ended well


@pytest.mark.parametrize(("every", "is_saved"), [(15, True), (24, False)])
def test_stop_names_the_checkpoint_that_was_saved_there_if_any(tmp_path, every, is_saved):
    stop = toy.signal()
    saver = ModelCheckpoint(tmp_path / "a", every_n_train_steps=every, save_top_k=-1)
    model, _, weights = fit(tmp_path, stop, saver, enable_checkpointing=True)
    toy.assert_same(model.state_dict(), weights[45])
    assert bool(stop.best_model_path) is is_saved
    if is_saved:
        saved = torch.load(stop.best_model_path, weights_only=True)
        assert saved["global_step"] == 45
        toy.assert_same(saved["state_dict"], model.state_dict())


@pytest.mark.parametrize("settings", [{"restore": None}, {"restore": "onset", "action": "monitor"}])
def test_none_and_monitoring_save_and_change_nothing(tmp_path, settings):
    stop = toy.signal(**settings)
    model, trainer, weights = fit(tmp_path, stop)
    assert stop.onset_step == 32
    assert stop.best_model_path == ""
    assert list(tmp_path.iterdir()) == []
    toy.assert_same(model.state_dict(), weights[trainer.global_step])
