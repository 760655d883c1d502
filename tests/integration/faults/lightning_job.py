"""A Lightning trainer with PopRiskAdamW and the stop: checkpoints every seventh step.

But none at the end of an epoch (eight steps): Lightning 2.6.6 forgets a loader's position in a run
that was resumed there and is then resumed within the next epoch, without any code of ours.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.integration.lightning import toy
from tests.integration.lightning.test_resume import data, optimizer_state

__all__ = ["broken_own_files", "half_written", "run"]


class _Checkpoints(ModelCheckpoint):
    events: Any

    def _should_skip_saving_checkpoint(self, trainer: Any) -> bool:
        is_epoch_end = trainer.global_step % toy.STEPS_PER_EPOCH == 0
        return is_epoch_end or super()._should_skip_saving_checkpoint(trainer)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        self.events.say("saving", trainer.global_step)
        super()._save_checkpoint(trainer, filepath)
        if Path(filepath).name.startswith("last"):  # a later life's is last-v1, and so on
            self.events.say("saved", trainer.global_step)


class _Tells(Callback):
    def __init__(self, events: Any) -> None:
        self.events = events

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.events.say("began", trainer.global_step)


def run(folder: Path, events: Any, max_steps: int | None) -> None:
    """Train to the stop (or `max_steps`), from `last.ckpt` if there is one."""
    # here, in the fork, for pytest imports this module too
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    stop = PopRiskEarlyStopping(criterion="signal", window=8)
    checkpoints = _Checkpoints(folder / "out", every_n_train_steps=7, save_last=True)
    checkpoints.events = events
    model = toy.Classifier(toy.gated)
    trainer = toy.trainer(
        folder,
        [stop, checkpoints, _Tells(events)],
        enable_checkpointing=True,
        max_epochs=30,
        max_steps=max_steps or -1,
    )
    trainer.fit(model, data(), ckpt_path="last")
    result = {
        "weights": model.state_dict(),
        "optimizer": optimizer_state(trainer)["state"],
        "stop": stop.state_dict(),
        "step": trainer.global_step,
    }
    for name in ("onset_path", "stop_path", "setup"):
        result["stop"].pop(name, None)  # the folder's name
    torch.save(result, folder / "final.tmp")
    os.replace(folder / "final.tmp", folder / "final.pt")


def half_written(folder: Path) -> tuple[int, int]:
    """(half-written checkpoints under their final name, 1 if "last" is one of them)."""
    half = [path for path in (folder / "out").glob("*.ckpt") if not _loads(path)]
    return len(half), int(any(path.name.startswith("last") for path in half))


def broken_own_files(folder: Path) -> list[str]:
    """Files of ours that are not whole under their final name."""
    broken = []
    for path in folder.rglob("poprisk_stop.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            broken.append(f"{path}: {error}")
    return broken


def _loads(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True
