"""What is ours in Trainer's checkpoints: which is whole, which is best, numbers and tensors."""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from poprisk_integrations._files import write_whole
from poprisk_integrations.huggingface.run_facts import Moment, checkpoint_path

__all__ = [
    "BestCheckpoint",
    "check_restore",
    "forget_best",
    "keep_best_path",
    "last_whole_checkpoint",
    "load_state",
    "mark_best",
    "read_saved",
    "save_state",
]

_NAME = re.compile(r"checkpoint-(\d+)")
_TENSOR = "tensor"

logger = logging.getLogger(__name__)


def last_whole_checkpoint(
    output_dir: str | os.PathLike[str], also: Sequence[str] = ()
) -> str | None:
    """Directory of the newest `checkpoint-N` of a run that no kill has left half-written.

    Trainer writes a checkpoint file by file under its final name, `trainer_state.json` last, and
    our callbacks add theirs after that. `resume_from_checkpoint=True` takes the newest directory
    whatever is in it: it fails on a missing or cut file, and resumes without the unfinished window
    if only that is missing. What is looked at is cheap, and nothing is unpickled: text is parsed,
    and of files with weights and states the end must be there.

    Args:
        output_dir: The run's; may be missing.
        also: Names of further files that a checkpoint must have.

    Returns:
        For `trainer.train(resume_from_checkpoint=...)`: None, to start afresh, if there is none.

    Example:
        >>> last_whole_checkpoint("no/run/yet") is None
        True
    """
    for path in _newest_first(Path(output_dir)):
        problem = _what_is_missing(path, also)
        if problem is None:
            return str(path)
        logger.warning("%s is not whole (%s): looking for an older one.", path, problem)
    return None


def _newest_first(directory: Path) -> list[Path]:
    found = directory.glob("checkpoint-*") if directory.is_dir() else ()
    steps = {int(m.group(1)): path for path in found if (m := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True) if steps[step].is_dir()]


def _what_is_missing(checkpoint: Path, also: Sequence[str]) -> str | None:
    """The first thing wrong with a checkpoint; None if it is whole."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        try:
            _check_end(path)
        except (OSError, ValueError, SafetensorError):
            return f"{path.name} is cut off"
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        needed = [*_window_files(state), *also]
    except FileNotFoundError:
        return f"no {TRAINER_STATE_NAME}"
    except (TypeError, KeyError, AttributeError):
        return f"{TRAINER_STATE_NAME} is none of Trainer"
    return next((f"no {name}" for name in needed if not (checkpoint / name).is_file()), None)


def _check_end(path: Path) -> None:
    """Raise if a file of a known format is cut off."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass  # it compares the size with that in the header
    elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(1) != b"\x80":  # the format before archives, whose end is not marked
                raise ValueError(path)


def _window_files(state: dict[str, Any]) -> Iterator[str]:
    """Files that our callbacks have written, by their own account."""
    for exported in state["stateful_callbacks"].values():
        for entry in exported if isinstance(exported, list) else [exported]:
            progress = entry.get("attributes", {}).get("progress_state") or {}
            if progress.get("window_file"):
                yield progress["window_file"]


def save_state(state: dict[str, Any], directory: str, step: int, name: str) -> None:
    """Write tensors, numbers, strings and None, in dicts with string keys and in lists.

    Tensors go to a safetensors file, all else to its metadata. The file is whole or absent.
    """
    tensors: dict[str, Tensor] = {}

    def place_of(value: Any) -> dict[str, str]:  # of what JSON does not know
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}

    metadata = {"step": str(step), "state": json.dumps(state, default=place_of)}
    with write_whole(os.path.join(directory, name)) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)


def load_state(directory: str, step: int, name: str) -> dict[str, Any] | None:
    """What was saved at this step; None if nothing was. A damaged file is a ValueError."""

    def unpacked(file: Any, metadata: dict[str, str]) -> dict[str, Any]:
        def tensor_or_dict(found: dict[str, Any]) -> Any:
            return file.get_tensor(found[_TENSOR]) if found.keys() == {_TENSOR} else found

        state: dict[str, Any] = json.loads(metadata["state"], object_hook=tensor_or_dict)
        return state

    without = "the losses are then recorded afresh"
    found: dict[str, Any] | None = read_saved(directory, step, name, unpacked, without)
    return found


def read_saved(directory: str, step: int, name: str, read: Callable[..., Any], without: str) -> Any:
    """What `read` makes of a safetensors file and its metadata; None if there is none of this step.

    Raises ValueError if the file is damaged; `without` says what a run does that has none.
    """
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return read(file, metadata) if metadata.get("step") == str(step) else None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path!r} is damaged ({' '.join(str(error).split())}). Resume from another "
            f"checkpoint, or delete the file: {without}."
        ) from error


def check_restore(restore: str | None, args: TrainingArguments) -> None:
    """Raise ValueError for restore="onset" where Trainer would not keep or load its checkpoint."""
    if restore != "onset":
        return
    if _evaluation_decides(args):
        raise ValueError(
            "Invalid restore: 'onset'. Here evaluation picks the best checkpoint "
            f"(metric_for_best_model={args.metric_for_best_model!r}); set eval_strategy='no', or "
            "restore=None."
        )
    if not (args.load_best_model_at_end and _value(args.save_strategy) == "best"):
        raise ValueError(
            "Invalid restore: 'onset'. It needs TrainingArguments(save_strategy='best', "
            "load_best_model_at_end=True), found "
            f"save_strategy={_value(args.save_strategy)!r}, "
            f"load_best_model_at_end={args.load_best_model_at_end}."
        )


def mark_best(now: Moment) -> None:
    """Have Trainer save this step's checkpoint and, unless evaluation decides, call it the best.

    Does nothing where the user switched saving off. `best_metric` stays as it is: Trainer compares
    it with its own metrics, and so would a resumed run.
    """
    if _value(now.args.save_strategy) == "no":
        return
    now.control.should_save = True
    if not _evaluation_decides(now.args):
        now.state.best_global_step = now.state.global_step


def keep_best_path(now: Moment) -> None:
    """After a save: `best_model_checkpoint`, which transformers <= 5.3 leaves out here."""
    path = checkpoint_path(now.args, now.state)
    if now.state.best_global_step == now.state.global_step and os.path.isdir(path):
        now.state.best_model_checkpoint = path


def forget_best(now: Moment) -> None:
    """Take the mark back."""
    if not _evaluation_decides(now.args):
        now.state.best_global_step = None
        now.state.best_model_checkpoint = None


class BestCheckpoint:
    """The checkpoint of the best window so far: at most one save per epoch is ours."""

    def __init__(self, args: TrainingArguments) -> None:
        self._args = args
        self._loads = bool(args.load_best_model_at_end)
        self._own: str | None = None  # saved for nobody but us
        self._asked_at: int | None = None
        self._last_epoch = -1.0

    @property
    def is_possible(self) -> bool:
        """Whether a checkpoint can be saved, marked as the best, and loaded at the end."""
        args = self._args
        is_sharded = bool(args.fsdp) or args.deepspeed is not None
        is_saved = _value(args.save_strategy) != "no" and not (is_sharded and args.save_only_model)
        return is_saved and not _evaluation_decides(args)

    def have_it_loaded(self) -> None:
        """Have Trainer load the best checkpoint at the end of this run, until `close`."""
        self._args.load_best_model_at_end = True

    def keep(self, now: Moment) -> None:
        """Have this step saved and called the best, unless an epoch has had its save."""
        epoch = float(now.state.epoch or 0.0)
        if epoch - self._last_epoch < 1 - 1e-6:
            return
        self._last_epoch = epoch
        # With save_strategy="epoch" Trainer saves right after this hook, where an epoch ends.
        is_saved_later = (
            _value(self._args.save_strategy) == "epoch"
            and epoch > 0
            and abs(epoch - round(epoch)) < 1e-6
        )
        is_saved_anyway = now.control.should_save or is_saved_later
        self._asked_at = None if is_saved_anyway else now.state.global_step
        mark_best(now)
        now.control.should_save &= not is_saved_later

    def saved(self, now: Moment) -> None:
        """After a save: the one before of ours is not needed any more."""
        keep_best_path(now)
        path = checkpoint_path(now.args, now.state)
        if self._asked_at != now.state.global_step:
            if self._own == path:  # saved once more, for the user
                self._own = None
            return
        self._asked_at = None
        older, self._own = self._own, path
        if older is not None and older != path and now.args.should_save:
            shutil.rmtree(older, ignore_errors=True)

    def close(self) -> None:
        """Leave the arguments as they were."""
        self._args.load_best_model_at_end = self._loads

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"own": self._own, "last_epoch": self._last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self._own, self._last_epoch = state["own"], state["last_epoch"]


def _evaluation_decides(args: TrainingArguments) -> bool:
    return _value(args.eval_strategy) != "no" and args.metric_for_best_model is not None


def _value(strategy: object) -> str:
    return str(getattr(strategy, "value", strategy))
