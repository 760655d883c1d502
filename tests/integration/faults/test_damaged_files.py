"""Truncated and flipped files: loaded as they are or refused in one line that names the file."""

import csv
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import poprisk_integrations.huggingface as hf
from poprisk_integrations.cli.dpo import _checkpoint
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.sources import load_run
from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.huggingface.callbacks.windows import (
    WINDOW_FILE,
    load_window,
    save_window,
)
from poprisk_integrations.lightning import PopRiskEarlyStopping
from poprisk_integrations.trl.flip_report import FlipReport
from poprisk_integrations.trl.label_noise_callback import LABELS_FILE
from tests.helpers.tiny_trainer import arguments, train


def damaged(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The file empty, cut off, with flipped bytes and with foreign ones in the middle."""
    rng = random.Random(seed)
    yield b""
    for turn in range(count):
        data = bytearray(whole)
        place = rng.randrange(len(data))
        if turn % 3 == 0:
            del data[place:]
        elif turn % 3 == 1:
            data[place] ^= 1 << rng.randrange(8)
        else:
            data[place : place + 16] = rng.randbytes(16)
        yield bytes(data)


def _refused(
    path: Path, load: Callable[[], Any], count: int, seed: int, error: type[Exception] = ValueError
) -> int:
    """How many damaged forms of a file are refused, each in one line that names it."""
    said = []
    for data in damaged(path.read_bytes(), count, seed):
        path.write_bytes(data)
        try:
            load()
        except error as caught:
            said.append(str(caught))
    assert [line for line in said if path.name not in line or "\n" in line] == []
    return len(said)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps with two checkpoints in the middle of windows."""
    out = tmp_path_factory.mktemp("run")
    args = arguments(out, max_steps=10, save_strategy="steps", save_steps=5)
    train(args, hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8))
    return out


def test_window(tmp_path: Path) -> None:
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    window = GradientWindow(4)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        window.add(params)
    save_window(window, str(tmp_path), step=3)
    path = tmp_path / WINDOW_FILE
    assert _refused(path, lambda: load_window(str(tmp_path), 3, params), 300, seed=0) > 100


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_flip_report(suffix: str, tmp_path: Path) -> None:
    rows = list(range(40))
    FlipReport(
        pair_id=[f"pair {row}" for row in rows],
        row=rows,
        probability_wrong=[row / 40 for row in rows],
        margin=[1.0 - row / 20 for row in rows],
        step=rows,
    ).save(tmp_path)
    path = (tmp_path / "flip_report").with_suffix(suffix)
    assert _refused(path, lambda: FlipReport.load(path), 300, seed=1) > 50


@pytest.mark.parametrize(
    "name", ["poprisk_stop.json", "checkpoint-10/trainer_state.json", "poprisk_noise.json"]
)
def test_report_of_a_run(name: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    noise = {"rate": 0.2, "low": 0.1, "high": 0.3, "num_pairs": 40, "rate_in_use": 0.2}
    (folder / "poprisk_noise.json").write_text(json.dumps(noise))
    path = folder / name
    assert _refused(path, lambda: load_run(folder), 150, seed=2, error=UsageError) > 30


@pytest.mark.parametrize("damage", ["cut", "no JSON object", "state of the stop", "window"])
def test_resume(damage: str, run: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(run / "checkpoint-5", tmp_path / "checkpoint-5")
    path = checkpoint / "trainer_state.json"
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[: len(text) // 2])
    elif damage == "no JSON object":
        path.write_text("[1, 2]")
    elif damage == "state of the stop":
        state = json.loads(text)
        entry = state["stateful_callbacks"]["PopRiskEarlyStoppingCallback"]
        del entry["args"]
        path.write_text(json.dumps(state))
    else:
        path = checkpoint / WINDOW_FILE
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=path.name) as caught:
        train(
            arguments(tmp_path, max_steps=10),
            hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8),
            resume=str(checkpoint),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", WINDOW_FILE],
)
def test_a_checkpoint_cut_anywhere_is_passed_over(name: str, run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "checkpoint-10" / name
    whole = path.read_bytes()
    assert hf.last_whole_checkpoint(folder) == str(folder / "checkpoint-10")
    if name == "trainer_state.json":
        whole = whole.rstrip()
    for length in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert hf.last_whole_checkpoint(folder) == str(folder / "checkpoint-5"), length
    path.unlink()
    if name in ("trainer_state.json", WINDOW_FILE):
        assert hf.last_whole_checkpoint(folder) == str(folder / "checkpoint-5")
    shutil.rmtree(folder / "checkpoint-5")
    path.write_bytes(b"")
    assert hf.last_whole_checkpoint(folder) is None


def test_dpo_resumes_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """`poprisk dpo` with `resume_from_checkpoint: true`."""

    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"stateful_callbacks": {}}')
    whole = tmp_path / "checkpoint-2"
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name / LABELS_FILE).write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"stateful_call')

    def taken(asked: object) -> object:
        return _checkpoint(SimpleNamespace(resume_from_checkpoint=asked, output_dir=tmp_path))

    assert taken(True) == taken("true") == str(whole)
    assert taken(None) is None
    assert taken("some/where") == "some/where"
    (whole / LABELS_FILE).unlink()
    with pytest.raises(UsageError, match="no whole checkpoint in"):
        taken(True)


def test_lightning_states_that_do_not_fit() -> None:
    whole = PopRiskEarlyStopping(criterion="signal").state_dict()
    for name in ("rule", "onset_path", "stop_path"):
        with pytest.raises(ValueError, match=f"PopRiskEarlyStopping in the checkpoint.*{name}"):
            PopRiskEarlyStopping(criterion="signal").load_state_dict(
                {key: value for key, value in whole.items() if key != name}
            )
    with pytest.raises(ValueError, match="is damaged"):
        PopRiskEarlyStopping(criterion="signal").load_state_dict({**whole, "rule": 3})


def test_the_csv_is_the_one_of_the_readme() -> None:
    """Figures in this folder's README come from `results.csv`."""
    folder = Path(__file__).parent
    text = (folder / "README.md").read_text()
    with (folder / "results.csv").open(newline="") as file:
        rows = {(row["drill"], row["what"]): row["value"] for row in csv.DictReader(file)}
    for job in ("huggingface", "lightning"):
        cells = [rows[job, name] for name in ("killed", "cut_in_a_write", "inside_a_save")]
        assert f"| {job} | {' | '.join(cells)} |" in text
