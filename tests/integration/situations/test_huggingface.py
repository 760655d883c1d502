"""Situations that users of Trainer and PEFT have reported: the run ends as it does without us."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset, train


def _args(path, **changes):
    options = {"optim": "adamw_torch", "max_grad_norm": 0.0, "logging_steps": 1000}
    return arguments(path, **{**options, **changes})


class _Lisa(TrainerCallback):
    """Freezes all when training begins, and trains one layer at a time."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.requires_grad_(False)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step % 8 == 0:
            model.requires_grad_(False)
            getattr(model, ("embed", "norm", "head")[state.global_step // 8 % 3]).requires_grad_()


def test_lisa_freezes_all_before_our_turn(tmp_path):
    """modelscope/ms-swift#10140: six windows, none across a change of layers."""
    stop, cut = (
        hf.PopRiskEarlyStoppingCallback(criterion="signal", window=4),
        hf.PopRiskLRCut(window=4),
    )
    trainer = train(_args(tmp_path, max_steps=24), _Lisa(), stop, cut)
    assert trainer.state.global_step == 24
    assert [row["step"] for row in stop.history] == list(range(4, 25, 4))


def _with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["embed", "head"], r=2)
    model = peft.get_peft_model(TinyModel(), config, adapter_name="one")
    model.add_adapter("two", config)
    return model


def test_another_adapter_for_a_second_training(tmp_path, caplog):
    """huggingface/peft#1303: Trainer keeps its optimizer, and nothing is trained. We say so."""
    model, stop = _with_adapters(), hf.PopRiskEarlyStoppingCallback(criterion="signal", window=4)
    model.set_adapter("one")
    args = _args(tmp_path, max_steps=12)
    trainer = Trainer(model, args, train_dataset=dataset(), callbacks=[stop])
    trainer.train()
    assert [row["step"] for row in stop.history] == [4, 8, 12]
    model.set_adapter("two")
    caplog.clear()
    trainer.train()
    assert trainer.state.global_step == 12
    assert stop.history == []
    assert caplog.text.count("fewer than four steps with finite, varying gradients") == 1


class _Turns(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_adapter(("one", "two")[state.global_step % 2])


def test_two_adapters_in_turn(tmp_path, caplog):
    """huggingface/transformers#32084: no window can hold the steps of one adapter."""
    model = _with_adapters()
    for name, param in model.named_parameters():
        param.requires_grad_("lora" in name)
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=4)
    trainer = train(_args(tmp_path, max_steps=24), _Turns(), stop, model=model)
    assert trainer.state.global_step == 24
    assert caplog.text.count("the trained parameters change (frozen, thawed or added) before") == 1


class _SwapsTheHead(TrainerCallback):
    """Puts a new parameter in the place of an old one, in the model and in the optimizer."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 10:
            before, model.head = model.head, nn.Linear(8, 1)
            swap = {
                id(p): q for p, q in zip(before.parameters(), model.head.parameters(), strict=True)
            }
            for group in optimizer.param_groups:
                group["params"] = [swap.get(id(p), p) for p in group["params"]]


def test_parameters_that_are_replaced_in_the_optimizer(tmp_path):
    """helpmefindaname/transformer-smaller-training-vocab#3: also of another shape, an embedding."""
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8)
    ours = (stop, hf.PopRiskLRCut(window=8), hf.PopRiskMonitorCallback(1, per_layer=True))
    args = _args(tmp_path, max_steps=26, optim="poprisk_adamw")
    trainer = train(args, _SwapsTheHead(), *ours)
    assert trainer.state.global_step == 26
    assert [row["step"] for row in stop.history] == [8, 18, 26]
    assert all(callback.switched_off is None for callback in ours)


class _TenExamples(IterableDataset):
    """Ends, and is begun again by Trainer, with other noise each time: nothing is seen twice."""

    def __init__(self):
        self.turn = 0

    def __iter__(self):
        self.turn += 1
        generator = torch.Generator().manual_seed(self.turn)
        for _ in range(64):
            x = torch.randn(6, generator=generator)
            yield {"x": x, "labels": torch.randn((), generator=generator)}


def test_a_stream_that_ends_and_is_begun_again(tmp_path, caplog):
    """huggingface/transformers#26413, #26541: the end of a stream is no pass over known data."""
    data = _TenExamples()
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8, kappa=1.0)
    trainer = train(_args(tmp_path, max_steps=64), stop, train_dataset=data)
    assert data.turn > 7
    assert trainer.state.global_step == 64
    assert "the data are a stream" in caplog.text
    assert "set epoch_steps" in caplog.text


class _MoreData(TrainerCallback):
    def __init__(self, data):
        self.data = data

    def on_epoch_end(self, args, state, control, **kwargs):
        self.data += dataset(128)


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="Trainer's epoch ends with the data there",
)
def test_data_that_grow_after_each_epoch(tmp_path):
    """huggingface/transformers#25925: Trainer's epoch stays at 8 steps, a pass does not."""
    data = dataset(64)
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8, action="monitor")
    train(_args(tmp_path, max_steps=40), _MoreData(data), stop, train_dataset=data)
    # Whenever a window begins, more is new than was drawn.
    assert [row["reused"] for row in stop.history] == [False] * 5


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="Trainer itself evaluates by the steps of the checkpoint's arguments",
)
def test_the_best_of_a_stop_is_no_metric_of_an_evaluation(tmp_path):
    """huggingface/transformers#16620: `best_metric` is what Trainer compares with its own."""
    stop = hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8, kappa=1.0)
    best = {"save_strategy": "best", "load_best_model_at_end": True}
    first = train(_args(tmp_path, num_train_epochs=16, **best), stop)
    last = first.state.global_step
    assert first.state.best_global_step == last < 128
    # Resumed with an eval set, whose loss is above any F: the first one evaluated is the best yet.
    steps = {"eval_steps": 4, "save_steps": 4, "eval_strategy": "steps", "save_strategy": "steps"}
    args = _args(tmp_path, max_steps=last + 4, load_best_model_at_end=True, **steps)
    data = {"eval_dataset": dataset(noise=9.0), "resume": first.state.best_model_checkpoint}
    second = train(args, **data)
    (loss, *_) = [x["eval_loss"] for x in second.state.log_history if "eval_loss" in x]
    assert second.state.best_metric == pytest.approx(loss)
    assert second.state.best_global_step > last


def test_callbacks_can_be_copied_and_pickled(tmp_path):
    """ray-project/ray#15439, huggingface/transformers#11249: Ray pickles the whole Trainer."""
    ours = [
        hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8),
        hf.PopRiskMonitorCallback(),
    ]
    copies = []

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                copies.append((copy.deepcopy(state), pickle.dumps(state)))

    train(_args(tmp_path, max_steps=9), *ours, Copies())
    assert copies
    assert pickle.loads(pickle.dumps(ours[0])).state() == ours[0].state()
    assert pickle.loads(pickle.dumps(ours[1])).every_n_steps == 50
