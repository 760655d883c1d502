"""Runs whose parameters, batch, settings or disk change under way: none is ended by a callback."""

import contextlib
import json
import shutil

import pytest
import transformers
from transformers import Trainer, TrainerCallback

import poprisk_integrations.huggingface as hf
from poprisk_integrations import PopRiskAdamW
from poprisk_integrations._files import write_whole
from poprisk_integrations.diagnostics import stop_report
from poprisk_integrations.huggingface.callbacks import windows
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset, train

needs_v5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="Trainer itself draws other batches after a resume within an epoch",
)


def _stop(**options):
    return hf.PopRiskEarlyStoppingCallback(**{"criterion": "signal", "window": 8, **options})


KINDS = {
    "stop": _stop,
    "cut": lambda: hf.PopRiskLRCut(window=8),
    "monitor": lambda: hf.PopRiskMonitorCallback(every_n_steps=2, per_layer=True),
}


def _report(path):
    return json.loads((path / "poprisk_stop.json").read_text())


def test_a_full_disk_costs_the_window_and_the_report_only(tmp_path, monkeypatch, caplog):
    @contextlib.contextmanager
    def full(path):
        with write_whole(path) as temporary:
            temporary.write_text("half")
            yield temporary
            raise OSError(28, "No space left on device")

    for module in (stop_report, windows):
        monkeypatch.setattr(module, "write_whole", full)
    stop = _stop()
    args = arguments(tmp_path, max_steps=12, save_strategy="steps", save_steps=4)
    trainer = train(args, stop)
    assert trainer.state.global_step == 12
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (12, 4, 8)
    ]
    assert caplog.text.count("poprisk_window.safetensors could not be written") == 1
    assert caplog.text.count("no report could be written") == 1
    assert not list(tmp_path.rglob("*poprisk*"))


class _TooLarge(TinyModel):
    """Runs out of memory above a batch size, after a step."""

    def __init__(self, fits):
        super().__init__()
        self.fits, self.calls = fits, 0

    def forward(self, x, labels=None):
        self.calls += 1
        if len(x) > self.fits and self.calls % 3 == 0:
            raise RuntimeError("CUDA out of memory. (made up)")
        return super().forward(x, labels)


def test_the_batch_size_that_is_found_counts(tmp_path, caplog):
    """From 12 on: 10, 9. Each attempt starts afresh, with the sizes that it has."""
    options = {
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 2,
        "optim_args": "alpha=finite",
    }
    args = arguments(tmp_path, max_steps=40, save_strategy="steps", save_steps=20, **options)
    stop = _stop(action="monitor")
    trainer = train(args, stop, model=_TooLarge(fits=9), train_dataset=dataset(96))
    found = trainer._train_batch_size
    assert found in (6, 9)  # older versions of accelerate halve it
    groups = trainer.optimizer.param_groups
    assert {g["batch_size"] for g in groups} == {2 * found}
    assert {g["dataset_size"] for g in groups} == {96}
    assert {g["collect_stats_every"] for g in groups} == {0}
    # 96 examples are 11 batches of 9, drawn in 6 steps; the first attempts count for nothing.
    batches, steps = {9: (11, 6), 6: (16, 8)}[found]
    assert [row["step"] for row in stop.history] == [8, 16, 24, 32, 40]
    assert stop.progress_state["batches"] == 40 // steps * batches + 40 % steps * 2
    report = _report(tmp_path)
    assert (report["setup"]["batch_size"], report["setup"]["epoch_steps"]) == (found, steps)
    # Resumed, the found size is the configured one for nobody.
    again = _stop(action="monitor")
    caplog.clear()
    resumed = train(
        arguments(tmp_path / "resumed", max_steps=44, **options),
        again,
        model=_TooLarge(fits=9),
        train_dataset=dataset(96),
        resume=str(tmp_path / "checkpoint-40"),
    )
    assert "afresh" not in caplog.text
    assert {g["batch_size"] for g in resumed.optimizer.param_groups} == {2 * found}


def test_a_checkpoint_brings_no_batch_size_along(tmp_path):
    """alpha=finite again: 8 examples a step before, 4 now."""
    saving = {"save_strategy": "steps", "save_steps": 4, "optim_args": "alpha=finite"}
    train(arguments(tmp_path, max_steps=4, **saving))
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=4, **saving)
    trainer = train(args, resume=str(tmp_path / "checkpoint-4"))
    # Up to 5.1 Trainer itself goes on with 8.
    assert {g["batch_size"] for g in trainer.optimizer.param_groups} == {trainer._train_batch_size}


@pytest.mark.parametrize("given", ["optim_args", "optimizers"])
def test_a_batch_size_of_the_users_own_is_kept(tmp_path, given):
    """Of an environment where a step stands for more examples than the loader shows."""
    model, options = TinyModel(), {}
    if given == "optimizers":
        own = PopRiskAdamW(model.parameters(), alpha="finite", batch_size=20, dataset_size=640)
        options = {"optimizers": (own, None)}
        args = arguments(tmp_path, max_steps=3, optim="adamw_torch")
    else:
        args = arguments(tmp_path, max_steps=3, optim_args="alpha=finite,batch_size=20")
    trainer = train(args, model=model, **options)
    assert {g["batch_size"] for g in trainer.optimizer.param_groups} == {20}


class _Adds(TrainerCallback):
    """Adds a callback in the middle of a run, as some frameworks do."""

    def __init__(self, callback):
        self.callback = callback

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.trainer.add_callback(self.callback)


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_that_is_added_to_a_running_run(tmp_path, kind):
    """Trainer's save would fail on it, and the callback would know no optimizer."""
    adds = _Adds(KINDS[kind]())
    args = arguments(tmp_path, max_steps=20, save_strategy="steps", save_steps=5)
    trainer = Trainer(TinyModel(), args, train_dataset=dataset(), callbacks=[adds])
    adds.trainer = trainer
    trainer.train()
    assert trainer.state.global_step == 20
    assert (tmp_path / "checkpoint-20" / "trainer_state.json").is_file()
    if kind == "stop":
        assert [row["step"] for row in adds.callback.history] == [12, 20]
    if kind == "monitor":
        assert "poprisk/embed/open_fraction" in trainer.state.log_history[-2]


class _Clip(TrainerCallback):
    """Changes the limit of the gradients' norm under way."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        args.max_grad_norm = 0.05


@pytest.mark.skipif(
    not hasattr(Trainer, "_clip_grad_norm"), reason="transformers < 5.3 tells nobody the norm"
)
def test_a_limit_that_changes_under_way_is_undone(tmp_path):
    histories = []
    for name, limit in (("plain", 0.0), ("changed", 1.0)):
        stop = _stop(action="monitor")
        callbacks = (_Clip(), stop) if limit else (stop,)
        options = {"optim": "sgd", "learning_rate": 0.0, "max_grad_norm": limit}
        train(arguments(tmp_path / name, **options), *callbacks)
        histories.append(stop.history)
    for mine, theirs in zip(*histories, strict=True):
        assert mine["noise"] == pytest.approx(theirs["noise"], rel=1e-4)


@needs_v5
def test_a_checkpoint_of_an_older_version_goes_on(tmp_path):
    """It counted steps, not micro-batches."""
    saving = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    stop = _stop(action="monitor", window=4)
    train(arguments(tmp_path, max_steps=8, **saving), stop)
    path = shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "old" / "checkpoint-4")
    state = json.loads((path / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["PopRiskEarlyStoppingCallback"]["attributes"]
    for key in ("batches", "pass_batches"):
        del kept["progress_state"][key]
    kept["progress_state"]["passes"] = 0
    (path / "trainer_state.json").write_text(json.dumps(state))
    old = _stop(action="monitor", window=4)
    train(arguments(tmp_path / "out", max_steps=8, **saving), old, resume=str(path))
    assert old.progress_state == stop.progress_state
