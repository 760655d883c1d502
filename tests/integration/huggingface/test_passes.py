"""When examples were seen before: by the data and their sampler, whatever Trainer's epoch is."""

import pytest
import torch
import transformers
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import arguments, dataset, train

needs_v5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="Trainer itself draws other batches after a resume within an epoch",
)


def _args(path, **changes):
    options = {"optim": "sgd", "learning_rate": 1e-3, "max_steps": 48, "max_grad_norm": 0.0}
    return arguments(path, **{**options, **changes})


def _watch(**options):
    return hf.PopRiskEarlyStoppingCallback(criterion="signal", action="monitor", **options)


def _reused(stop):
    return {row["step"]: row["reused"] for row in stop.history}


def _trainer_with(sampler):
    """A Trainer that draws with a sampler of the user's own."""

    class Own(Trainer):
        def _get_train_sampler(self, *args):
            return sampler

    return Own


def test_an_epoch_that_draws_a_part_of_the_data_is_no_pass(tmp_path):
    """8 of 64 batches make an epoch: the first pass is 64 steps, not 8."""
    data = dataset(512)
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8, kappa=1.0)
    cls = _trainer_with(RandomSampler(data, num_samples=64))
    trainer = train(_args(tmp_path, max_steps=80), stop, cls=cls, train_dataset=data)
    assert trainer.state.epoch == 10
    assert _reused(stop) == {step: step > 64 for step in range(8, 81, 8)}


class _Curriculum(torch.utils.data.Sampler):
    """Any order of the user's own."""

    def __len__(self):
        return 64

    def __iter__(self):
        return iter(range(64))


def test_a_sampler_of_the_users_own_is_asked_about_not_guessed(tmp_path, caplog):
    """No stop however low F is, until the user says how long a pass is."""
    data, last = dataset(64, noise=3.0), {}
    for epoch_steps in (None, 8):
        options = {"window": 8, "kappa": 1.0, "epoch_steps": epoch_steps}
        stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", **options)
        args = _args(tmp_path, optim="adamw_torch", learning_rate=3e-2, max_steps=64)
        trainer = train(args, stop, cls=_trainer_with(_Curriculum()), train_dataset=data)
        last[epoch_steps] = trainer.state.global_step
    assert last[8] < last[None] == 64
    assert caplog.text.count("the sampler is a _Curriculum") == 1
    assert caplog.text.count("set epoch_steps to the optimizer steps of one pass") == 1


class _Accumulate(TrainerCallback):
    """Changes the accumulation once a number of steps was made."""

    def __init__(self, steps, micro_batches):
        self.steps, self.micro_batches = steps, micro_batches

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.steps:
            args.gradient_accumulation_steps = self.micro_batches


def test_accumulation_that_changes_changes_the_window_too(tmp_path):
    """A pass of 64 micro-batches is 64 steps, then 16: windows of a third of a pass follow."""
    stop = _watch(window="third")
    change = _Accumulate(64, 4)
    args = _args(tmp_path, per_device_train_batch_size=1, max_steps=128)
    train(args, change, stop, train_dataset=dataset(64))
    rows = [(row["step"], row["reused"]) for row in stop.history]
    # 21 steps each in the first pass; 8, the shortest, from step 64 on. Trainer ends with epoch 2.
    assert rows == [(21, False), (42, False), (63, False), (72, True), (80, True)]


@needs_v5
def test_micro_batches_are_counted_and_resumed(tmp_path):
    """Two micro-batches a step, and 7 in an epoch, whose last step takes a single one."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12, **options}
    stop = _watch(window=4)
    train(_args(tmp_path, **saving), stop, train_dataset=dataset(28))
    assert stop.progress_state["batches"] == 21
    resumed = _watch(window=4)
    data = {"train_dataset": dataset(28), "resume": str(tmp_path / "checkpoint-6")}
    train(_args(tmp_path / "resumed", **saving), resumed, **data)
    assert resumed.progress_state == stop.progress_state


@needs_v5
def test_other_batches_on_resume_keep_the_share_of_the_pass(tmp_path):
    """Half a pass in batches of 8, the rest in batches of 4."""
    saving = {"save_strategy": "steps", "save_steps": 4}
    stop = _watch(window=4)
    train(_args(tmp_path, max_steps=4, **saving), stop)
    resumed = _watch(window=4)
    args = _args(tmp_path, max_steps=20, per_device_train_batch_size=4, **saving)
    train(args, resumed, resume=str(tmp_path / "checkpoint-4"))
    # 4 of 8 batches, then 8 of 16: the second pass begins at step 12.
    assert _reused(resumed) == {4: False, 8: False, 12: False, 16: True, 20: True}
