"""The checkpoint of the onset: saved by the trainer, loaded back when `fit` ends."""

import os

import fsspec
import torch

from poprisk_integrations.lightning._upstream import LightningModule, Trainer

__all__ = ["check_onset_checkpoint", "load_weights_back", "onset_path"]


def onset_path(trainer: Trainer, step: int) -> str:
    """Where to save: ModelCheckpoint's directory if there is one, else `default_root_dir`.

    Args:
        trainer: Fitting, so that ModelCheckpoint has chosen its directory.
        step: Optimizer step of the onset.
    """
    directory = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return os.path.join(str(directory), f"poprisk-onset-step={step}.ckpt")


def check_onset_checkpoint(trainer: Trainer, onset_step: int | None, path: str) -> None:
    """Before training: can the checkpoint be written, and if it should exist, does it?

    Args:
        trainer: Fitting.
        onset_step: Step of an onset that is past, on resume.
        path: Its checkpoint, or "".

    Raises:
        FileNotFoundError: If the resumed run's onset was not kept, or its checkpoint is gone.
        OSError: If the directory cannot be written.
    """
    if onset_step is not None and not (path and fsspec.core.url_to_fs(path)[0].exists(path)):
        raise FileNotFoundError(
            f"Invalid restore: 'onset'. The onset was at step {onset_step}, before this resume, "
            f"and its checkpoint {path!r} does not exist. Put it there, or use restore='stop'."
        )
    directory = os.path.dirname(onset_path(trainer, 0))
    if "://" not in directory:
        os.makedirs(directory, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(f"Cannot write the onset's checkpoint to {directory!r}.")


def load_weights_back(pl_module: LightningModule, path: str) -> None:
    """Load a checkpoint's weights into the module, nothing else.

    Args:
        pl_module: The module, on any device.
        path: A checkpoint of this module.

    Raises:
        RuntimeError: If it cannot be read safely; the module is then unchanged.
    """
    try:
        with fsspec.open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RuntimeError(
            f"The weights of the onset could not be loaded back from {path} ({error}). The module "
            "holds the weights of the last step."
        ) from error
    pl_module.on_load_checkpoint(checkpoint)
    pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
