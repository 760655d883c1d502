"""`poprisk probe` on functions, LightningModules and recipes, and its mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from poprisk_integrations.cli.main import main
from poprisk_integrations.diagnostics.layer_groups import layer_groups
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
def probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command with --json; returns its report."""

    def run(*arguments: str, steps: int = probe_targets.STEPS) -> Any:
        probe_targets.trained.clear()
        capsys.readouterr()  # of what the test itself ran before
        figure = tmp_path / "probe.png"
        options = ["--steps", str(steps), "--figure", str(figure), "--json"]
        assert main(["probe", *arguments, *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert figure.read_bytes().startswith(b"\x89PNG")
        assert not list(tmp_path.glob("*.tmp*"))
        return report

    return run


def weights() -> list[torch.Tensor]:
    return [p.detach() for p in probe_targets.trained[-1].parameters()]


def random_state() -> torch.Tensor:
    return torch.get_rng_state().clone()


@pytest.mark.parametrize("name", ["function", "bfloat16", "with_closure"])
def test_training_is_bitwise_the_same(probe: Any, name: str) -> None:
    """With dropout and shuffling: a changed gradient, update or random draw would show."""
    getattr(probe_targets, name)()
    expected, state = weights(), random_state()
    report = probe(f"{TARGETS}:{name}", steps=probe_targets.STEPS + 1)
    assert all(torch.equal(a, b) for a, b in zip(weights(), expected, strict=True))
    assert torch.equal(random_state(), state)
    (optimizer,) = report["optimizers"]
    assert optimizer["steps"] == probe_targets.STEPS
    assert f"after {probe_targets.STEPS} of {probe_targets.STEPS + 1} steps" in str(optimizer)


def test_closure_gives_the_gradients_of_its_own_step(probe: Any) -> None:
    """Lightning's way of stepping: at the call of `step` the gradients are those of the last."""
    plain, closed = (probe(f"{TARGETS}:{name}") for name in ("function", "with_closure"))
    assert plain["optimizers"][0]["total"] == closed["optimizers"][0]["total"]


def test_trainer_inside_a_function(probe: Any) -> None:
    """Ended at its last step; its weights are those of the whole run."""
    probe_targets.trainer()
    expected = weights()
    report = probe(f"{TARGETS}:trainer", steps=16)
    assert all(torch.equal(a, b) for a, b in zip(weights(), expected, strict=True))
    (optimizer,) = report["optimizers"]
    assert optimizer["steps"] == 16
    assert {group["name"] for group in optimizer["groups"]} == {"embed", "norm", "head"}


def test_layers_have_the_names_of_the_monitors(probe: Any) -> None:
    report = probe(f"{TARGETS}:deep", steps=probe_targets.STEPS + 1)
    found = [group["name"] for group in report["optimizers"][0]["groups"]]
    model = probe_targets.trained[-1]
    assert found == list(dict.fromkeys(layer_groups(dict(model.named_parameters())).values()))
    assert found == [*(f"layers.{i}" for i in range(20)), "head"]


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
    assert optimizer["memory_bytes"]["float32 (12 B)"] == 12 * optimizer["parameters"]
    assert optimizer["memory_bytes"]["bfloat16 (6 B)"] == 6 * optimizer["parameters"]
    assert optimizer["stop"]["verdict"] == "works"
    assert optimizer["noise_scale"]["unit"] == "examples"
    assert len(optimizer["advice"]) == 2
    assert 0 <= report["overhead"] < 1


def test_endless_training_ends_at_the_last_step(probe: Any) -> None:
    report = probe(f"{TARGETS}:endless", steps=9)
    assert report["optimizers"][0]["steps"] == 9
    assert report["optimizers"][0]["notes"] == []


def test_two_optimizers_are_reported_apart(probe: Any) -> None:
    report = probe(f"{TARGETS}:two_optimizers", steps=2 * probe_targets.STEPS)
    first, second = report["optimizers"]
    assert (first["name"], first["steps"], first["betas"]) == ("AdamW", 24, [0.8, 0.99])
    assert (second["name"], second["steps"], second["betas"]) == ("SGD", 12, [0.9, 0.999])
    assert "SGD has no betas" in str(second["notes"])


def test_what_a_training_prints_stays_off_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = f"{TARGETS}:prints_and_exits"
    assert main(["probe", target, "--steps", "20", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "chatter of the training\n"
    assert (tmp_path / "poprisk_probe.png").exists()


def test_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    target = f"{TARGETS}:function"
    assert main(["probe", target, "--steps", "12", "--batch-size", "16"]) == 0
    out = capsys.readouterr().out
    assert "\u2026" not in out  # nothing is cut off at 80 columns
    for text in ("calibrated 32 %", "noise scale", "12 steps", "finite b/(n-b): needs --batch-size",
                 "optimizer state", "poprisk_probe.png", target):  # fmt: skip
        assert text in out
    assert out.count("\u2022") == 2


def test_file_as_target(probe: Any, tmp_path: Path) -> None:
    script = tmp_path / "my_training_script.py"
    script.write_text(f"from {TARGETS} import function as train\n")
    assert probe(f"{script}:train")["source"] == f"{script}:train"


@pytest.mark.parametrize(
    ("arguments", "batch", "epoch"),
    [
        (["Digits"], 16, 8),
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


@pytest.mark.parametrize("recipe", ["dpo-noisy-qwen2.5-0.5b", "dpo-noisy-7b-lora"])
def test_recipe(probe: Any, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = probe("--config", str(RECIPES / recipe / "smoke.yaml"), "--learning_rate", "1e-3")
    assert report["sizes"] == {
        "batch_size": 16, "dataset_size": 96, "epoch_steps": 6, "total_steps": 12
    }  # fmt: skip
    (optimizer,) = report["optimizers"]
    assert optimizer["name"] == "PopRiskAdamW"
    names = [group["name"] for group in optimizer["groups"]]
    assert "model.layers.0" in names
    is_lora = "lora" in recipe
    assert ("model.embed_tokens" in names) is not is_lora
    assert (optimizer["parameters"] == 4_352) is is_lora
    assert [p.name for p in tmp_path.iterdir()] == ["probe.png"]  # no model, log or checkpoint


REFUSED = {
    "no_such_package.module:train": "cannot import 'no_such_package.module'",
    "no_such_script.py:train": "no script at 'no_such_script.py'",
    "train": "'train' is no target",
    f"{TARGETS}:absent": "has no 'absent'",
    f"{TARGETS}:NOT_CALLABLE": "neither a function nor a LightningModule class",
    f"{TARGETS}:NoModule": "is a class, but no LightningModule",
    f"{TARGETS}:needs_arguments": "needs arguments (data)",
    f"{TARGETS}:never_steps": "never stepped a torch optimizer",
    f"{TARGETS}:frozen": "no trainable parameter",
    f"{TARGETS}:empty": "no trainable parameter",
    f"{TARGETS}:sparse": "all gradients are sparse",
    f"{TARGETS}:without_gradients": "no parameter had a gradient",
    f"{TARGETS}:not_finite": "non-finite",
    f"{TARGETS}:few_steps": "ended after 7 measured steps: a probe needs at least 8",
    f"{TARGETS}:exits": "exited with 3",
    f"{TARGETS}:NoData": "(or give --datamodule)",
    f"{TARGETS}:Digits --init-args {{\"depth\":1}}": "Invalid --init-args",
    f"{TARGETS}:Digits --trainer-args {{\"depth\":1}}": "Invalid --trainer-args",
    f"{TARGETS}:Digits --init-args [1]": "must be a JSON object",
    f"{TARGETS}:Digits --init-args x": "is not JSON",
    f"{TARGETS}:Digits --datamodule {TARGETS}:NOT_CALLABLE": "Invalid --datamodule",
    f"{TARGETS}:function --datamodule {TARGETS}:Data": "is for a LightningModule class",
    f"{TARGETS}:function --steps 7": "'7' must be an integer >= 8",
    f"{TARGETS}:function --batch-size 0": "'0' must be an integer >= 1",
    f"{TARGETS}:function --learning_rate 1": "unrecognized arguments",
    f"{TARGETS}:function {TARGETS}:function": "give one MODULE:NAME",
    "": "give one MODULE:NAME",
    "--config no_such.yaml": "no recipe at 'no_such.yaml'",
    "--config no_such.yaml --datamodule a:b": "not for a recipe",
    f"--config {RECIPES}/dpo-noisy-7b-lora/smoke.yaml --betta 1": "unknown option '--betta'",
    f"{TARGETS}:function --figure no/such/directory.png": "Its directory does not exist",
}  # fmt: skip


@pytest.mark.parametrize("arguments", REFUSED)
def test_bad_input(
    arguments: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["probe", *arguments.split()]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("poprisk: ")]
    assert len(lines) == 1
    assert captured.err.endswith(lines[0] + "\n")
    assert REFUSED[arguments] in lines[0]
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_errors_of_the_training_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="an error of the training"):
        main(["probe", f"{TARGETS}:fails"])


def test_hooks_are_gone_afterwards(probe: Any) -> None:
    from torch.optim import optimizer

    probe(f"{TARGETS}:function")
    with pytest.raises(RuntimeError):
        main(["probe", f"{TARGETS}:fails"])
    assert not optimizer._global_optimizer_pre_hooks
    assert not optimizer._global_optimizer_post_hooks


def test_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["probe", f"{TARGETS}:function"]) == 2
    assert "one process" in capsys.readouterr().err
