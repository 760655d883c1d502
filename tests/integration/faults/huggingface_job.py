"""Trainer with `optim="poprisk_adamw"`, the stop and the monitor: a checkpoint every third step."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from poprisk_integrations.huggingface import (
    PopRiskEarlyStoppingCallback,
    PopRiskMonitorCallback,
    last_whole_checkpoint,
)
from poprisk_integrations.huggingface.callbacks.windows import WINDOW_FILE
from tests.helpers.tiny_trainer import TinyModel, arguments, dataset, weights

__all__ = ["broken_own_files", "half_written", "run"]


class _Tells(TrainerCallback):
    """The last callback: a checkpoint is whole when it hears of it."""

    def __init__(self, events: Any) -> None:
        self.events = events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.say("began", state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.say("saved", state.global_step)


class _Trainer(Trainer):
    events: Any

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.events.say("saving", self.state.global_step)
        super()._save_checkpoint(*args, **kwargs)


def run(folder: Path, events: Any, max_steps: int | None) -> None:
    """Train to the stop (or `max_steps`), from the newest whole checkpoint if there is one.

    A run whose checkpoint is that of the stop is over: Trainer would take one step more.
    """
    out = folder / "out"
    newest = last_whole_checkpoint(out)
    result = None if newest is None else _result_of_a_stopped_run(Path(newest))
    if result is not None:
        events.say("began", result["step"])
        events.say("over", result["step"])
    else:
        result = _train(out, events, max_steps, newest)
    torch.save(result, folder / "final.tmp")
    os.replace(folder / "final.tmp", folder / "final.pt")


def _train(out: Path, events: Any, max_steps: int | None, newest: str | None) -> dict[str, Any]:
    stop = PopRiskEarlyStoppingCallback(criterion="signal", window=8)
    trainer = _Trainer(
        model=TinyModel(),
        train_dataset=dataset(),
        args=arguments(
            out,
            num_train_epochs=16,
            max_steps=max_steps or -1,
            optim_args="alpha=0.02",  # open far enough for training time to pass
            save_strategy="steps",
            save_steps=3,
            save_total_limit=2,
        ),
        callbacks=[stop, PopRiskMonitorCallback(every_n_steps=5), _Tells(events)],
    )
    trainer.events = events
    trainer.train(resume_from_checkpoint=newest)
    return {
        "weights": weights(trainer.model),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "stop": stop.stopping_state,
        "history": stop.progress_state["history"],
        "step": trainer.state.global_step,
    }


def _result_of_a_stopped_run(checkpoint: Path) -> dict[str, Any] | None:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    numbers = state["stateful_callbacks"]["PopRiskEarlyStoppingCallback"]["attributes"]
    if numbers["rule_state"]["stop_step"] is None:
        return None
    return {
        "weights": load_file(checkpoint / "model.safetensors"),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"],
        "stop": numbers["rule_state"],
        "history": numbers["progress_state"]["history"],
        "step": state["global_step"],
    }


def half_written(folder: Path) -> tuple[int, int]:
    """(1 if the newest checkpoint is half-written, 1 if Trainer itself would resume from it)."""
    out = folder / "out"
    newest = get_last_checkpoint(str(out)) if out.is_dir() else None
    half = newest is not None and newest != last_whole_checkpoint(out)
    return int(half), int(half)


def broken_own_files(folder: Path) -> list[str]:
    """Files of ours that are not whole under their final name."""
    broken = []
    for path in [*folder.rglob(WINDOW_FILE), *folder.rglob("poprisk_stop.json")]:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                with safe_open(path, framework="pt") as file:
                    [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        except Exception as error:
            broken.append(f"{path}: {error}")
    return broken
