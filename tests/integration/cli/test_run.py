"""`poprisk run`: the name is known to a script that never imports us, under launchers too.

What it refuses is in tests/goldens/cli/main.txt.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from poprisk_integrations.cli.main import main

NAME = """
from transformers import TrainingArguments
print(TrainingArguments(optim="poprisk_adamw", use_cpu=True).optim)
"""
TRAIN = """
import json, os, sys, torch
from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
    def forward(self, x, labels):
        return {"loss": (self.linear(x)[:, 0] - labels).square().mean()}

if __name__ == "__main__":
    args = TrainingArguments(output_dir=sys.argv[1], optim="poprisk_adamw", max_steps=3,
                             use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    rows = [{"x": [float(i), 1.0], "labels": float(i)} for i in range(32)]
    trainer = Trainer(Model(), args, train_dataset=rows)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    found = {"class": type(optimizer).__name__, "argv": sys.argv[2:],
             "world_size": args.world_size, "steps": trainer.state.global_step}
    with open(os.path.join(sys.argv[1], f"rank{args.process_index}.json"), "w") as file:
        json.dump(found, file)
    if args.world_size > 1:
        torch.distributed.destroy_process_group()
"""
CLI = "poprisk_integrations.cli"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.distributed
def test_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(TRAIN)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    target = (str(tmp_path / "job.py"), str(tmp_path), "--lr", "3", "--debug")
    run = python(*launcher, "-m", CLI, "run", *target)
    assert run.returncode == 0, run.stderr[-3000:]
    expected = {"class": "PopRiskAdamW", "argv": ["--lr", "3", "--debug"], "steps": 3}
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    assert found == [{**expected, "world_size": 2}] * 2


def test_under_accelerate_launch(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(NAME)
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m")
    run = python(*launcher, CLI, "run", str(tmp_path / "job.py"))
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "OptimizerNames.POPRISK_ADAMW\n"


# In this process from here on: how the target is run, with targets that train nothing.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a script and a package; `sys` is put back afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.chdir(tmp_path)
    body = "import sys, sibling\nprint([__name__, sys.argv, sys.path[0]])\n"
    for folder in ("scripts", "package"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scripts" / "sibling.py").write_text("")
    (tmp_path / "scripts" / "job.py").write_text(body)
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "job.py").write_text(body.replace(", sibling", ""))
    return tmp_path


def test_a_target_runs_as_python_would_run_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "scripts/job.py", "-x", "--version"]) == 0
    script = ["__main__", ["scripts/job.py", "-x", "--version"], str(here / "scripts")]
    assert main(["run", "package.job", "-x"]) == 0
    module = ["__main__", [str(here / "package" / "job.py"), "-x"], str(here)]
    assert capsys.readouterr().out == f"{script}\n{module}\n"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("raise ValueError('theirs')", ValueError),
        ("open('no-such-file')", FileNotFoundError),
        ("raise SystemExit(5)", SystemExit),
    ],
)
def test_errors_and_status_of_the_target_stay_its_own(
    here: Path, line: str, error: type[BaseException]
) -> None:
    (here / "fails.py").write_text(line)
    with pytest.raises(error):
        main(["run", "fails.py"])
