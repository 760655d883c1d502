"""What Hugging Face's Trainer, TRL's included, writes about a run as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.curve import Curve
from poprisk_integrations.cli.report.plain_text import floating, number, plain
from poprisk_integrations.cli.report.read_json import read_json

__all__ = ["TrainerLog", "read_trainer_state"]

_SETTINGS = (
    "max_steps",
    "num_train_epochs",
    "train_batch_size",
    "logging_steps",
    "eval_steps",
    "save_steps",
)
_STOP = "PopRiskEarlyStoppingCallback"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerLog:
    """A parsed `trainer_state.json`.

    Attributes:
        path: Of the file.
        curves: Logged name -> curve.
        totals: Numbers of the whole run, as `train_runtime`; only once it has ended.
        settings: Those of the trainer, and of this package's callbacks as "callback.argument".
        last_step: Optimizer steps so far.
        planned_steps: Optimizer steps that were planned.
        stop: What `poprisk_stop.json` would say by now; None without an early-stopping callback.
    """

    path: Path
    curves: dict[str, Curve]
    totals: dict[str, float]
    settings: dict[str, str]
    last_step: int | None
    planned_steps: int | None
    stop: dict[str, Any] | None


def read_trainer_state(paths: Sequence[Path]) -> TrainerLog | None:
    """The state that is further on; None if there is none.

    Args:
        paths: That of the run, of its newest checkpoint, or both.

    Raises:
        UsageError: If one is not a trainer's state, or not whole.
    """
    states = [_load(path) for path in paths]
    if not states:
        return None
    path, state = max(
        zip(paths, states, strict=True), key=lambda pair: number(pair[1].get("global_step")) or 0
    )  # the first, the run's own, where both are equal
    rows = state["log_history"]
    last, planned = number(state.get("global_step")), number(state.get("max_steps"))
    return TrainerLog(
        path=path,
        curves=_curves(rows),
        totals=_totals(rows),
        settings=_settings(state),
        last_step=None if last is None else int(last),
        planned_steps=int(planned) if planned is not None and planned > 0 else None,
        stop=_stop(state),
    )


def _load(path: Path) -> dict[str, Any]:
    state = read_json(path)
    rows = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(
            f"Invalid run_dir: {str(path)!r} is not of Hugging Face's Trainer: no log_history."
        )
    found: dict[str, Any] = state
    return found


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is None:
            continue
        for name, value in row.items():
            found = None if name == "step" or _is_total(name, row) else floating(value)
            if found is not None:
                points.setdefault(name, {})[step] = found
    return {name: Curve.of(values) for name, values in points.items()}


def _is_total(name: str, row: Mapping[str, Any]) -> bool:
    """Trainer's last line is of the whole run: its `train_loss` is a mean over all steps."""
    return "train_runtime" in row and (name.startswith("train_") or name == "total_flos")


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for row in rows:
        for name, value in row.items():
            total = number(value) if _is_total(name, row) else None
            if total is not None:
                found[name] = total
    return found


def _settings(state: Mapping[str, Any]) -> dict[str, str]:
    found = {name: plain(state[name]) for name in _SETTINGS if state.get(name) is not None}
    for callback, content in _callbacks(state):
        args = content.get("args")
        if callback.startswith("PopRisk") and isinstance(args, dict):
            found |= {f"{callback}.{name}": plain(value) for name, value in args.items()}
    return found


def _callbacks(state: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Trainer keeps a list where there are several of a kind."""
    found = state.get("stateful_callbacks")
    pairs = []
    for name, content in found.items() if isinstance(found, dict) else ():
        for one in content if isinstance(content, list) else [content]:
            if isinstance(one, dict):
                pairs.append((plain(name), one))
    return pairs


def _stop(state: Mapping[str, Any]) -> dict[str, Any] | None:
    for name, content in _callbacks(state):
        attributes, args = content.get("attributes"), content.get("args")
        if name != _STOP or not isinstance(attributes, dict):
            continue
        rule, progress = attributes.get("rule_state"), attributes.get("progress_state")
        if isinstance(rule, dict) and isinstance(progress, dict):
            rows = progress.get("history")
            args = args if isinstance(args, dict) else {}
            return {
                **rule,
                "stopped": rule.get("stop_step") is not None and args.get("action") == "stop",
                "best_model_checkpoint": state.get("best_model_checkpoint"),
                "settings": args,
                "history": [row for row in rows if isinstance(row, dict) and "step" in row]
                if isinstance(rows, list)
                else [],
            }
    return None
