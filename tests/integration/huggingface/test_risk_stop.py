"""The stop at the estimated test loss, as Trainer alone knows it: batches, checkpoints, console.

What is alike in Lightning is in `tests/integration/test_risk_contract.py`.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback

import poprisk_integrations.huggingface as hf
from poprisk_integrations.core.sit_out_schedule import first_epochs
from poprisk_integrations.diagnostics.sitting_out import SittingOut
from tests.helpers.tiny_classifier import EXAMPLES, Classifier, arguments, dataset, train
from tests.helpers.tiny_trainer import weights
from tests.integration.frameworks import decide

EPOCHS, STEPS = 3, 8
NOISY = dataset(256, wrong=0.5)


def watch(**options):
    return hf.PopRiskEarlyStoppingCallback(**{"action": "monitor", "sit_out": 0.2, **options})


def risk(**options):
    defaults = {"criterion": "risk", "action": "stop", "patience": 5}
    return hf.PopRiskEarlyStoppingCallback(**{**defaults, **options})


def args_of(tmp_path, **changes):
    options = {"per_device_train_batch_size": 32, "num_train_epochs": 8, "learning_rate": 2e-2}
    return arguments(tmp_path, **{**options, **changes})


def fit(args, *callbacks, **options):
    model = {"model": Classifier(width=64), **options}
    return train(args, *callbacks, train_dataset=NOISY, **model)


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


SETTINGS = {
    "uneven": {"per_device_train_batch_size": 7},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_everyone_is_forwarded_once_an_epoch(tmp_path, name):
    model = Classifier()
    args = arguments(tmp_path, **SETTINGS[name])
    steps = train(args, watch(), model=model).state.global_step // EPOCHS
    joins = first_epochs(EXAMPLES, share=0.2, seed=args.seed, epochs=EPOCHS)
    done, trained, measured = 0, [[] for _ in range(EPOCHS)], [[] for _ in range(EPOCHS)]
    for entry in model.seen[1:]:  # the first was the look at the start
        (trained if entry.trains else measured)[done // steps].extend(entry.indices)
        done += entry.trains
    for epoch in range(EPOCHS):
        sits = set((joins > epoch).nonzero().flatten().tolist())
        assert set(trained[epoch]) == set(range(EXAMPLES)) - sits
        assert sorted(measured[epoch]) == sorted(sits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole run, and its checkpoint at step 20."""
    path, stop = tmp_path_factory.mktemp("saved"), watch()
    train(arguments(path, save_strategy="steps", save_steps=20), stop)
    return stop, path / "checkpoint-20"


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (120, "no poprisk_risk.safetensors of step 20 in the checkpoint"),
        (128, "The checkpoint was made with examples=120, this run has 128."),
    ],
)
def test_without_the_losses_or_with_other_data_they_are_recorded_afresh(
    tmp_path, caplog, saved, examples, said
):
    whole, kept, callback = saved[0], shutil.copytree(saved[1], tmp_path / "checkpoint-20"), watch()
    if examples == 120:
        (kept / "poprisk_risk.safetensors").unlink()
    data = {"train_dataset": dataset(examples), "resume": str(kept)}
    train(arguments(tmp_path), callback, **data)
    assert said in caplog.text
    assert (callback.history[0] == whole.history[0]) is (examples == 120)
    assert callback.history[-1]["step"] == examples * 3 // 8


def test_a_damaged_file_is_named(tmp_path, saved):
    kept = shutil.copytree(saved[1], tmp_path / "checkpoint-20")
    path = kept / "poprisk_risk.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"poprisk_risk\.safetensors' is damaged"):
        train(arguments(tmp_path), watch(), resume=str(kept))


class Smoothed(Trainer):
    """A subclass with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs["logits"], labels) + F.mse_loss(
            outputs["logits"], torch.zeros_like(outputs["logits"])
        )
        return (loss, outputs) if return_outputs else loss


def own_function(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


LOSSES = {"a subclass's": {"cls": Smoothed}, "a function's": {"compute_loss_func": own_function}}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_other_kinds(tmp_path, name):
    callback = watch(criterion="risk")
    train(arguments(tmp_path), callback, **LOSSES[name])
    for row in callback.history:
        assert row["train_loss"] > 0
        assert row["estimated_test_loss"] > 0


def test_a_second_callback_measures_the_signal(tmp_path, capsys):
    first, second = watch(), watch()
    train(arguments(tmp_path), first, second)
    assert (first.criterion_in_use, second.criterion_in_use) == ("risk", "signal")
    assert "another callback of this run has examples sit out" in capsys.readouterr().err


class _Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_nothing_stays_on_model_or_trainer_also_after_an_interruption(tmp_path):
    model, callback = Classifier(), watch()
    options = {"model": model, "args": arguments(tmp_path), "train_dataset": dataset()}
    trainer = Trainer(**options, callbacks=[callback, _Breaks()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(_Breaks)
    trainer.train()
    assert [row["step"] for row in callback.history] == [15, 30, 45]
    assert vars(trainer).keys() == vars(train(arguments(tmp_path))).keys()
    assert not model._forward_hooks
    assert weights(model).keys() == weights(Classifier()).keys()


class Snapshots(TrainerCallback):
    """Weights after every step."""

    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = weights(model)


def test_the_history_has_the_names_of_the_contract(tmp_path):
    stop = risk(action="monitor")
    trainer = fit(args_of(tmp_path, num_train_epochs=3, logging_steps=5), stop)
    names = ("step", "train_loss", "estimated_gap", "estimated_test_loss", "signal_ratio")
    for row in stop.history:
        assert set(names) <= row.keys()
        assert row["signal_ratio"] is None
        gap = row["estimated_test_loss"] - row["train_loss"]
        assert row["estimated_gap"] == (0 if row["step"] == STEPS else pytest.approx(gap))
    logged = {line["step"]: line for line in trainer.state.log_history}
    for row in stop.history:  # a line of its own at the end of each window
        for name in ("test_loss", "test_loss_se", "gap", "gap_se", "test_accuracy"):
            value = logged[row["step"]][f"poprisk/estimated_{name}"]
            assert value == row[f"estimated_{name}"]
    assert "poprisk/estimated_test_loss" not in logged[5]
    assert "poprisk/estimated_test_loss" in trainer.state.log_history[-1]


def test_few_epochs_have_a_curve_and_a_last_line(tmp_path, capsys):
    """With data enough, of parts of an epoch; also where there is nothing to stop."""
    args = args_of(tmp_path, num_train_epochs=2, lr_scheduler_type="linear")
    stop = risk(criterion="auto")
    trainer = train(args, stop, train_dataset=dataset(2000))
    assert trainer.state.global_step == 126
    assert len(stop.history) == SittingOut(2000, share=0.15, epochs=2).windows > 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("poprisk: did not stop this run; estimated test loss ")
    assert "at step 126 (training loss" in line


def test_one_epoch_says_that_there_is_nothing_to_stop(tmp_path, capsys):
    stop = risk(criterion="auto")
    fit(args_of(tmp_path, num_train_epochs=1), stop)
    assert "in a single pass over the data no example is seen twice" in capsys.readouterr().err
    for row in stop.history:
        assert row["estimated_test_loss"] == pytest.approx(row["train_loss"], rel=0.05)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_the_best_is_saved_once_an_epoch_and_only_the_last_stays(tmp_path, monkeypatch, strategy):
    """Unless the user has it saved anyway."""
    decide(monkeypatch, stop=40, best=(8, 16, 24))
    options = {"save_strategy": strategy, "save_steps": 500}
    if strategy == "best":
        options["load_best_model_at_end"] = True  # Trainer asks for it, or for a metric
    snapshots = Snapshots()
    trainer = fit(args_of(tmp_path, **options), risk(), snapshots)
    kept = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    assert kept == ({8, 16, 24, 32, 40} if strategy == "epoch" else {24})
    assert trainer.state.best_global_step == 24
    assert equal(weights(trainer.model), snapshots.at[24])


def test_evaluation_keeps_its_own_best(tmp_path, monkeypatch):
    decide(monkeypatch, stop=24, best=(8,))
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = fit(args_of(tmp_path, **options), risk(), eval_dataset=dataset(64))
    found = [h for h in trainer.state.log_history if "eval_loss" in h]
    assert trainer.state.best_global_step == min(found, key=lambda h: h["eval_loss"])["step"]
    assert not any(key.startswith("poprisk/") for key in found[0])


def test_restore_stop_keeps_the_weights_of_the_stop(tmp_path, monkeypatch):
    decide(monkeypatch, stop=24, best=(8,))
    options = {"save_strategy": "best", "load_best_model_at_end": True}
    trainer = fit(args_of(tmp_path, **options), risk(restore="stop"))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-24"]
    assert trainer.state.best_global_step == 24


def test_works_with_any_optimizer(tmp_path):
    for optim in ("adafactor", "poprisk_adamw"):
        stop = risk(action="monitor")
        fit(args_of(tmp_path / optim, optim=optim, num_train_epochs=3), stop)
        assert len(stop.history) == 3


def test_what_only_watches_marks_nothing_and_saves_nothing_of_its_own(tmp_path, monkeypatch):
    decide(monkeypatch, stop=16, best=(8,))
    args = args_of(tmp_path, num_train_epochs=4, save_strategy="steps")
    assert fit(args, risk(action="monitor")).state.best_global_step is None
    default = fit(args_of(tmp_path / "b", num_train_epochs=4), risk(action=None))
    assert default.state.best_global_step is None
    assert not list((tmp_path / "b").glob("checkpoint-*"))
