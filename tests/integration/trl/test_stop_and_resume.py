"""The stop ends a DPO run; a resumed run is the uninterrupted one, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback
from poprisk_integrations.optim import PopRiskAdamW
from poprisk_integrations.trl import PopRiskDPOConfig, PopRiskDPOTrainer
from tests.helpers.tiny_dpo import config_options, pairs, tiny_model, tiny_tokenizer

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def build(
    output_dir: Path, callbacks: list[Any] | None = None, count: int = 16, **options: Any
) -> Any:
    return PopRiskDPOTrainer(
        tiny_model(),
        ref_model=tiny_model(),
        args=PopRiskDPOConfig(**config_options(output_dir, **options)),
        train_dataset=pairs(count),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )


def stops(trainer: Any) -> list[PopRiskEarlyStoppingCallback]:
    callbacks = trainer.callback_handler.callbacks
    return [c for c in callbacks if isinstance(c, PopRiskEarlyStoppingCallback)]


def window_steps(output_dir: Path) -> int:
    """What the run used, whatever the callback was told."""
    steps: int = json.loads((output_dir / "poprisk_stop.json").read_text())["window_steps"]
    return steps


def test_optimizer_and_stop_by_default(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=16)
    assert len(stops(trainer)) == 1
    trainer.train()
    assert window_steps(tmp_path) == 8  # a third of an epoch of 4 steps, at least 8
    assert type(trainer.optimizer.optimizer) is PopRiskAdamW


def test_auto_window_counts_optimizer_steps(tmp_path: Path) -> None:
    # 60 micro-batches, 30 optimizer steps in an epoch, a third of them in a window.
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    for window, expected in (("auto", 10), (7, 7)):
        build(tmp_path, count=60, stop_window=window, max_steps=1, **options).train()
        assert window_steps(tmp_path) == expected


def test_stop_off_and_stop_given(tmp_path: Path) -> None:
    assert stops(build(tmp_path, stop=False)) == []
    given = PopRiskEarlyStoppingCallback(window=5)
    assert stops(build(tmp_path, callbacks=[given])) == [given]


def test_stop_ends_the_run_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = build(
        tmp_path, max_steps=200, learning_rate=3e-3, stop_window=4, stop_kappa=1.0,
        save_strategy="steps", save_steps=500, optim="adamw_torch", logging_steps=100,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 200
    report = json.loads((tmp_path / "poprisk_stop.json").read_text())
    assert report["stopped"]
    assert report["stop_step"] == trainer.state.global_step
    assert (tmp_path / f"checkpoint-{report['stop_step']}").is_dir()
    assert f"stopped at step {report['stop_step']}" in capsys.readouterr().err


class Interrupt:
    """Stands for a killed process: the run ends right after a checkpoint."""

    def __new__(cls, step: int) -> Any:
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step:
                    control.should_save = True
                    control.should_training_stop = True

        return Callback()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="poprisk_adamw"),
        pytest.param({"optim": "adamw_torch", "gradient_accumulation_steps": 2}, id="adamw_torch"),
    ],
)
def test_resume_is_bitwise(tmp_path: Path, options: dict[str, Any]) -> None:
    # The interruption falls inside an epoch of 4 steps (or 2) and inside a window of 4.
    options = {
        "max_steps": 18, "learning_rate": 3e-3, "stop_window": 4, "stop_action": "monitor",
        "save_strategy": "steps", "save_steps": 18, **options,
    }  # fmt: skip
    whole = build(tmp_path / "whole", **options)
    whole.train()
    cut = tmp_path / "cut"
    build(cut, callbacks=[Interrupt(7)], **options).train()
    assert not (cut / "checkpoint-18").exists()
    resumed = build(cut, **options)
    resumed.train(resume_from_checkpoint=str(cut / "checkpoint-7"))

    states = [stops(trainer)[0].stopping_state for trainer in (whole, resumed)]
    assert states[0] == states[1]
    assert states[0]["windows"] == 4
    last = [tmp_path / name / "checkpoint-18" for name in ("whole", "cut")]
    weights = [load_file(folder / "model.safetensors") for folder in last]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    optimizers = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in last]
    assert optimizers[0]["state"].keys() == optimizers[1]["state"].keys()
    for index, expected in optimizers[0]["state"].items():
        for key, value in expected.items():
            assert torch.equal(optimizers[1]["state"][index][key], value), (index, key)
    losses = [
        {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]
