"""Runs and broken runs for `poprisk report`: what it says of each is under `tests/goldens/report`.

`python -m tests.integration.cli.report_cases` writes these files anew.
"""

import contextlib
import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from poprisk_integrations import __version__
from poprisk_integrations.cli.main import main
from tests.browser.made_up_run import write_dpo_run, write_lightning_run, write_stop
from tests.helpers.page_text import page_text

__all__ = [
    *("BROKEN", "EVIL", "GOLDENS", "RISK", "RUNS"),
    *("empty_directory", "refused", "risk_report", "said", "write"),
]

GOLDENS = Path(__file__).resolve().parents[2] / "goldens" / "report"
EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
Build = Callable[[Path], list[Path]]


def write(directory: Path, **files: Any) -> Path:
    """Write JSON, or text and bytes as they are; "__" in a name stands for the dot."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        if isinstance(content, (str, bytes)):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            path.write_text(json.dumps(content))
    return directory


def rows_of(*columns: str, values: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in values]


def csv_of(header: str, values: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header.split(), *values])
    return text.getvalue()


# Windows: the test loss has its minimum at step 20; F falls below 1 between steps 15 and 25.
RISK = rows_of(
    "step", "epoch", "train_loss", "estimated_test_loss", "estimated_test_loss_se",
    "estimated_test_loss_change_se", "estimated_gap", "signal_ratio",
    values=[(10, 1.0, 2.0, 2.0, 0.1, 0.02, 0.0, None), (20, 2.0, 0.9, 1.0, 0.1, 0.02, 0.1, None),
            (30, 3.0, 0.8, 1.2, 0.1, 0.02, 0.4, None), (40, 4.0, 0.7, 1.4, 0.1, 0.02, 0.7, None)],
)  # fmt: skip
SIGNAL = rows_of(
    "step", "steps", "signal_ratio", "signal_ratio_se", "risk_decrease", "agreement",
    "agreement_se", "lr_sum", "reused",
    values=[(10, 10, 4.0, 0.1, None, None, None, 10.0, True),
            (20, 10, 2.0, 0.1, 0.01, 0.2, 0.1, 20.0, True),
            (30, 10, 0.9, 0.1, -0.01, -0.2, 0.1, 30.0, True),
            (40, 10, 0.996, 0.083, 0.0, 0.1, 0.1, 40.0, True)],
)  # fmt: skip


def risk_report(**more: Any) -> dict[str, Any]:
    return {
        "criterion": "risk", "stopped": True, "global_step": 40, "stop_step": 40, "best_step": 20,
        "cooldown_step": None, "reason": "stopped at step 40: made up",
        "setup": {"examples": 100, "share": 0.15}, "settings": {"criterion": "auto"},
        "best_model_path": "C:\\out\\poprisk-best-step=20.ckpt", "history": RISK, **more,
    }  # fmt: skip


def signal_report(**more: Any) -> dict[str, Any]:
    return {
        "stopped": True, "global_step": 60, "stop_step": 60, "onset_step": 30, "onset_at": 22.5,
        "reason": "stopped at step 60: cost $1 and $2", "diagnosis": "what some version said",
        "settings": {"threshold": 1.0}, "history": SIGNAL, **more,
    }  # fmt: skip


def state_of(step: int, rows: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    rows = [{"step": step, "loss": float(step)}] if rows is None else rows
    return {"global_step": step, "max_steps": 100, "log_history": rows, **more}


def callback(args: dict[str, Any], reason: str, history: list[Any]) -> dict[str, Any]:
    rule = {"reason": reason, "stop_step": None, "onset_step": None}
    attributes = {"rule_state": rule, "progress_state": {"history": history}}
    one = {"args": args, "attributes": attributes}
    return {"PopRiskEarlyStoppingCallback": [one], "Other": {}, "Odd": None}


def _lightning(root: Path) -> list[Path]:
    """Logs and checkpoints apart, as Lightning leaves them."""
    write_lightning_run(root / "run" / "logs" / "version_0")
    (root / "run" / "checkpoints").mkdir()
    write_stop(root / "run" / "checkpoints")
    os.utime(root / "run" / "checkpoints" / "poprisk_stop.json", (1, 1))
    return [root / "run"]


def _risk(root: Path) -> list[Path]:
    """A cooldown, a metric beside the loss, and a validation set."""
    kinds = {"train": 0.9, "estimated_test": 0.7}
    more = {f"{kind}_reward_accuracy": value for kind, value in kinds.items()}
    more |= {"estimated_test_reward_accuracy_se": 0.01, "estimated_test_accuracy": 0.625}
    report = risk_report(
        cooldown_step=40, global_step=50, history=[{**row, **more} for row in RISK]
    )
    rows = rows_of("step", "loss", "eval_loss", values=[(10, 2.1, 2.2), (40, 0.6, 1.5)])
    state = state_of(50, rows, max_steps=200)
    return [write(root / "run", poprisk_stop__json=report, trainer_state__json=state)]


def _risk_logged(root: Path) -> list[Path]:
    """The run goes on: there are its logs only, which repeat a window's value."""
    header = (
        "step train_loss val_loss poprisk/estimated_test_loss poprisk/estimated_test_loss_se "
        "poprisk/estimated_gap poprisk/onset_step poprisk/predicted_stop_step"
    )
    rows = [
        (9, 2.0, 2.1, 2.0, 0.1, 0, -1, -1),
        (19, 1.0, 1.4, 1.5, 0.2, 0.5, 15, 60),
        (29, 0.9, 1.4, 1.5, 0.2, 0, 15, 60),
    ]
    return [write(root / "run", metrics__csv=csv_of(header, rows))]


def _checkpoints(root: Path) -> list[Path]:
    """Runs that have not ended: the state that is further on says why."""
    one = callback({"threshold": 0.5, "action": "stop"}, "armed at step 8: F = 2", SIGNAL[:2])
    write(root / "signal", trainer_state__json=state_of(9))
    write(root / "signal" / "checkpoint-9", trainer_state__json=state_of(9))
    state = state_of(30, stateful_callbacks=one)
    write(root / "signal" / "checkpoint-30", trainer_state__json=state)
    rows = [*RISK, {"step": "broken"}]
    two = callback({"criterion": "auto", "action": "stop"}, "no window is complete yet", rows)
    state = state_of(40, stateful_callbacks=two)
    return [root / "signal", write(root / "risk", trainer_state__json=state)]


def _criteria(root: Path) -> list[Path]:
    """One run by the test loss, one by F, and one by F of a version without middles."""
    old = [{k: v for k, v in row.items() if k != "steps"} for row in SIGNAL[:3]]
    reports = {
        "risk": risk_report(),
        "signal": signal_report(stopped=False),
        "old": signal_report(history=old, onset_at=None, settings=[1]),
    }
    return [write(root / name, poprisk_stop__json=report) for name, report in reports.items()]


def _labels(root: Path) -> list[Path]:
    """A ranking without probabilities beside probabilities; pairs with their texts."""
    header = "pair_id row probability_wrong margin step action prompt chosen rejected calibrated"
    ranked = [("a", 0, 0.6, -2.0, 3, "review", "", "", "", False),
              ("b", 1, 0.2, 1.0, 3, "keep", "", "", "", False)]  # fmt: skip
    sure = [("a", 0, 0.97, -2.0, 3, "swap", "Is it?", "<b>Yes", EVIL, True),
            ("b", 1, 0.2, 1.0, 3, "keep", "", "", "", True),
            ("c", 2, "", 0.0, 0, "not_judged", "", "", "", True)]  # fmt: skip
    unknown = {"rate": None, "low": 0.0, "high": 0.41, "num_pairs": 2, "loss": "off"}
    known = {"rate": 0.44, "low": 0.38, "high": 0.49, "num_pairs": 2, "rate_in_use": 0.35}
    runs = {
        "ranked": (ranked, unknown),
        "off": (sure, {**known, "loss": "off"}),
        "rdpo": (sure[:1], {**known, "loss": "rdpo", "method": "two-component fit"}),
        "none": (sure[:1], {"rate": None}),
    }
    return [
        write(root / name, flip_report__csv=csv_of(header, rows), poprisk_noise__json=noise)
        for name, (rows, noise) in runs.items()
    ]


def _cleaned(root: Path) -> list[Path]:
    """What `poprisk clean` leaves: the mean of the folds, a model trained anew, and no model."""
    header = "pair_id row probability_wrong margin step action calibrated"
    rows = [("a", 0, 0.97, -2.0, 1, "swap"), ("b", 1, 0.6, -0.5, 1, "drop"),
            ("c", 2, 0.2, 1.0, 1, "keep"), ("d", 3, 0.1, 1.5, 1, "keep")]  # fmt: skip
    one = {"pairs": 2, "suspects": 2, "mean": 0.785, "low": 0.3, "high": 0.97}
    record = {
        "folds": 3, "epochs": [3, 1, 2], "final": "mean", "num_pairs": 4, "dropped": [0, 1],
        "swapped": [], "expected_wrong": 0.15,
        "noise": {"rate": 0.4, "low": 0.3, "high": 0.5, "num_pairs": 4},
        "groups": {"length": [{"group": "-9 to -1", **one}, {"group": EVIL, **one, "mean": 0.15}]},
    }  # fmt: skip
    untold = {"rate": None, "low": 0.0, "high": 0.49, "num_pairs": 4}
    nothing = {"dropped": [], "expected_wrong": None, "noise": untold, "final": "none"}
    for name, calibrated, changes in (
        ("mean", True, {}),
        ("anew", True, {"final": "retrain", "dropped": [1], "swapped": [0]}),
        ("none", False, nothing),
    ):
        write(
            root / name / "cleaning",
            flip_report__csv=csv_of(header, [(*row, calibrated) for row in rows]),
            poprisk_clean__json={**record, **changes},
        )
    write(root / "mean" / "cleaning", label_flips__json={"rows": [0, 2], "num_pairs": 4})
    write(
        root / "anew",
        flip_report__csv=csv_of(header, [(*row, True) for row in rows[2:]]),
        poprisk_noise__json={"rate": 0.05, "low": 0.01, "high": 0.1, "num_pairs": 2},
        trainer_state__json=state_of(30, max_steps=30),
    )
    return [root / name for name in ("mean", "anew", "none")]


def _groups(root: Path) -> list[Path]:
    """A second callback and more groups than lines that can be told apart; a run with totals."""
    names = ("open_fraction", "closed_noise", "closed_zero_grad")
    rows = [
        {"step": step, "poprisk/signal_ratio": 2.0 / step, "poprisk/2/signal_ratio": 3.0 / step}
        | {f"poprisk/layer{g}/{n}": g / 40 / step for g in range(8) for n in names}
        for step in (1, 2, 3)
    ]
    write(root / "a run whose name is too long for a legend", trainer_state__json=state_of(3, rows))
    totals = [{**row, **{f"poprisk/{n}": 0.25 for n in names}} for row in rows]
    stop = {"reason": "x", "stop_step": 3, "history": []}
    write(root / "<b>bold", trainer_state__json=state_of(3, totals), poprisk_stop__json=stop)
    return [root / "a run whose name is too long for a legend", root / "<b>bold"]


def _many(root: Path) -> list[Path]:
    """More names than charts, several losses, epochs beside steps, and a long curve."""
    rows = [
        {"step": s, "train/loss_step": 1 / s, "val_loss_epoch": 2 / s, "eval_other_loss": 3 / s,
         "lr-a": 0.1, "lr-b": 0.2, "grad_2.0_norm_total": float(s), "constant": 3.0,
         "rewards/accuracies": 0.5, "train_samples_per_second": 3.0, "poprisk/new": s / 7,
         "poprisk/g/new": s / 9, **{f"name{k}": s * k for k in range(1, 22)}}
        for s in range(1, 1001)
    ]  # fmt: skip
    return [write(root / "run", trainer_state__json=state_of(1000, rows, max_steps=1000))]


def _odd(root: Path) -> list[Path]:
    """What is no number, what is no text of a page, what is half written, what would run."""
    rows = [
        {"step": 1, "loss": 2.0, "ok": True, "text": "a", "huge": 1e308, EVIL: 1.0},
        {"step": 2, "loss": float("nan"), "list": [1], "a\x00\x1b\ud800\u202e]]>-->": 2, EVIL: 2},
        {"step": "x", "loss": 3.0},
        {"step": 3, "loss": 1.0, "$x^{$ \\frac{ \U0001f600": 1, "huger": 10**400},
        {
            "step": 4,
            "loss": float("inf"),
            "$x^{$ \\frac{ \U0001f600": 2,
            "a\x00\x1b\ud800\u202e]]>-->": 1,
        },
    ]
    report = {
        "reason": ["x", EVIL], "onset_step": "4", "settings": {EVIL: 1}, "diagnosis": EVIL,
        "history": [{"step": 4, "signal_ratio": "2", "agreement": [1]},
                    {"step": 8, "signal_ratio": 1.5, "noise": float("nan")}],
    }  # fmt: skip
    return [
        write(
            root / "run",
            trainer_state__json={"log_history": rows},
            poprisk_stop__json=report,
            metrics__csv="step,acc,val_acc\n1,0.5,nan\n2,1.0,x\n3,0.5",
            hparams__yaml="x: !!python/object/apply:os.system ['touch built']\n",
            config__json={"model_type": EVIL, "transformers_version": "5.1.0"},
            adapter_config__json={"r": 8, "target_modules": ["q", "v"], "peft_version": "1"},
            README__md=f"## Framework versions\n\n- {EVIL}: {EVIL}\n",
        )
    ]


def _newest(root: Path) -> list[Path]:
    """A directory of runs, and names that are alike."""
    for place in ("x/run/b", "x/run/a", "y/run"):
        write_lightning_run(root / place)
        os.utime(root / place / "metrics.csv", (len(place), len(place)))
    os.utime(root / "x/run/a/metrics.csv", (99, 99))
    return [root / "x" / "run", root / "y" / "run"]


RUNS: dict[str, Build] = {
    "dpo": lambda root: [write_dpo_run(root / "gate", 200, 4)],
    "lightning": _lightning,
    "risk": _risk,
    "risk_logged": _risk_logged,
    "checkpoints": _checkpoints,
    "criteria": _criteria,
    "labels": _labels,
    "cleaned": _cleaned,
    "groups": _groups,
    "many": _many,
    "odd": _odd,
    "newest": _newest,
}


def said(name: str) -> tuple[str, str]:
    """What `poprisk report` prints and what its page says, in an empty directory; and the page."""
    runs = RUNS[name](Path())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["report", *map(str, runs), "--out", "page.html"]) == 0
    html = Path("page.html").read_text(encoding="utf-8")
    text = f"{printed.getvalue().strip()}\n\n{page_text(html)}\n"
    return text.replace(f"poprisk_integrations {__version__}", "poprisk_integrations"), html


GOOD = '{"log_history": [{"step": 1, "loss": 2.0}]}'
FLIPS = "pair_id,row,probability_wrong,margin,step,action\n"
# Files of a directory, each of which spoils it.
BROKEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "TensorBoard": {"events.out.tfevents.1": "x"},
    "W&B": {"wandb": "x"},
    "half a state": {"trainer_state.json": GOOD[:-9]},
    "empty state": {"trainer_state.json": ""},
    "deep state": {"trainer_state.json": "[" * 100_000},
    "a list": {"trainer_state.json": "[]"},
    "a number": {"trainer_state.json": '{"log_history": 3}'},
    "no rows": {"trainer_state.json": '{"log_history": [3]}'},
    "no logs yet": {"trainer_state.json": '{"log_history": []}'},
    "no text": {"trainer_state.json": b"\xff\xfe\x00"},
    "empty CSV": {"metrics.csv": ""},
    "blank CSV": {"metrics.csv": "\n"},
    "no step": {"metrics.csv": "accuracy,time\n1,2\n"},
    "more cells": {"metrics.csv": "step,loss\n1,2,3\n"},
    "fewer cells": {"metrics.csv": "step,loss,acc\n1,2\n1,2,3\n"},
    "open quote": {"metrics.csv": 'step,loss\n1,"2\n'},
    "half a stop": {"trainer_state.json": GOOD, "poprisk_stop.json": '{"history": ['},
    "other JSON": {"poprisk_stop.json": "[1, 2]"},
    "no reason": {"poprisk_stop.json": '{"history": []}'},
    "rows of text": {"poprisk_stop.json": '{"history": [7], "reason": "x"}'},
    "steps of text": {"poprisk_stop.json": '{"reason": "x", "history": [{"step": "1"}]}'},
    "no window": {"poprisk_stop.json": '{"history": [], "reason": "none yet"}'},
    "a noise rate": {"trainer_state.json": GOOD, "poprisk_noise.json": "3"},
    "half a config": {"trainer_state.json": GOOD, "config.json": "{"},
    "empty flips": {"trainer_state.json": GOOD, "flip_report.csv": ""},
    "other CSV": {"trainer_state.json": GOOD, "flip_report.csv": "a,b\n"},
    "outside [0, 1]": {"flip_report.csv": f'{FLIPS}"a",0,1.5,0.1,0,"swap"\n'},
    "no number": {"flip_report.csv": f'{FLIPS}"a",0,many,0.1,0,"swap"\n'},
    "half a line": {"flip_report.csv": f'{FLIPS}"a",0,0.5,0.1,0,"swap"\n"b",0,0.5\n'},
    "half a quote": {"flip_report.csv": f'{FLIPS}"a",0,0.5,0.1,0,"sw'},
    "no cleaning": {"flip_report.csv": FLIPS, "poprisk_clean.json": '{"epochs": 3}'},
    "no swaps": {"flip_report.csv": FLIPS, "label_flips.json": "[]"},
}


def refused(name: str) -> str:
    """Exit status and complaint of `poprisk report`, without the words of Python's parsers."""
    run = Path("run")
    run.mkdir()
    for file, content in BROKEN[name].items():
        (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    complaint = io.StringIO()
    with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
        status = main(["report", "run"])
    said = re.sub(r"(is not (?:JSON|CSV)) \(.*\)", r"\1 (...)", complaint.getvalue())
    return f"{name}: {status}, {said}"


@contextlib.contextmanager
def empty_directory() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


if __name__ == "__main__":
    for case in RUNS:
        with empty_directory():
            (GOLDENS / f"{case}.txt").write_text(said(case)[0], encoding="utf-8")
    complaints = []
    for case in BROKEN:
        with empty_directory():
            complaints.append(refused(case))
    (GOLDENS / "refused.txt").write_text("".join(complaints), encoding="utf-8")
