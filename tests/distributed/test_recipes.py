"""The recipes for several processes, really launched: they train as one does, and resume."""

import csv
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from poprisk_integrations.cli.main import main
from tests.distributed.recipe_run import MIDDLE
from tests.helpers.recipe_script import RECIPES, load_script

pytestmark = [
    pytest.mark.distributed,
    # transformers 5.23 deprecates a name that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
ROOT = Path(__file__).parents[2]
LAUNCH = RECIPES / "multi-gpu-launch"
NODES = RECIPES / "two-node-torchrun"
PARAMETERS = 22_624  # of builtin:tiny-llama
STEPS = 8  # half an epoch, in which nobody sits out: several processes train as one does
SIGNAL = ["--stop_criterion", "signal"]  # everybody is trained on, in any number of ranks
WINDOW = ["--stop_window", "4"]
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}

slow = pytest.mark.slow
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (it is in the test extra)",
)
BY_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def by_accelerate(config_file):
    options = ["--mixed_precision", "no", "--num_processes", "2", "--main_process_port", "0"]
    return ["-m", "accelerate.commands.launch", *options, "--config_file", str(config_file)]


def environment():
    """With this interpreter's torchrun first, and no second rank of anything."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **ENV, "PATH": path, "PYTHONPATH": str(ROOT)}


def finished(arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def launch(launcher, recipe, strategy, out, *options, cwd=ROOT):
    """The training runs of a recipe in two processes: (of rank 0, of rank 1) for each run."""
    worker = ["-m", "tests.distributed.recipe_run", recipe, str(out), strategy]
    done = finished([*launcher, *worker, *options], cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return list(zip(*ranks, strict=True))


def assert_made_of(ranks, strategy, kind):
    """PopRiskAdamW in two processes, sharded if the strategy shards."""
    for found in ranks:
        assert (found["optimizer"], found["kind"], found["world_size"]) == ("PopRiskAdamW", kind, 2)
    held = [found["held"] for found in ranks]
    if strategy == "ddp":
        assert held == [PARAMETERS, PARAMETERS]
    else:
        assert PARAMETERS <= sum(held) <= PARAMETERS + 64  # padding
        assert max(held) < 0.6 * PARAMETERS


def largest_difference(left, right):
    left, right = (load_file(path / "model.safetensors") for path in (left, right))
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in right)


def histories(*outs):
    reports = [json.loads((out / "poprisk_stop.json").read_text()) for out in outs]
    return [report["history"] for report in reports]


# `poprisk dpo` as the READMEs launch it.


def dpo(recipe, config_file, strategy, out, *options):
    launcher = by_accelerate(RECIPES / recipe / config_file)
    config = ["--config", str(RECIPES / recipe / "smoke.yaml"), "--output_dir", str(out / "run")]
    (ranks,) = launch(launcher, "dpo", strategy, out, *config, *options)
    return ranks


def margins_by_pair(out):
    """Of the flip report: what each pair's margin was when it was first seen."""
    with (out / "flip_report.csv").open(newline="") as file:
        return {row["pair_id"]: float(row["margin"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def dpo_alone(tmp_path_factory):
    """The run in one process, on batches as large as those of two together."""
    out = tmp_path_factory.mktemp("one")
    config = ["--config", str(RECIPES / "dpo-noisy-fsdp2" / "smoke.yaml")]
    batch = ["--per_device_train_batch_size", "8", "--disable_tqdm", "true"]
    assert main(["dpo", *config, "--output_dir", str(out), *batch, *SIGNAL, *WINDOW]) == 0
    return out


@pytest.mark.parametrize(
    ("recipe", "config_file", "strategy", "kind"),
    [
        ("dpo-noisy-fsdp2", "accelerate.yaml", "fsdp2", "FSDP"),
        pytest.param(
            *("dpo-noisy-zero3", "accelerate.yaml", "zero3", "DEEPSPEED"),
            marks=[needs_deepspeed, slow],
        ),
        pytest.param("dpo-noisy-fsdp2", "accelerate-smoke.yaml", "ddp", "MULTI_CPU", marks=slow),
        pytest.param("dpo-noisy-zero3", "accelerate-smoke.yaml", "ddp", "MULTI_CPU", marks=slow),
    ],
)
def test_dpo_in_two_processes_equals_one(dpo_alone, tmp_path, recipe, config_file, strategy, kind):
    assert_made_of(dpo(recipe, config_file, strategy, tmp_path, *SIGNAL, *WINDOW), strategy, kind)
    run = tmp_path / "run"
    assert largest_difference(run, dpo_alone) < 1e-4
    assert largest_difference(dpo_alone / "builtin-tiny-llama", dpo_alone) > 3e-3

    history, alone = histories(run, dpo_alone)
    assert len(history) == 3
    for mine, theirs in zip(history, alone, strict=True):
        measured = {key: value for key, value in theirs.items() if value is not None}
        assert measured["signal_ratio"] > 0
        for key, value in measured.items():
            assert mine[key] == pytest.approx(value, rel=1e-2, abs=1e-6), key

    margins = margins_by_pair(run)
    assert len(margins) == 96
    assert margins == pytest.approx(margins_by_pair(dpo_alone), abs=1e-4)


@slow
@pytest.mark.parametrize(
    ("recipe", "strategy"),
    [
        ("dpo-noisy-fsdp2", "fsdp2"),
        pytest.param("dpo-noisy-zero3", "zero3", marks=needs_deepspeed),
    ],
)
def test_pairs_sit_out_of_a_sharded_run(tmp_path, recipe, strategy):
    dpo(recipe, "accelerate.yaml", strategy, tmp_path)
    report = json.loads((tmp_path / "run/poprisk_stop.json").read_text())
    assert report["criterion"] == "risk"
    assert report["switched_off"] is None
    assert [row["epoch"] for row in report["history"]] == [1.0, 2.0]
    for row in report["history"]:
        assert 0.0 < row["estimated_test_reward_accuracy"] < 1.0
        assert row["estimated_test_loss_se"] > 0.0
    margins = margins_by_pair(tmp_path / "run")
    assert len(margins) == 96
    assert all(margin == margin for margin in margins.values())


# The script of multi-gpu-launch.


@pytest.fixture(scope="module")
def script_alone(tmp_path_factory):
    """The run in one process, on batches as large as those of two together."""
    out = tmp_path_factory.mktemp("one")
    batch = ["--per_device_train_batch_size", "8", "--disable_tqdm", "true"]
    script = load_script("multi-gpu-launch")
    script.main(["--config", str(LAUNCH / "smoke.yaml"), "--output_dir", str(out), *batch, *SIGNAL])
    return out


def lines_for_torchrun():
    """What the README says to add to a configuration for FSDP2 without accelerate's launcher."""
    (lines,) = re.findall(r"```yaml\n(.*?)```", (LAUNCH / "README.md").read_text(), re.S)
    return lines


@slow
@pytest.mark.parametrize(
    ("launcher", "strategy", "kind", "options"),
    [
        (by_accelerate("ddp.yaml"), "ddp", "MULTI_CPU", []),
        (by_accelerate("fsdp2.yaml"), "fsdp2", "FSDP", []),
        pytest.param(
            *(by_accelerate("zero3.yaml"), "zero3", "DEEPSPEED", []), marks=needs_deepspeed
        ),
        (BY_TORCHRUN, "fsdp2", "FSDP", []),
        pytest.param(
            *(BY_TORCHRUN, "zero3", "DEEPSPEED", ["--deepspeed", "zero3.json"]),
            marks=needs_deepspeed,
        ),
    ],
    ids=["ddp", "fsdp2", "zero3", "fsdp2 by torchrun", "zero3 by torchrun"],
)
def test_script_in_two_processes_equals_one_and_resumes(
    script_alone, tmp_path, launcher, strategy, kind, options
):
    config = tmp_path / "smoke.yaml"
    text = (LAUNCH / "smoke.yaml").read_text()
    config.write_text(
        text + lines_for_torchrun() if (launcher, kind) == (BY_TORCHRUN, "FSDP") else text
    )
    options = ["--config", str(config), *options, *SIGNAL]
    for ranks in launch(launcher, "launch", strategy, tmp_path, *options, cwd=LAUNCH):
        assert_made_of(ranks, strategy, kind)
        assert [found["global_step"] for found in ranks] == [STEPS, STEPS]

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert largest_difference(whole, script_alone) < 1e-4
    assert largest_difference(whole, script_alone / "builtin-tiny-llama") > 3e-3
    assert largest_difference(resumed, whole) == 0.0
    assert not (resumed / f"checkpoint-{MIDDLE}").exists()

    history, alone = histories(whole, script_alone)
    assert [row["step"] for row in history] == [4, 8]
    for mine, theirs in zip(history, alone, strict=True):
        assert mine["signal_ratio"] == pytest.approx(theirs["signal_ratio"], rel=1e-2)


@slow
def test_smoke_as_it_is(script_alone, tmp_path, monkeypatch):
    """What `poprisk recipes run --smoke multi-gpu-launch` starts."""
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "run", "--smoke", "multi-gpu-launch", "--disable_tqdm", "true"]) == 0
    assert largest_difference(tmp_path / "out-smoke", script_alone) < 1e-4


# Two nodes.


def agents(cwds, *arguments, wait=60):
    """One `node.sh` per directory, in it, all on loopback addresses; (status, stderr) of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"HEAD": "127.0.0.1", "ADDRESS": "127.0.0.1", "PORT": str(port), "PER_NODE": "1"}
    told |= {"WAIT": str(wait), "SCRIPT": str(NODES / "train.py")}
    command = ["bash", str(NODES / "node.sh"), *arguments]
    started = []
    for number, cwd in enumerate(cwds):
        cwd.mkdir(exist_ok=True)
        with (cwd / f"stderr{number}").open("w") as pipe:
            env = {**environment(), **told}
            started.append(subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe))
    try:
        codes = [agent.wait(timeout=240) for agent in started]
    finally:
        for agent in started:
            agent.kill()
    said = [(cwd / f"stderr{number}").read_text() for number, cwd in enumerate(cwds)]
    return list(zip(codes, said, strict=True))


@slow
def test_two_nodes_equal_one_node_of_two_processes(tmp_path):
    """What `poprisk recipes run --smoke two-node-torchrun` starts, and plain torchrun."""
    smoke = ["--config", str(NODES / "smoke.yaml"), *SIGNAL, "--output_dir"]
    done = finished([NODES / "rehearse.py", *smoke, "two"], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    done = finished([*BY_TORCHRUN, NODES / "train.py", *smoke, "one"], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    two, one = tmp_path / "two", tmp_path / "one"
    assert largest_difference(two, one) == 0.0
    assert largest_difference(two, one / "builtin-tiny-llama") > 3e-3
    history, expected = histories(two, one)
    assert history == expected


@slow
def test_storage_of_each_node(tmp_path):
    """Nothing is shared: a restarted job needs the first node's checkpoint on the other, too."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    smoke = ["--config", str(NODES / "smoke.yaml")]
    for code, stderr in agents(nodes, *smoke):
        assert code == 0, stderr[-4000:]
    first, second = (node / "out-smoke" for node in nodes)
    kept = tmp_path / "kept"
    kept.mkdir()
    (first / "model.safetensors").rename(kept / "model.safetensors")
    for out in (first, second):
        shutil.rmtree(out / f"checkpoint-{STEPS}")
    middle = f"checkpoint-{MIDDLE}"
    assert [path.name for path in (second / middle).iterdir()] == ["rng_state_1.pth"]
    shutil.copytree(first / middle, second / middle, dirs_exist_ok=True)
    for code, stderr in agents(nodes, *smoke, "--resume_from_checkpoint", "last"):
        assert code == 0, stderr[-4000:]
    assert largest_difference(first, kept) == 0.0
    history = json.loads((first / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == list(range(1, STEPS + 1))


@slow
def test_a_node_that_does_not_come_is_a_time_out(tmp_path):
    begin = time.monotonic()
    smoke = ["--config", str(NODES / "smoke.yaml")]
    ((code, stderr),) = agents([tmp_path / "alone"], *smoke, wait=3)
    assert code == 1
    assert "RendezvousTimeoutError" in stderr.splitlines()[-1]
    assert time.monotonic() - begin < 100
    assert not (tmp_path / "alone" / "out-smoke").exists()


@slow
def test_rehearsal_ends_when_a_node_fails(tmp_path):
    done = finished([NODES / "rehearse.py", "--config", "missing.yaml"], tmp_path)
    assert done.returncode != 0
    assert "No such file or directory: 'missing.yaml'" in done.stderr
