"""The run's best checkpoint without an eval set, through Trainer's own best-model machinery."""

import os

from transformers import TrainerControl, TrainerState, TrainingArguments

from poprisk_integrations.huggingface.run_facts import checkpoint_path

__all__ = ["check_restore", "forget_best", "keep_best_path", "mark_best"]


def check_restore(restore: str | None, args: TrainingArguments) -> None:
    """Refuse settings under which the onset's checkpoint could not be kept or loaded.

    Args:
        restore: "stop", "onset" or None.
        args: Training arguments.

    Raises:
        ValueError: If `restore` is "onset" and Trainer would not restore it.
    """
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


def mark_best(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
    """Have Trainer save this step's checkpoint and, unless evaluation decides, call it the best.

    Does nothing where the user switched saving off. `best_metric` stays as it is: Trainer compares
    it with its own metrics, and so would a resumed run.

    Args:
        args: Training arguments.
        state: Trainer's state.
        control: Trainer's control.
    """
    if _value(args.save_strategy) == "no":
        return
    control.should_save = True
    if not _evaluation_decides(args):
        state.best_global_step = state.global_step


def keep_best_path(args: TrainingArguments, state: TrainerState) -> None:
    """After a save: `best_model_checkpoint`, which transformers <= 5.3 leaves out here."""
    path = checkpoint_path(args, state)
    if state.best_global_step == state.global_step and os.path.isdir(path):
        state.best_model_checkpoint = path


def forget_best(args: TrainingArguments, state: TrainerState) -> None:
    """Take the mark back."""
    if not _evaluation_decides(args):
        state.best_global_step = None
        state.best_model_checkpoint = None


def _evaluation_decides(args: TrainingArguments) -> bool:
    return _value(args.eval_strategy) != "no" and args.metric_for_best_model is not None


def _value(strategy: object) -> str:
    return str(getattr(strategy, "value", strategy))
