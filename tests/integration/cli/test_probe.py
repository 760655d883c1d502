"""`poprisk probe` on functions, LightningModules and configs.

What it prints and refuses is in tests/goldens/cli/probe.txt.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from poprisk_integrations.cli.main import main
from tests.integration.cli import probe_targets
from tests.integration.lightning.toy import third_party_warnings

TARGETS = "tests.integration.cli.probe_targets"
RECIPES = Path(__file__).parents[3] / "recipes"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    *third_party_warnings,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture
def probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Runs the command with --json and without its picture; returns its report."""
    monkeypatch.setattr("poprisk_integrations.cli.output.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, steps: int = probe_targets.STEPS) -> Any:
        probe_targets.trained.clear()
        capsys.readouterr()  # of what the test itself ran before
        assert main(["probe", *arguments, "--steps", str(steps), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def weights() -> list[torch.Tensor]:
    return [p.detach() for p in probe_targets.trained[-1].parameters()]


@pytest.mark.parametrize(
    ("name", "steps", "groups"),
    [
        ("function", probe_targets.STEPS, {"0", "3"}),
        ("bfloat16", probe_targets.STEPS, {"0", "3"}),
        ("with_closure", probe_targets.STEPS, {"0", "3"}),
        ("trainer", 16, {"embed", "norm", "head"}),
    ],
)
def test_training_is_bitwise_the_same(probe: Any, name: str, steps: int, groups: set[str]) -> None:
    """With dropout and shuffling: a changed gradient, update or random draw would show."""
    getattr(probe_targets, name)()
    expected, state = weights(), torch.get_rng_state()
    report = probe(f"{TARGETS}:{name}", steps=steps + 1)
    assert all(torch.equal(a, b) for a, b in zip(weights(), expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    (optimizer,) = report["optimizers"]
    assert optimizer["steps"] == steps
    assert f"after {steps} of {steps + 1} steps" in str(optimizer)
    assert {group["name"] for group in optimizer["groups"]} == groups


def test_closure_gives_the_gradients_of_its_own_step(probe: Any) -> None:
    """Lightning's way of stepping: at the call of `step` the gradients are those of the last."""
    plain, closed = (probe(f"{TARGETS}:{name}") for name in ("function", "with_closure"))
    assert plain["optimizers"][0]["total"] == closed["optimizers"][0]["total"]


def test_function_report(probe: Any) -> None:
    sizes = ["--batch-size", "16", "--dataset-size", "128", "--total-steps", "200"]
    report = probe(f"{TARGETS}:function", *sizes)
    assert report["sizes"] == {
        "batch_size": 16, "dataset_size": 128, "epoch_steps": 8, "total_steps": 200
    }  # fmt: skip
    (optimizer,) = report["optimizers"]
    assert (optimizer["name"], optimizer["tensors"]) == ("AdamW", 4)
    assert optimizer["parameters"] == 16 * 32 + 32 + 32 * 4 + 4
    assert [group["name"] for group in optimizer["groups"]] == ["0", "3"]
    assert [p["name"][:6] for p in optimizer["presets"]] == ["fresh ", "calibr", "calibr", "finite"]
    assert optimizer["presets"][3]["alpha"] == pytest.approx(16 / (128 - 16))
    assert optimizer["stop"]["verdict"] == "works"
    assert optimizer["noise_scale"]["unit"] == "examples"
    assert len(optimizer["advice"]) == 2
    assert 0 <= report["overhead"] < 1


def test_endless_training_ends_at_the_last_step(probe: Any) -> None:
    report = probe(f"{TARGETS}:endless", steps=9)
    assert report["optimizers"][0]["steps"] == 9
    assert report["optimizers"][0]["notes"] == []


def test_nothing_is_cut_off_at_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    figure = tmp_path / "probe.png"
    options = ["--steps", "12", "--batch-size", "16", "--figure", str(figure)]
    assert main(["probe", f"{TARGETS}:function", *options]) == 0
    out = capsys.readouterr().out
    assert "calibrated 32 %" in out
    assert "\u2026" not in out
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [figure]


def test_file_as_target(probe: Any, tmp_path: Path) -> None:
    script = tmp_path / "my_training_script.py"
    script.write_text(f"from {TARGETS} import function as train\n")
    assert probe(f"{script}:train")["source"] == f"{script}:train"


@pytest.mark.parametrize(
    ("arguments", "batch", "epoch"),
    [
        (["Digits", "--init-args", '{"width": 8}', "--trainer-args",
          '{"accumulate_grad_batches": 2}'], 32, 4),
        (["NoData", "--datamodule", f"{TARGETS}:Data"], 8, 16),
    ],
)  # fmt: skip
def test_lightning(probe: Any, arguments: list[str], batch: int, epoch: int) -> None:
    report = probe(f"{TARGETS}:{arguments[0]}", *arguments[1:], "--total-steps", "100")
    assert report["sizes"] == {
        "batch_size": batch, "dataset_size": 128, "epoch_steps": epoch, "total_steps": 100
    }  # fmt: skip
    (optimizer,) = report["optimizers"]
    assert optimizer["steps"] == probe_targets.STEPS
    assert [group["name"] for group in optimizer["groups"]] == ["net.0", "net.2"]
    assert optimizer["parameters"] == (676 if "width" not in str(arguments) else 172)


def test_config(probe: Any, tmp_path: Path) -> None:
    """All weights; LoRA is in the transcript."""
    config = RECIPES / "dpo-noisy-qwen2.5-0.5b" / "smoke.yaml"
    report = probe("--config", str(config), "--learning_rate", "1e-3")
    assert report["sizes"] == {
        "batch_size": 16, "dataset_size": 96, "epoch_steps": 6, "total_steps": 12
    }  # fmt: skip
    (optimizer,) = report["optimizers"]
    assert optimizer["name"] == "PopRiskAdamW"
    names = [group["name"] for group in optimizer["groups"]]
    assert {"model.layers.0", "model.embed_tokens"} <= {*names}
    assert not list(tmp_path.iterdir())  # no model, log or checkpoint


def test_errors_of_the_training_keep_their_traceback_and_leave_no_hook(probe: Any) -> None:
    from torch.optim import optimizer

    probe(f"{TARGETS}:function")
    with pytest.raises(RuntimeError, match="an error of the training"):
        main(["probe", f"{TARGETS}:fails"])
    assert not optimizer._global_optimizer_pre_hooks
    assert not optimizer._global_optimizer_post_hooks


def test_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["probe", f"{TARGETS}:function"]) == 2
    assert "one process" in capsys.readouterr().err
