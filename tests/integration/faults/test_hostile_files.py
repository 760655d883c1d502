"""Pickles and YAML tags with a payload: refused or not opened, and never run."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import poprisk_integrations.huggingface as hf
from poprisk_integrations.cli.main import main
from poprisk_integrations.lightning.callbacks.run_result import load_weights_back
from tests.helpers.tiny_trainer import arguments, train
from tests.integration.lightning import toy


class _Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Exists once a payload has run; proven below to work."""
    return tmp_path / "marker"


def test_the_payload_would_run(marker: Path) -> None:
    pickle.loads(pickle.dumps(_Payload(marker)))
    assert marker.is_dir()


@pytest.mark.parametrize("tag", ["os.mkdir", "subprocess.Popen"])
@pytest.mark.parametrize("command", ["dpo", "probe"])
def test_recipe_with_python_objects(
    command: str, tag: str, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: !!python/object/apply:{tag} [{str(marker)!r}]\n")
    assert main([command, "--config", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "not valid YAML (line 1" in said[0]
    assert not marker.exists()


def test_report_of_a_directory_of_pickles(
    tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    (run / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    for name in ("training_args.bin", "x.pkl", "checkpoint-4/optimizer.pt", "last.ckpt"):
        torch.save(_Payload(marker), run / name)
    tag = f"a: !!python/object/apply:os.mkdir [{str(marker)!r}]\n"
    (run / "hparams.yaml").write_text(tag)
    (run / "README.md").write_text(f"---\n{tag}---\n")
    assert main(["report", str(run)]) == 0
    assert not marker.exists()
    assert main(["flips", str(run)]) == 2
    assert not marker.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resume_from_a_checkpoint_with_a_payload(name: str, tmp_path: Path, marker: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(
        arguments(tmp_path / "run", **options),
        hf.PopRiskEarlyStoppingCallback(criterion="signal", window=4),
    )
    checkpoint = shutil.move(tmp_path / "run" / "checkpoint-2", tmp_path / "checkpoint-2")
    torch.save({"state": _Payload(marker)}, Path(checkpoint, name))
    assert hf.last_whole_checkpoint(tmp_path) is not None  # looked at, and nothing unpickled
    assert not marker.exists()
    with pytest.raises(pickle.UnpicklingError):
        train(arguments(tmp_path / "again", **options), resume=str(checkpoint))
    assert not marker.exists()


def test_weights_of_the_onset(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "onset.ckpt"
    torch.save({"state_dict": _Payload(marker)}, path)
    model = toy.Classifier()
    with pytest.raises(RuntimeError, match=r"could not be loaded back from .*onset\.ckpt"):
        load_weights_back(model, str(path))
    assert not marker.exists()
