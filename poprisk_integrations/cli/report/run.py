"""All that is known of one run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.curve import Curve
from poprisk_integrations.cli.report.key_names import Key, natural, parse_key
from poprisk_integrations.cli.report.labels import Suspects, read_noise, read_suspects
from poprisk_integrations.cli.report.metrics_csv import read_metrics_csv
from poprisk_integrations.cli.report.plain_text import plain
from poprisk_integrations.cli.report.run_files import CSV, FLIPS, NOISE, STATE, STOP, find_run
from poprisk_integrations.cli.report.settings import read_settings
from poprisk_integrations.cli.report.stop_file import StopRecord, load_report, stop_record
from poprisk_integrations.cli.report.trainer_state import TrainerLog, read_trainer_state

__all__ = ["Run", "load_run", "load_runs"]

LABEL_FLIPS = "label_flips.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        name: For people.
        directory: Where its logs are.
        curves: Logged name -> curve.
        totals: Numbers of the whole run.
        last_step: The last step of which anything is known.
        planned_steps: Optimizer steps that were planned; None if unknown.
        report: Content of `poprisk_stop.json`; None if there is none.
        report_path: Where it is.
        stop: The same, or what the trainer's state says while the run goes on.
        noise: Content of `poprisk_noise.json`.
        suspects: Of the flip report.
        settings: Name -> value.
        versions: Package -> version.
        files: Those that were read.
        notes: What a reader should know of the logs.
    """

    name: str
    directory: Path
    curves: dict[str, Curve]
    totals: dict[str, float]
    last_step: int | None
    planned_steps: int | None
    report: dict[str, Any] | None
    report_path: Path | None
    stop: StopRecord | None
    noise: dict[str, Any] | None
    suspects: Suspects | None
    settings: dict[str, str]
    versions: dict[str, str]
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    def family(self, base: str) -> list[tuple[Key, Curve]]:
        """All curves of a quantity: of each split, of all parameters and of groups, in order."""
        found = [(parse_key(name), curve) for name, curve in self.curves.items()]
        splits = ("train", "eval", "test")
        return sorted(
            ((key, curve) for key, curve in found if key.base == base),
            key=lambda pair: (
                splits.index(pair[0].split),
                natural(pair[0].group),
                pair[0].kind,
            ),
        )

    def last(self, base: str, split: str = "train") -> float | None:
        """The last value of a quantity, of all parameters."""
        curves = [c for k, c in self.family(base) if k.split == split and not k.group]
        return curves[-1].last() if curves else None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Several runs, with names that differ.

    Raises:
        UsageError: If a path holds no run, or is given twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise UsageError("Invalid run_dir: one of them is given twice.")
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    return [
        replace(run, name=plain(path)) if names.count(run.name) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


def load_run(path: Path) -> Run:
    """Read a run.

    Args:
        path: Its directory, or one of its logs.

    Raises:
        UsageError: If there is none, or one of its files is not what it should be.
    """
    files = find_run(path)
    state = read_trainer_state(files.logs.get(STATE, []))
    curves: dict[str, Curve] = {} if state is None else dict(state.curves)
    notes = list(files.notes)
    csv_path = files.first(CSV)
    if csv_path is not None:
        logged, unread = read_metrics_csv(csv_path)
        curves = {**logged, **curves}
        notes += unread
    report_path = files.first(STOP)
    report = None if report_path is None else load_report(report_path)
    noise_path, flips_path = files.first(NOISE), files.first(FLIPS)
    noise = None if noise_path is None else read_noise(noise_path)
    suspects = None
    swapped_path = None
    if flips_path is not None:
        swapped_path = flips_path.with_name(LABEL_FLIPS)
        swapped_path = swapped_path if swapped_path.is_file() else None
        suspects = read_suspects(flips_path, swapped_path)
    if not curves and not report and noise is None and suspects is None:
        raise UsageError(f"Invalid run_dir: {str(path)!r}. Its logs are empty so far.")
    texts = read_settings(files.directory)
    settings = {} if state is None else {f"trainer: {k}": v for k, v in state.settings.items()}
    stop = _stop(report, state)
    if stop is not None and not any(".kappa" in name for name in settings):  # not said yet
        settings |= {f"stop: {plain(k)}": plain(v) for k, v in stop.settings.items()}
    read = [state.path if state else None, csv_path, report_path, noise_path, flips_path]
    return Run(
        name=_name(path, files.directory),
        directory=files.directory,
        curves=curves,
        totals={} if state is None else state.totals,
        last_step=_last_step(state, report, curves),
        planned_steps=None if state is None else state.planned_steps,
        report=report,
        report_path=report_path,
        stop=stop,
        noise=noise,
        suspects=suspects,
        settings={**settings, **texts.settings},
        versions=texts.versions,
        files=tuple(p for p in [*read, swapped_path, *texts.files] if p is not None),
        notes=(*notes, *texts.notes),
    )


def _stop(report: dict[str, Any] | None, state: TrainerLog | None) -> StopRecord | None:
    source = report if report is not None or state is None else state.stop
    return None if source is None else stop_record(source)


def _last_step(
    state: TrainerLog | None, report: dict[str, Any] | None, curves: dict[str, Curve]
) -> int | None:
    if state is not None and state.last_step is not None:
        return state.last_step
    known = (report or {}).get("global_step")
    if isinstance(known, int) and not isinstance(known, bool):
        return known
    steps = [curve.steps[-1] for curve in curves.values() if curve.steps]
    return int(max(steps)) if steps and math.isfinite(max(steps)) else None


def _name(path: Path, directory: Path) -> str:
    """The last part of the path that was given; of "." what it stands for."""
    given = path if path.is_dir() else directory
    return plain(given.name or given.resolve().name or str(given))
