"""The recipes for several GPUs, really launched: two gloo processes train as one does."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from poprisk_integrations.cli.main import main

pytestmark = [
    pytest.mark.distributed,
    # transformers 5.23 deprecates a name that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PARAMETERS = 22_624  # of builtin:tiny-llama

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (it is in the test extra)",
)


def launch(recipe, config_file, strategy, out):
    """`accelerate launch` as the README says it, in two processes; what each rank found."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(RECIPES / recipe / config_file),
        "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0",
        "-m", "tests.distributed.dpo_recipe_run", str(out), strategy,
        "--config", str(RECIPES / recipe / "smoke.yaml"), "--output_dir", str(out / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def margins_by_pair(out):
    """Of the flip report: what each pair's margin was when it was first seen."""
    with (out / "flip_report.csv").open(newline="") as file:
        return {row["pair_id"]: float(row["margin"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in one process, on batches as large as those of two together."""
    out = tmp_path_factory.mktemp("one")
    smoke = RECIPES / "dpo-noisy-fsdp2" / "smoke.yaml"
    batch = ["--per_device_train_batch_size", "8", "--disable_tqdm", "true"]
    assert main(["dpo", "--config", str(smoke), "--output_dir", str(out), *batch]) == 0
    return out


@pytest.mark.parametrize(
    ("recipe", "config_file", "strategy", "kind"),
    [
        ("dpo-noisy-fsdp2", "accelerate.yaml", "fsdp2", "FSDP"),
        pytest.param(
            *("dpo-noisy-zero3", "accelerate.yaml", "zero3", "DEEPSPEED"),
            marks=[needs_deepspeed, pytest.mark.slow],
        ),
        pytest.param(
            *("dpo-noisy-fsdp2", "accelerate-smoke.yaml", "ddp", "MULTI_CPU"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("dpo-noisy-zero3", "accelerate-smoke.yaml", "ddp", "MULTI_CPU"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_equal_one(one, tmp_path, recipe, config_file, strategy, kind):
    ranks = launch(recipe, config_file, strategy, tmp_path)
    for found in ranks:
        assert (found["optimizer"], found["world_size"]) == ("PopRiskAdamW", 2)
        assert found["kind"] == kind
    if strategy == "ddp":
        assert [found["held"] for found in ranks] == [PARAMETERS, PARAMETERS]
    else:
        assert PARAMETERS <= sum(found["held"] for found in ranks) <= PARAMETERS + 64  # padding
        assert max(found["held"] for found in ranks) < 0.6 * PARAMETERS

    left, right = (
        load_file(tmp_path / "run/model.safetensors"),
        load_file(one / "model.safetensors"),
    )
    assert left.keys() == right.keys()
    start = load_file(one / "builtin-tiny-llama/model.safetensors")
    assert max(float((left[name] - right[name]).abs().max()) for name in right) < 1e-4
    assert max(float((start[name] - right[name]).abs().max()) for name in right) > 3e-3

    stop, alone = (
        json.loads((out / "poprisk_stop.json").read_text()) for out in (tmp_path / "run", one)
    )
    assert stop["onset_step"] == alone["onset_step"]
    assert len(stop["history"]) == len(alone["history"]) == 3
    for mine, theirs in zip(stop["history"], alone["history"], strict=True):
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-2, abs=1e-6), key

    margins, alone = (margins_by_pair(out) for out in (tmp_path / "run", one))
    assert margins.keys() == alone.keys()
    assert len(margins) == 96
    for pair_id, margin in alone.items():
        assert margins[pair_id] == pytest.approx(margin, abs=1e-4)
