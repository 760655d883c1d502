"""`poprisk probe --lr` on functions, a LightningModule and a config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from poprisk_integrations.cli.main import main
from tests.integration.cli import probe_targets
from tests.integration.lightning.toy import third_party_warnings

TARGETS = "tests.integration.cli.probe_targets"
CONFIG = Path(__file__).parents[3] / "recipes/dpo-noisy-7b-lora/smoke.yaml"
SHORT = ("--lr", "--lr-steps", "24", "--lr-score", "8")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    *third_party_warnings,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture
def search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with --json; returns its result."""

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        figure = tmp_path / "lr.png"
        assert main(["probe", *arguments, *SHORT, "--figure", str(figure), "--json"]) == 0
        assert figure.read_bytes().startswith(b"\x89PNG")
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same search by hand: the loop with the rates of a probe written into it."""
    losses = {}
    for candidate in (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256):
        torch.manual_seed(0)
        model = probe_targets.net()
        optimizer = torch.optim.AdamW(model.parameters())
        x, y = probe_targets.noisy_data(128).tensors
        torch.manual_seed(1)  # as `net` leaves it
        probe_targets.net()
        seen = []
        for step in range(32):
            rows = torch.randperm(len(x))[:16]
            share = min(1, (step + 1) / 2) * max(0, 1 - step / 24)
            optimizer.param_groups[0]["lr"] = candidate * share
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses[candidate] = sum(seen[24:]) / 8
    return losses


@pytest.mark.parametrize("name", ["long_training", "long_training_with_closures", "scaled_losses"])
def test_losses_are_those_of_a_loop_by_hand(search: Any, plain: Any, name: str) -> None:
    found = search(f"{TARGETS}:{name}", "--total-steps", "60")
    assert len(found["candidates"]) >= 3
    for candidate in found["candidates"]:
        if candidate["rate"] in plain:
            assert candidate["loss"] == pytest.approx(plain[candidate["rate"]], rel=1e-4)
    assert found["horizon_factor"] == pytest.approx((24 / 60) ** 0.3)
    assert found["low"] < found["suggested"] < found["high"]


def test_lightning_module_tells_its_epoch(search: Any) -> None:
    found = search(f"{TARGETS}:LongDigits")
    assert (found["steps"], found["score_batches"], found["total_steps"]) == (24, 8, None)
    assert any("half of the best rate" in note for note in found["notes"])


def test_config(search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    changes = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1")
    found = search("--config", str(CONFIG), *changes)
    assert found["total_steps"] > 0
    assert all(0 < c["loss"] < 10 for c in found["candidates"] if c["loss"] is not None)
    assert not list(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("long_training", ("--lr-steps", "10"), "Invalid steps: 10. Must be finite and >= 20."),
        ("two_optimizers", (), "the training steps two optimizers (AdamW and SGD)"),
        ("function", (), "The data ended after 12 of 32 optimizer steps"),
        ("never_steps", (), "no torch optimizer took a step"),
        ("not_finite", (), "The loss is nan before any step"),
        ("without_gradients", (), "The loss is nan before any step"),
        ("Digits", (), "One pass over the data has 8 optimizer steps, and a search needs 28"),
    ],
)
def test_refusals(
    name: str, options: Any, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure = tmp_path / "lr.png"
    assert main(["probe", f"{TARGETS}:{name}", *SHORT, *options, "--figure", str(figure)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not figure.exists()
