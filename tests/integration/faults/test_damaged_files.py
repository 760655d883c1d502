"""Truncated and flipped files: loaded as they are or refused in one line that names the file."""

import csv
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import poprisk_integrations.huggingface as hf
from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.run import load_run
from poprisk_integrations.diagnostics import GradientWindow
from poprisk_integrations.huggingface.callbacks.window_checkpoint import (
    WINDOW_FILE,
    load_window,
    save_window,
)
from poprisk_integrations.lightning import PopRiskEarlyStopping
from poprisk_integrations.trl.flip_report import FlipReport
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


def _require_one_line(error: BaseException, name: str) -> None:
    assert name in str(error), error
    assert "\n" not in str(error), error


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps with two checkpoints in the middle of windows."""
    out = tmp_path_factory.mktemp("run")
    args = arguments(out, max_steps=10, save_strategy="steps", save_steps=5)
    train(args, hf.PopRiskEarlyStoppingCallback(window=8))
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
    refused = 0
    for data in damaged(path.read_bytes(), 300, seed=0):
        path.write_bytes(data)
        try:
            load_window(str(tmp_path), 3, params)
        except ValueError as error:
            _require_one_line(error, str(path))
            refused += 1
    assert refused > 100


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
    refused = 0
    for data in damaged(path.read_bytes(), 300, seed=1):
        path.write_bytes(data)
        try:
            FlipReport.load(path)
        except ValueError as error:
            _require_one_line(error, str(path))
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "name", ["poprisk_stop.json", "checkpoint-10/trainer_state.json", "poprisk_noise.json"]
)
def test_report_of_a_run(name: str, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    noise = {"rate": 0.2, "low": 0.1, "high": 0.3, "num_pairs": 40, "rate_in_use": 0.2}
    (folder / "poprisk_noise.json").write_text(json.dumps(noise))
    path = folder / name
    refused = 0
    for data in damaged(path.read_bytes(), 150, seed=2):
        path.write_bytes(data)
        try:
            load_run(folder)
        except UsageError as error:
            _require_one_line(error, path.name)
            refused += 1
    assert refused > 30


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
            hf.PopRiskEarlyStoppingCallback(window=8),
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


def _state(**changes: Any) -> dict[str, Any]:
    param = torch.nn.Parameter(torch.zeros(3, 2))
    param.grad = torch.ones(3, 2)
    optimizer = PopRiskAdamW([param])
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0] = {**state["state"][0], **changes}
    return state


def test_optimizer_states_that_do_not_fit() -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3, 2))], lr=0.1, momentum=0.9)
    sgd.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    sgd.step()
    without = _state()
    del without["state"][0]["exp_avg"]
    foreign = _state(exp_inf=torch.zeros(3, 2))  # of Adam's kind, not ours
    for name in ("dev_step", "exp_dev_sq"):
        del foreign["state"][0][name]
    bad = {
        "exp_avg of parameter 0 has the shape": _state(exp_avg=torch.zeros(2, 2)),
        "without ['exp_avg']": without,
        "unknown state keys ['exp_inf']": foreign,
        "without ['step', 'exp_avg', 'exp_avg_sq']": sgd.state_dict(),
        "step of parameter 0": _state(step="many"),
    }
    for said, state in bad.items():
        optimizer = PopRiskAdamW([torch.nn.Parameter(torch.zeros(3, 2))])
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
            optimizer.load_state_dict(state)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not optimizer.state  # nothing was loaded


def test_lightning_states_that_do_not_fit() -> None:
    whole = PopRiskEarlyStopping().state_dict()
    for name in ("rule", "onset_path", "stop_path"):
        with pytest.raises(ValueError, match=f"PopRiskEarlyStopping in the checkpoint.*{name}"):
            PopRiskEarlyStopping().load_state_dict(
                {key: value for key, value in whole.items() if key != name}
            )
    with pytest.raises(ValueError, match="is damaged"):
        PopRiskEarlyStopping().load_state_dict({**whole, "rule": 3})


def test_the_csv_is_the_one_of_the_readme() -> None:
    """Figures in this folder's README come from `results.csv`."""
    folder = Path(__file__).parent
    text = (folder / "README.md").read_text()
    with (folder / "results.csv").open(newline="") as file:
        rows = {(row["drill"], row["what"]): row["value"] for row in csv.DictReader(file)}
    for job in ("huggingface", "lightning"):
        cells = [rows[job, name] for name in ("killed", "cut_in_a_write", "inside_a_save")]
        assert f"| {job} | {' | '.join(cells)} |" in text
