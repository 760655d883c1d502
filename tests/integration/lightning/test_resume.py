"""A resumed run equals an uninterrupted one bitwise: weights, optimizer, stop."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from poprisk_integrations.lightning import PopRiskEarlyStopping, PopRiskOptimizer
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings


class ResumableLoader(DataLoader):
    """Continues in mid-epoch, as Lightning asks of loaders with `state_dict`."""

    start = 0
    position = 0

    def __iter__(self):
        self.position, self.start = self.start, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= self.position:
                self.position = (index + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state_dict):
        self.start = state_dict["position"]


def stopping(**arguments):
    """A loader of one's own may repeat inside, so the length of a pass is given."""
    return PopRiskEarlyStopping(epoch_steps=8, **arguments)


def data():
    return ResumableLoader(toy.noisy_data(256, toy.FLIPS), batch_size=32)


def fit(root, stop, make_optimizer, ckpt_path=None, callbacks=(), data=data, **kwargs):
    model = toy.Classifier(make_optimizer)
    trainer = toy.trainer(root, [stop, *callbacks], **{"max_epochs": 30, **kwargs})
    trainer.fit(model, data(), ckpt_path=ckpt_path)
    return model, trainer


def optimizer_state(trainer):
    state = trainer.optimizers[0].state_dict()
    for group in state["param_groups"]:
        group.pop("differentiable", None)  # torch adds its default when any state is loaded
    return state


class SaveAt(Callback):
    """A checkpoint after one optimizer step, where ModelCheckpoint would save it."""

    def __init__(self, root, step):
        self.path = root / f"step{step}.ckpt"
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("make_optimizer", [toy.adamw, toy.gated])
@pytest.mark.parametrize(
    ("window", "step", "where"),
    [
        (8, 16, "end of an epoch and of a window"),
        (12, 16, "end of an epoch, in a window"),
        (8, 20, "in an epoch and in a window"),
        (8, 44, "after the onset"),
    ],
)
def test_resumed_equals_uninterrupted_bitwise(tmp_path, make_optimizer, window, step, where):
    kappa = 2.0
    whole_stop = stopping(kappa=kappa, window=window)
    saver = SaveAt(tmp_path, step)
    whole = fit(tmp_path, whole_stop, make_optimizer, callbacks=[saver])
    saved = torch.load(saver.path, weights_only=True)  # numbers, strings and tensors only
    seen = saved["callbacks"][whole_stop.state_key]["window"]["seen"]
    assert seen == step % window

    stop = stopping(kappa=kappa, window=window)
    resumed = fit(tmp_path, stop, make_optimizer, ckpt_path=saver.path)

    assert whole_stop.stopped_step == whole[1].global_step
    assert stop.stopped_step == resumed[1].global_step == whole_stop.stopped_step
    assert stop.stopping_reason == whole_stop.stopping_reason
    toy.assert_same(resumed[0].state_dict(), whole[0].state_dict())
    toy.assert_same(optimizer_state(resumed[1]), optimizer_state(whole[1]))
    toy.assert_same(stop.state_dict(), whole_stop.state_dict())


def test_resume_with_accumulation_and_a_short_last_step(tmp_path):
    settings = {"accumulate_grad_batches": 3, "max_epochs": 12}
    whole_stop = stopping(window=5, action="monitor")
    saver = SaveAt(tmp_path, 9)
    whole = fit(tmp_path, whole_stop, toy.gated, callbacks=[saver], **settings)
    stop = stopping(window=5, action="monitor")
    resumed = fit(tmp_path, stop, toy.gated, ckpt_path=saver.path, **settings)
    toy.assert_same(resumed[0].state_dict(), whole[0].state_dict())
    toy.assert_same(stop.state_dict(), whole_stop.state_dict())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_run_that_had_stopped_stays_stopped(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", filename="last")
    first = stopping(kappa=1.2, window=8)
    whole = fit(tmp_path, first, toy.gated, callbacks=[saver], enable_checkpointing=True)
    path = saver.best_model_path
    assert first.best_model_path == path  # saved at the epoch's end, at the step of the stop

    again = stopping(kappa=1.2, window=8)
    resumed = fit(tmp_path, again, toy.gated, ckpt_path=path)
    assert resumed[1].global_step == whole[1].global_step == again.stopped_step
    toy.assert_same(resumed[0].state_dict(), whole[0].state_dict())

    trains_on = stopping(kappa=1.2, window=8, action="monitor")
    longer = fit(tmp_path, trains_on, toy.gated, ckpt_path=path)
    assert longer[1].current_epoch == 30
    assert trains_on.onset_step == first.onset_step


def test_a_second_fit_starts_afresh(tmp_path):
    stop = stopping(window=8)
    fit(tmp_path, stop, toy.adamw)
    first = stop.state_dict()
    _, trainer = fit(tmp_path, stop, toy.adamw)
    assert trainer.global_step == stop.stopped_step == 45
    toy.assert_same(stop.state_dict(), first)


def test_a_window_of_other_parameters_starts_afresh(tmp_path):
    """E.g. a layer was frozen between the runs: positions no longer match."""

    class Frozen(toy.Classifier):
        def on_fit_start(self):
            self.net[0].requires_grad_(False)

    saver = SaveAt(tmp_path, 20)
    fit(tmp_path, stopping(window=8), toy.adamw, callbacks=[saver])
    trainer = toy.trainer(tmp_path, [stopping(window=8)], max_epochs=20)
    with pytest.warns(UserWarning, match="does not fit the trained parameters"):
        trainer.fit(Frozen(), data(), ckpt_path=saver.path)


@pytest.mark.parametrize("make_first", [toy.adamw, toy.gated])
def test_popriskoptimizer_loads_checkpoints_of_adamw_and_of_ours(tmp_path, make_first):
    saver = SaveAt(tmp_path, 16)
    fit(tmp_path, stopping(window=8), make_first, callbacks=[saver])
    saved = torch.load(saver.path, weights_only=True)["optimizer_states"][0]["state"][0]

    _, trainer = fit(
        tmp_path,
        stopping(window=8),
        toy.adamw,
        ckpt_path=saver.path,
        callbacks=[PopRiskOptimizer()],
        max_epochs=2,
    )
    state = trainer.optimizers[0].state_dict()["state"][0]  # restored, no step taken
    assert trainer.global_step == 16
    assert type(trainer.optimizers[0]).__name__ == "PopRiskAdamW"
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(state[key], saved[key])
    assert ("exp_dev_sq" in state) == ("exp_dev_sq" in saved)


def test_popriskoptimizer_resumes_bitwise(tmp_path):
    saver = SaveAt(tmp_path, 20)
    whole_stop, stop = (stopping(kappa=1.2, window=8) for _ in range(2))
    optimizer = PopRiskOptimizer(gate="hard")
    whole = fit(tmp_path, whole_stop, toy.adamw, callbacks=[optimizer, saver])
    resumed = fit(
        tmp_path,
        stop,
        toy.adamw,
        ckpt_path=saver.path,
        callbacks=[PopRiskOptimizer(gate="hard")],
    )
    toy.assert_same(resumed[0].state_dict(), whole[0].state_dict())
    toy.assert_same(optimizer_state(resumed[1]), optimizer_state(whole[1]))
    toy.assert_same(stop.state_dict(), whole_stop.state_dict())


@pytest.mark.parametrize("step", [16, 20])
def test_a_checkpoint_of_a_callback_that_is_called_before_ours(tmp_path, step):
    """The step that it follows was taken, but not yet counted by us."""
    saver, whole, again = SaveAt(tmp_path, step), stopping(window=8), stopping(window=8)
    for stop, callbacks, path in ((whole, [saver], None), (again, [], saver.path)):
        trainer = toy.trainer(tmp_path, [*callbacks, stop], max_epochs=30)
        trainer.fit(toy.Classifier(), data(), ckpt_path=path)
    assert again.stopped_step == whole.stopped_step
    toy.assert_same(again.state_dict(), whole.state_dict())
