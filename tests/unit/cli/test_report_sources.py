"""Each kind of log is understood, and refused in one line where it cannot be."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.findings import headline, key_figures, sentences
from poprisk_integrations.cli.report.run import load_run, load_runs
from poprisk_integrations.cli.report.sections import sections_of
from tests.browser.made_up_run import write_dpo_run, write_flips, write_lightning_run


def state(directory: Path, step: int, **more: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "loss": float(step)}]
    content = {"global_step": step, "max_steps": 100, "log_history": rows, **more}
    (directory / "trainer_state.json").write_text(json.dumps(content))


def test_a_dpo_run(tmp_path: Path) -> None:
    run = load_run(write_dpo_run(tmp_path / "run", 400, 4))
    assert headline(run) == "Stopped early at step 400 of 500."
    assert run.totals["train_loss"] == 0.31  # a mean over the run, no point of the curve
    assert max(run.curves["loss"].steps) == 400
    assert "train_loss" not in run.curves
    assert run.versions == {"transformers": "5.1.0", "trl": "1.16.0", "pytorch": "2.13.0"}
    assert run.settings["README.md: base_model"] == "made/up"
    assert run.settings["README.md: learning_rate"] == "0.0001"
    assert run.settings["stop: kappa"] == "2.0"
    figures = {name: values[0] for name, values in key_figures([run])}
    assert figures["noise rate (95 %)"] == "20 % (15 to 26 %)"
    assert figures["run time"] == "1 h 30 min"
    assert any("checkpoint-400" in text for text in sentences(run))
    assert run.suspects is not None
    assert (run.suspects.num_pairs, run.suspects.num_scored) == (40, 39)
    assert len(run.suspects.top) == 20
    assert [pair.swapped for pair in run.suspects.top[:3]] == [True, True, False]
    assert run.suspects.num_swapped == 3
    assert "training_args.bin" not in [path.name for path in run.files]


def test_no_placeholder_of_lightning_is_a_point(tmp_path: Path) -> None:
    run = load_run(write_lightning_run(tmp_path))
    assert run.curves["poprisk/signal_ratio"].steps == (29, 39)
    assert run.curves["poprisk/agreement"].values == (-0.5, -0.25)
    assert run.curves["poprisk/onset_step"].values == (39,)
    assert run.last("loss", "eval") == 1.75
    assert run.settings["hparams.yaml: model.width"] == "64"
    assert run.settings["hparams.yaml: model.layers"] == "1, 2"
    assert "Eval loss went from 1.5 to 1.75; its lowest was 1.5 at step 19." in sentences(run)
    sections = {section.name: section for section in sections_of([run])}
    titles = {name: [chart.title for chart in s.charts] for name, s in sections.items()}
    assert titles["loss"] == ["Loss", "Learning rate"]
    assert titles["stop"] == ["How far batches agree (F)", "Agreement of consecutive batches (U)"]
    assert titles["gate"] == titles["labels"] == []
    assert titles["other"] == ["acc"]
    (onset,) = sections["stop"].charts[0].marks
    assert (onset.kind, onset.step) == ("onset", 39)


def test_hparams_with_python_objects_are_not_built(tmp_path: Path) -> None:
    write_lightning_run(tmp_path)
    danger = f"x: !!python/object/apply:os.system ['touch {tmp_path}/built']\n"
    (tmp_path / "hparams.yaml").write_text(danger)
    run = load_run(tmp_path)
    assert not (tmp_path / "built").exists()
    assert any("hparams.yaml was not read: not plain YAML" in note for note in run.notes)


def test_hparams_that_multiply_stay_small(tmp_path: Path) -> None:
    write_lightning_run(tmp_path)
    lines = ["a0: &a0 {x: 1, y: 2, z: 3, v: 4, w: 5}"]
    lines += [
        f"a{i}: &a{i} {{{', '.join(f'{c}: *a{i - 1}' for c in 'xyzvw')}}}" for i in range(1, 20)
    ]
    (tmp_path / "hparams.yaml").write_text("\n".join(lines))
    assert len(load_run(tmp_path).settings) <= 200


def test_the_state_that_is_further_on_counts(tmp_path: Path) -> None:
    state(tmp_path, 20)
    state(tmp_path / "checkpoint-9", 9)
    state(tmp_path / "checkpoint-30", 30)
    assert load_run(tmp_path).last_step == 30
    state(tmp_path, 30, max_steps=30)
    assert headline(load_run(tmp_path)) == "Ran all 30 planned steps."
    assert load_run(tmp_path / "checkpoint-9").last_step == 9
    assert load_run(tmp_path / "checkpoint-30" / "trainer_state.json").last_step == 30


def test_a_run_that_goes_on_is_told_from_one_that_ended(tmp_path: Path) -> None:
    rule = {"reason": "armed at step 8: F = 2", "stop_step": None, "onset_step": None}
    progress = {"history": [{"step": 8, "signal_ratio": 2.0}]}
    callback = {
        "args": {"threshold": 0.5, "action": "stop"},
        "attributes": {"rule_state": rule, "progress_state": progress},
    }
    state(tmp_path / "checkpoint-10", 10, stateful_callbacks={
        "PopRiskEarlyStoppingCallback": [callback], "Other": {}, "Odd": None,
    })  # fmt: skip
    run = load_run(tmp_path)
    assert headline(run).startswith("The log ends at step 10 of 100: still running")
    assert "Early stopping: armed at step 8: F = 2." in sentences(run)
    assert run.stop is not None
    assert run.stop.threshold == 0.5
    assert run.report is None


def test_the_newest_run_of_a_directory(tmp_path: Path) -> None:
    for index, name in enumerate(["b", "a"]):
        write_lightning_run(tmp_path / name)
        os.utime(tmp_path / name / "metrics.csv", (index, index))
    run = load_run(tmp_path)
    assert run.directory == tmp_path / "a"
    assert "This is a, the newest run in the directory; 1 more are not shown." in run.notes


def test_a_stop_beside_the_checkpoints_belongs_to_the_run(tmp_path: Path) -> None:
    write_lightning_run(tmp_path / "logs" / "version_0")
    (tmp_path / "checkpoints").mkdir()
    report = {"reason": "armed", "history": [{"step": 8, "signal_ratio": 2.0}]}
    (tmp_path / "checkpoints" / "poprisk_stop.json").write_text(json.dumps(report))
    run = load_run(tmp_path)
    assert run.report == report
    assert run.last("loss") == 0.25


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    write_lightning_run(tmp_path / "a" / "run")
    write_lightning_run(tmp_path / "b" / "run")
    names = [run.name for run in load_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
    assert len(set(names)) == 2
    with pytest.raises(UsageError, match="given twice"):
        load_runs([tmp_path / "a" / "run", tmp_path / "a" / "run" / ".." / "run"])


GOOD = '{"log_history": [{"step": 1, "loss": 2.0}]}'


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "No poprisk_stop.json in it, nor trainer_state.json or metrics.csv"),
        ({"events.out.tfevents.1": "x"}, "Logs of TensorBoard cannot be read"),
        ({"wandb/x": "x"}, "Logs of Weights & Biases cannot be read"),
        ({"trainer_state.json": GOOD[:-9]}, "is not JSON"),
        ({"trainer_state.json": ""}, "it is empty"),
        ({"trainer_state.json": "[" * 100_000}, "is not JSON"),
        ({"trainer_state.json": "[]"}, "is not of Hugging Face's Trainer"),
        ({"trainer_state.json": '{"log_history": [3]}'}, "is not of Hugging Face's Trainer"),
        ({"trainer_state.json": '{"log_history": []}'}, "Its logs are empty so far"),
        ({"trainer_state.json": b"\xff\xfe\x00"}, "is not text"),
        ({"metrics.csv": ""}, "is empty"),
        ({"metrics.csv": "\n"}, "is empty"),
        ({"metrics.csv": "accuracy,time\n1,2\n"}, "no column 'step'"),
        ({"metrics.csv": "step,loss\n1,2,3\n"}, "3 values for 2 columns"),
        ({"metrics.csv": 'step,loss\n1,"2\n'}, "is not CSV"),
        ({"trainer_state.json": GOOD, "poprisk_stop.json": '{"history": ['}, "is not JSON"),
        ({"trainer_state.json": GOOD, "poprisk_noise.json": "3"}, "no estimate of a noise rate"),
        ({"trainer_state.json": GOOD, "flip_report.csv": ""}, "is empty"),
        ({"trainer_state.json": GOOD, "flip_report.csv": "a,b\n"}, "is not a flip report"),
        ({"trainer_state.json": GOOD, "config.json": "{"}, "is not JSON"),
        ({"poprisk_stop.json": '{"reason": "x", "history": [{"step": "1"}]}'}, "not a report"),
    ],
)
def test_bad_directories(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        load_run(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('"a",0,1.5,0.1,0,"swap"\n', "is outside [0, 1]"),
        ('"a",0,many,0.1,0,"swap"\n', "'many' is no number"),
        ('"a",0,0.5\n', "is not a whole flip report"),
    ],
)
def test_bad_flip_reports(line: str, said: str, tmp_path: Path) -> None:
    write_flips(tmp_path / "flip_report.csv", [])
    with (tmp_path / "flip_report.csv").open("a") as file:
        file.write(line)
    with pytest.raises(UsageError) as caught:
        load_run(tmp_path)
    assert said in str(caught.value)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,acc\n1,2.0,0.5\n2,1.0")
    run = load_run(tmp_path)
    assert run.curves["loss"].values == (2.0,)
    assert any("last line" in note for note in run.notes)


def test_what_is_no_number_is_no_point(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 2.0, "ok": True, "text": "a", "huge": 1e308},
        {"step": 2, "loss": float("nan"), "list": [1]},
        {"step": "x", "loss": 3.0},
        {"step": 3, "loss": 1.0},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    run = load_run(tmp_path)
    assert sorted(run.curves) == ["huge", "loss"]
    assert "Train loss is not finite at step 2." in sentences(run)
    assert "Train loss went from 2 to 1." in sentences(run)


def test_second_callback_and_many_groups(tmp_path: Path) -> None:
    rows = [
        {
            "step": step,
            "poprisk/signal_ratio": 2.0 / step,
            "poprisk/2/signal_ratio": 3.0 / step,
            **{f"poprisk/layer{g}/open_fraction": g / 20 / step for g in range(20)},
        }
        for step in (1, 2, 3)
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    sections = {section.name: section for section in sections_of([load_run(tmp_path)])}
    assert [line.what for line in sections["stop"].charts[0].lines] == ["F", "callback 2"]
    (gate,) = sections["gate"].charts
    assert gate.title == "Open fraction by parameter group"
    assert [line.what for line in gate.lines] == [
        "layer0", "layer4", "layer8", "layer11", "layer15", "layer19",
    ]  # fmt: skip
    assert "6 of 20 groups" in gate.note
