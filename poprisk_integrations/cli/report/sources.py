"""What the logs and the settings of a run say, one reader for each kind. Never a pickle."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import yaml

from poprisk_integrations.cli.clean import CLEAN_REPORT, CLEANING
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.report.cleaning import cleaning_of_json
from poprisk_integrations.cli.report.run import (
    Run,
    Stop,
    Suspects,
    curve_of,
    finite,
    floating,
    number,
    parse_key,
    plain,
    short,
)
from poprisk_integrations.core import diagnose, risk_trend

__all__ = ["load_run", "load_runs"]

STATE, CSV, STOP = "trainer_state.json", "metrics.csv", "poprisk_stop.json"
NOISE, FLIPS = "poprisk_noise.json", "flip_report.csv"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OTHER_TOOLS = {
    "events.out.tfevents": "TensorBoard",
    "wandb": "Weights & Biases",
    "mlruns": "MLflow",
    ".neptune": "Neptune",
    ".aim": "Aim",
}
# What windows measure, as it is logged; and what else of it is drawn.
_MEASURED = r"poprisk/(estimated_test_.*|signal_ratio|risk_decrease|agreement)"
_OF_WINDOWS = re.compile(rf"{_MEASURED}(_se)?|poprisk/train_.*")
_FLIP_COLUMNS = ("pair_id", "row", "probability_wrong", "margin", "action")
_TRAINER_SETTINGS = (
    "max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps",
    "save_steps",
)  # fmt: skip
_FILE_SETTINGS: dict[str, Sequence[str]] = {
    "config.json": (
        "model_type", "_name_or_path", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "vocab_size", "dtype", "torch_dtype",
    ),
    "adapter_config.json": (
        "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout",
        "target_modules",
    ),
    "hparams.yaml": (),  # all that is in it
    "README.md": ("base_model", "datasets", "library_name", "license", "model_name", "tags"),
}  # fmt: skip
_VERSIONS = ("transformers_version", "peft_version")
_BULLET = re.compile(r"[-*] ([^:]{1,60}?)(?:: | )(\S.*)")
_MOST_SETTINGS = 200  # of one file: aliases of YAML can multiply
_LONGEST_SETTING = 200  # characters


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Several runs, with names that differ; UsageError if one is given twice, or is no run."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("Invalid run_dir: one of them is given twice.")
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    for run, path in zip(runs, paths, strict=True):
        run.name = plain(path) if names.count(run.name) > 1 else run.name
    labels = [short(run.name) for run in runs]
    for place, (run, label) in enumerate(zip(runs, labels, strict=True), start=1):
        # Where names differ in their middles only, the places of the runs tell them apart.
        run.label = label if len({*labels}) == len(runs) else f"{place}: {label}"
    return runs


def load_run(path: Path) -> Run:
    """Read a run from its directory or one of its logs; UsageError in one line if it is bad."""
    directory, logs, notes = _find_logs(path)
    given = path if path.is_dir() else directory
    name = plain(given.name or given.resolve().name or given)
    run = Run(name=name, directory=directory, notes=notes)
    for log, files in logs.items():
        _READERS[log](run, *files)
    if not (run.curves or run.report or run.noise or run.suspects):
        _refuse(path, ". Its logs are empty so far.")
    if run.last_step is None:
        steps = [curve.index[-1] for curve in run.curves.values()]
        known = number((run.report or {}).get("global_step"))
        run.last_step = int(known) if known is not None else int(max(steps)) if steps else None
    _take_windows(run)
    if run.stop is not None and not any(".kappa" in name for name in run.settings):
        run.settings |= {f"stop: {plain(k)}": plain(v) for k, v in run.stop.settings.items()}
    _take_settings(run)
    return run


# Which files belong to a run, and how they are read.


def _find_logs(path: Path) -> tuple[Path, dict[str, list[Path]], list[str]]:
    """The run's directory, its logs by name, and what a reader should know of the choice.

    A directory without logs of its own may hold runs: the newest is taken. A log that is not in
    the run's directory and occurs once below `path` is taken too: Lightning's callbacks may write
    beside the checkpoints. Of several reports of a stop the newest counts.
    """
    if path.is_file():
        logs = {n: [path.parent / n] for n in _READERS if (path.parent / n).is_file()}
        logs[path.name if path.name in _READERS else STOP] = [path]
        return path.parent, logs, []
    if not path.is_dir():
        _refuse(path, ". There is no such directory.")
    found: dict[str, list[Path]] = {name: [] for name in _READERS}
    homes: dict[Path, Path] = {}  # the directory of its run for each log
    below = sorted(path.rglob("*"))
    for file in below:
        is_stop = file.name.startswith("poprisk_stop") and file.suffix == ".json"
        name = STOP if is_stop else file.name
        if name in _READERS:
            found[name].append(file)
            # What lies in a checkpoint, or where `poprisk clean` keeps what it finds, is of the run
            # around it, unless that directory was given.
            is_part = _CHECKPOINT.fullmatch(file.parent.name) or file.parent.name == CLEANING
            is_inside = file.parent != path and is_part
            homes[file] = file.parent.parent if is_inside else file.parent
    if not homes:
        names = {file.name for file in below}
        tools = [t for s, t in _OTHER_TOOLS.items() if any(name.startswith(s) for name in names)]
        unread = f" Logs of {' and '.join(tools)} cannot be read." if tools else ""
        _refuse(
            path,
            f". No {STOP} in it, nor {STATE} or {CSV}: the run had no callback of this package, or "
            f"has not written its logs yet.{unread}",
        )
    directory, notes = path, []
    if path not in homes.values():
        directory = homes[max(homes, key=_age)]
        others = len({homes[file] for file in found[STATE] + found[CSV]} - {directory})
        more = f"; {others} more are not shown." if others else "."
        notes = [f"This is {directory.relative_to(path)}, the newest run in the directory{more}"]
    logs = {}
    for name, files in found.items():
        own = [file for file in files if homes[file] == directory]
        if name == STATE:  # the run's own, and that of its newest checkpoint
            inside = sorted((f for f in own if f.parent != directory), key=_checkpoint_step)
            own = [file for file in own if file.parent == directory] + inside[-1:]
        elif name == STOP:  # beside checkpoints too, at any depth
            own = sorted((file for file in files if directory in file.parents), key=_age)[-1:]
        if own or len(files) == 1:
            logs[name] = own or files
    return directory, logs, notes


def _checkpoint_step(state: Path) -> int:
    return int(state.parent.name.rpartition("-")[2])


def _age(file: Path) -> float:
    return file.stat().st_mtime


def _refuse(path: Path, what: str) -> NoReturn:
    """End in one line that names a file, or the directory, and what is wrong with it."""
    raise UsageError(f"Invalid run_dir: {str(path)!r}{what}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        _refuse(path, " is not text.")
    except OSError as error:
        raise UsageError(f"Invalid run_dir: {one_line(error)}.") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        reason = f" ({error})" if path.stat().st_size else ": it is empty"
        _refuse(path, f" is not JSON{reason}. Half written? Try again.")


def _read_csv(
    path: Path, needed: Sequence[str], kind: str, notes: list[str] | None = None
) -> pd.DataFrame:
    """Cells as text. With `notes` a last line that is being written is left out, and noted."""
    # Not by pandas, which fills up a row with too few cells, and takes one with too many for a row
    # with a name.
    try:
        lines = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
        header, *records = [line for line in lines if line]
    except ValueError:
        _refuse(path, " is empty. Half written?")
    except csv.Error as error:
        _refuse(path, f" is not CSV ({error}).")
    for name in needed:
        if name not in header:
            _refuse(path, f" is not {kind}: no column {name!r}.")
    if notes is not None and records and len(records[-1]) < len(header):
        notes.append(f"The last line of {path.name} is not complete and was left out.")
        records.pop()
    for row, record in enumerate(records, start=2):
        if len(record) != len(header):
            _refuse(path, f", row {row}: {len(record)} values for {len(header)} columns.")
    frame = pd.DataFrame(records, columns=header, dtype=object)
    return frame.loc[:, ~frame.columns.duplicated(keep="last")]


def _numbers(texts: pd.Series) -> pd.Series:
    """NaN for what is no number."""
    return pd.to_numeric(texts, errors="coerce").astype(float)


# What runs log.


def _take_state(run: Run, *paths: Path) -> None:
    """What Hugging Face's Trainer, TRL's included, writes; of two states the one further on."""
    states = {}
    for path in paths:
        states[path] = _read_json(path)
        if _rows(states[path], "log_history") is None:
            _refuse(path, " is not of Hugging Face's Trainer: no log_history.")
    run.files.append(max(states, key=lambda path: number(states[path].get("global_step")) or 0))
    state = states[run.files[-1]]
    points: dict[str, dict[float, float]] = {}
    for row in state["log_history"]:
        step = number(row.pop("step", None))
        for name, value in row.items():
            found = floating(value)
            if found is None:
                continue
            # Trainer's last line is of the whole run: its `train_loss` is a mean over all steps.
            if "train_runtime" in row and (name.startswith("train_") or name == "total_flos"):
                run.totals[name] = found
            elif step is not None:
                points.setdefault(name, {})[step] = found
    run.curves = {name: curve_of(values) for name, values in points.items()}
    last, planned = number(state.get("global_step")), number(state.get("max_steps"))
    run.last_step = None if last is None else int(last)
    run.planned_steps = int(planned) if planned is not None and planned > 0 else None
    for name in _TRAINER_SETTINGS:
        if state.get(name) is not None:
            run.settings[f"trainer: {name}"] = plain(state[name])
    for name, content in _dict(state.get("stateful_callbacks")).items():
        for one in content if isinstance(content, list) else [content]:  # several of a kind
            if name.startswith("PopRisk") and isinstance(one, dict):
                _take_callback(run, plain(name), one, state)


def _take_callback(run: Run, name: str, content: dict[str, Any], state: dict[str, Any]) -> None:
    """A callback's arguments; and of the stop, what its report would say by now."""
    args, attributes = _dict(content.get("args")), _dict(content.get("attributes"))
    run.settings |= {f"trainer: {name}.{key}": plain(value) for key, value in args.items()}
    rule, progress = (attributes.get(f"{part}_state") for part in ("rule", "progress"))
    is_stop = name == "PopRiskEarlyStoppingCallback" and run.stop is None
    if not is_stop or not isinstance(rule, dict) or not isinstance(progress, dict):
        return
    rows = [row for row in _rows(progress, "history") or () if number(row.get("step"))]
    if risk_trend(rows) is not None:  # whose rule keeps its state elsewhere
        rule = {"reason": "the run has not written its report yet"}
    stopped = rule.get("stop_step") is not None and args.get("action") == "stop"
    best = state.get("best_model_checkpoint")
    more = {"stopped": stopped, "best_model_checkpoint": best, "settings": args, "history": rows}
    run.stop = _stop_of({**rule, **more})


def _take_metrics(run: Run, path: Path) -> None:
    """What Lightning's CSVLogger writes."""
    frame = _read_csv(path, ["step"], "of Lightning's CSVLogger", run.notes)
    steps = _numbers(frame.pop("step"))
    curves = {}
    for name, texts in frame.items():
        values = _numbers(texts)  # text is no point
        kept = np.isfinite(steps) & (values.notna() | texts.str.lower().eq("nan"))
        curves[str(name)] = curve_of(dict(zip(steps[kept], values[kept], strict=True)))
    for name, curve in curves.items():
        # Drop the -1 that Lightning's callbacks log for "none yet". Of C and U, which may be
        # negative, it is the standard error that says so.
        errors = curves.get(f"{name}_se", curve)
        if name.startswith("poprisk/") and len(errors) == len(curve):
            curve = curve[errors.to_numpy() != -1.0]
        if len(curve):
            run.curves.setdefault(name, curve)
    run.files.append(path)


def _take_stop(run: Run, path: Path) -> None:
    report = _read_json(path)
    rows = _rows(report, "history")
    if rows is None or "reason" not in report or None in [number(row.get("step")) for row in rows]:
        _refuse(path, " is not a report of a stop.")
    run.report, run.report_path, run.stop = report, path, _stop_of(report)
    run.files.append(path)


def _stop_of(report: dict[str, Any]) -> Stop:
    """From a report; the diagnosis is made anew, whoever wrote the report."""
    rows = report["history"]
    found = (report.get("settings"), report.get("setup"))
    settings = next((value for value in found if isinstance(value, dict)), {})
    names = ("stop_step", "best_step", "cooldown_step", "onset_step", "onset_at")
    steps = {name: number(report.get(name)) for name in names}
    threshold = number(settings.get("threshold")) or 1.0
    trend = risk_trend(rows)
    if trend is not None and steps["best_step"] is None:
        steps["best_step"] = trend.best_step
    if steps["onset_at"] is None:  # a report of an older version
        steps["onset_at"] = steps["onset_step"]
    numbers = [{name: number(value) for name, value in row.items()} for row in rows]
    windows = pd.DataFrame(numbers, dtype=float)
    if not windows.empty:
        ends = windows["step"]
        lengths = (
            ends.diff().fillna(ends) if trend is not None else windows.get("steps", 0.0 * ends)
        )
        windows.index = pd.Index(ends - lengths.fillna(0.0) / 2)
        windows = windows[~windows.index.duplicated(keep="last")].sort_index()
    return Stop(
        criterion="signal" if trend is None else "risk",
        reason=plain(report.get("reason", "")),
        stopped=report.get("stopped") is True,
        threshold=threshold,
        diagnosis=diagnose(rows, since=steps["onset_step"], threshold=threshold),
        best=plain(report.get("best_model_checkpoint") or report.get("best_model_path") or ""),
        settings=settings,
        windows=windows,
        **steps,
    )


def _take_windows(run: Run) -> None:
    """What the windows measured, in place of what was logged of it; else what was logged."""
    for name, curve in run.curves.items():
        base = parse_key(name).base
        if re.fullmatch(_MEASURED, base) and not base.endswith("_se"):
            values = finite(curve)  # each of which is repeated until the next window ends
            run.curves[name] = values[values != values.shift()]
    windows = pd.DataFrame() if run.stop is None else run.stop.windows.dropna(axis=1, how="all")
    measured = {f"poprisk/{column}": windows[column].dropna() for column in windows}
    measured = {name: curve for name, curve in measured.items() if _OF_WINDOWS.fullmatch(name)}
    # With its standard errors, which may not be in the report: they would not fit the new values.
    replaced = {*measured, *(f"{name}_se" for name in measured)}
    logged = {name: c for name, c in run.curves.items() if parse_key(name).base not in replaced}
    run.curves = logged | measured


def _take_noise(run: Run, path: Path) -> None:
    run.noise = _read_json(path)
    if not isinstance(run.noise, dict) or "rate" not in run.noise:
        _refuse(path, " is no estimate of a noise rate.")
    run.files.append(path)


def _take_flips(run: Run, *paths: Path) -> None:
    """A flip report, and a record of labels that were swapped on purpose beside it.

    Of two reports that one counts whose models had not seen the pairs.
    """
    path = max(paths, key=lambda path: path.with_name(CLEAN_REPORT).is_file())
    frame = _read_csv(path, _FLIP_COLUMNS, "a flip report")
    run.files.append(path)
    swapped = None
    if path.with_name("label_flips.json").is_file():
        run.files.append(path.with_name("label_flips.json"))
        swapped = _dict(_read_json(run.files[-1])).get("rows")
        if not isinstance(swapped, list):
            _refuse(run.files[-1], " is no record of swapped labels.")
    pairs = pd.DataFrame(index=frame.index)
    for name in ("probability_wrong", "margin"):  # NaN for an empty cell, and what is not finite
        values, texts = _numbers(frame[name]), frame[name]
        for text in texts[values.isna() & ~texts.str.lower().isin(["", "nan"])]:
            _refuse(path, f" is not a flip report: {text!r} is no number.")
        pairs[name] = values.where(np.isfinite(values))
    probability = pairs["probability_wrong"]
    for value in probability[(probability < 0) | (probability > 1)]:
        _refuse(path, f" is not a flip report: probability_wrong {value:g} is outside [0, 1].")
    pairs["swapped"] = frame["row"].isin(map(str, swapped or []))
    for name in ("pair_id", "row", "action", "prompt", "chosen", "rejected"):
        pairs[name] = frame[name].map(plain) if name in frame else ""
    ranked = pairs.dropna(subset="probability_wrong").sort_values("margin", kind="stable")
    calibrated = frame.get("calibrated", pd.Series(dtype=object)).str.lower()
    run.suspects = Suspects(
        pairs=ranked.sort_values("probability_wrong", ascending=False, kind="stable"),
        num_pairs=len(pairs),
        actions=pairs["action"].value_counts(sort=False).to_dict(),
        calibrated=not calibrated.isin(["false", "0"]).any(),
        num_swapped=None if swapped is None else len({str(row) for row in swapped}),
        directory=path.parent,
    )


def _take_cleaning(run: Run, path: Path) -> None:
    """What `poprisk clean` did, and its groups of pairs."""
    try:
        run.cleaning = cleaning_of_json(_read_json(path), run.noise)
    except ValueError as error:
        _refuse(path, f" is {error}.")
    run.files.append(path)
    run.noise = run.cleaning.noise
    if run.suspects is not None:
        run.suspects = replace(run.suspects, groups=run.cleaning.groups)


_READERS: dict[str, Callable[..., None]] = {  # in the order in which they are called
    STATE: _take_state,
    CSV: _take_metrics,
    STOP: _take_stop,
    NOISE: _take_noise,
    FLIPS: _take_flips,
    CLEAN_REPORT: _take_cleaning,
}

# Settings and versions from text files; `training_args.bin` is a pickle and is not opened.


def _take_settings(run: Run) -> None:
    for name, keys in _FILE_SETTINGS.items():
        path = run.directory / name
        if not path.is_file():
            continue
        run.files.append(path)
        if name == "hparams.yaml":
            tree = _yaml(run, name, _read_text(path))
            for key, value in islice(_flat(tree), _MOST_SETTINGS):
                _add(run, name, key, value)
            continue
        is_card = name == "README.md"
        content = _card(run, _read_text(path)) if is_card else _dict(_read_json(path))
        for key in keys:
            if content.get(key) not in (None, "", []):
                _add(run, name, key, content[key])
        for key in _VERSIONS:
            if content.get(key):
                run.versions[key.removesuffix("_version")] = plain(content[key])


def _add(run: Run, file: str, name: str, value: Any) -> None:
    text = plain(", ".join(map(str, value)) if isinstance(value, list) else value)
    is_long = len(text) > _LONGEST_SETTING
    run.settings[f"{file}: {plain(name)}"] = f"{text[:_LONGEST_SETTING]}…" if is_long else text


def _card(run: Run, text: str) -> dict[str, Any]:
    """Metadata of a model card; and the lists that Trainer and TRL write into it are taken."""
    for title, section in re.findall(r"^#+ (.*)\n((?:(?!#).*\n?)*)", text, re.MULTILINE):
        for bullet in filter(None, map(_BULLET.fullmatch, section.splitlines())):
            if title.strip().lower() == "framework versions":
                run.versions[plain(bullet[1]).lower()] = plain(bullet[2])
            elif title.strip().lower() == "training hyperparameters":
                _add(run, "README.md", bullet[1], bullet[2])
    metadata = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return _dict(_yaml(run, "README.md", metadata[1])) if metadata else {}


def _yaml(run: Run, name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)  # builds no Python objects
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = plain(one_line(error)[:150])
        run.notes.append(f"{name} was not read: not plain YAML ({reason}).")
        return {}


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names; lists that are long or nested as their length."""
    if isinstance(value, dict) and depth < 6:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, (dict, list)):
        is_list = isinstance(value, list) and len(value) <= 20
        is_simple = is_list and not any(isinstance(one, (dict, list)) for one in value)
        yield name, value if is_simple else f"{type(value).__name__} of {len(value)}"
    elif name:
        yield name, value


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rows(content: Any, name: str) -> list[dict[str, Any]] | None:
    """A list of objects in the content of a JSON file; None if it is something else."""
    rows = _dict(content).get(name)
    is_whole = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    return rows if is_whole else None
