"""The launch recipes, really launched: several processes train as one does, and resume."""

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
from tests.distributed.launch_recipe_run import MIDDLE
from tests.helpers.recipe_script import RECIPES, load_script

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    # transformers 5.23 deprecates a name that TRL 1.16 still uses.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
]
ROOT = Path(__file__).parents[2]
LAUNCH = RECIPES / "multi-gpu-launch"
NODES = RECIPES / "two-node-torchrun"
PARAMETERS = 22_624  # of builtin:tiny-llama
STEPS = 8
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (it is in the test extra)",
)
BY_ACCELERATE = ["-m", "accelerate.commands.launch", "--mixed_precision", "no"]
BY_ACCELERATE += ["--num_processes", "2", "--main_process_port", "0"]
BY_TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment():
    """With this interpreter's torchrun first, and no second rank of anything."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **ENV, "PATH": path, "PYTHONPATH": str(ROOT)}


def finished(command, cwd, timeout=300, **variables):
    return subprocess.run(
        command,
        cwd=cwd,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def largest_difference(left, right):
    left, right = load_file(left), load_file(right)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in right)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in one process, on batches as large as those of two together."""
    out = tmp_path_factory.mktemp("one")
    batch = ["--per_device_train_batch_size", "8", "--disable_tqdm", "true"]
    script = load_script("multi-gpu-launch")
    script.main(["--config", str(LAUNCH / "smoke.yaml"), "--output_dir", str(out), *batch])
    return out


def lines_for_torchrun():
    """What the README says to add to a configuration for FSDP2 without accelerate's launcher."""
    (lines,) = re.findall(r"```yaml\n(.*?)```", (LAUNCH / "README.md").read_text(), re.S)
    return lines


@pytest.mark.parametrize(
    ("launcher", "strategy", "kind", "options"),
    [
        ([*BY_ACCELERATE, "--config_file", "ddp.yaml"], "ddp", "MULTI_CPU", []),
        ([*BY_ACCELERATE, "--config_file", "fsdp2.yaml"], "fsdp2", "FSDP", []),
        pytest.param(
            *([*BY_ACCELERATE, "--config_file", "zero3.yaml"], "zero3", "DEEPSPEED", []),
            marks=needs_deepspeed,
        ),
        (BY_TORCHRUN, "fsdp2", "FSDP", []),
        pytest.param(
            *(BY_TORCHRUN, "zero3", "DEEPSPEED", ["--deepspeed", "zero3.json"]),
            marks=needs_deepspeed,
        ),
    ],
    ids=["ddp", "fsdp2", "zero3", "fsdp2 by torchrun", "zero3 by torchrun"],
)
def test_two_processes_equal_one_and_resume(one, tmp_path, launcher, strategy, kind, options):
    config = tmp_path / "smoke.yaml"
    text = (LAUNCH / "smoke.yaml").read_text()
    config.write_text(
        text + lines_for_torchrun() if (launcher, kind) == (BY_TORCHRUN, "FSDP") else text
    )
    worker = ["-m", "tests.distributed.launch_recipe_run", str(tmp_path), strategy]
    done = finished(
        [sys.executable, *launcher, *worker, "--config", str(config), *options], cwd=LAUNCH
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for run in (found for rank in ranks for found in rank.values()):
        assert (run["optimizer"], run["kind"], run["world_size"]) == ("PopRiskAdamW", kind, 2)
        assert run["global_step"] == STEPS
    for name in ("whole", "resumed"):
        held = [rank[name]["held"] for rank in ranks]
        if strategy == "ddp":
            assert held == [PARAMETERS, PARAMETERS]
        else:
            assert PARAMETERS <= sum(held) <= PARAMETERS + 64  # padding
            assert max(held) < 0.6 * PARAMETERS

    weights = tmp_path / "whole/model.safetensors"
    assert largest_difference(weights, one / "model.safetensors") < 1e-4
    assert largest_difference(weights, one / "builtin-tiny-llama/model.safetensors") > 3e-3
    assert largest_difference(tmp_path / "resumed/model.safetensors", weights) == 0.0
    assert (tmp_path / f"resumed/checkpoint-{MIDDLE}").exists() is False

    stop, alone = (json.loads((o / "poprisk_stop.json").read_text()) for o in (weights.parent, one))
    assert [row["step"] for row in stop["history"]] == [4, 8]
    for mine, theirs in zip(stop["history"], alone["history"], strict=True):
        assert mine["signal_ratio"] == pytest.approx(theirs["signal_ratio"], rel=1e-2)


def test_smoke_as_it_is(one, tmp_path, monkeypatch):
    """What `poprisk recipes run --smoke multi-gpu-launch` starts."""
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "run", "--smoke", "multi-gpu-launch", "--disable_tqdm", "true"]) == 0
    weights = tmp_path / "out-smoke/model.safetensors"
    assert largest_difference(weights, one / "model.safetensors") < 1e-4


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


def test_two_nodes_equal_one_node_of_two_processes(tmp_path):
    """What `poprisk recipes run --smoke two-node-torchrun` starts, and plain torchrun."""
    smoke = ["--config", str(NODES / "smoke.yaml"), "--output_dir"]
    done = finished([sys.executable, NODES / "rehearse.py", *smoke, "two"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    command = [sys.executable, *BY_TORCHRUN, NODES / "train.py", *smoke, "one"]
    done = finished(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    two, one = tmp_path / "two/model.safetensors", tmp_path / "one/model.safetensors"
    assert largest_difference(two, one) == 0.0
    start = tmp_path / "one/builtin-tiny-llama/model.safetensors"
    assert largest_difference(two, start) > 3e-3
    reports = [json.loads((p.parent / "poprisk_stop.json").read_text()) for p in (two, one)]
    assert reports[0]["history"] == reports[1]["history"]


def test_storage_of_each_node(tmp_path):
    """Nothing is shared: a restarted job needs the first node's checkpoint on the other, too."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    smoke = ["--config", str(NODES / "smoke.yaml")]
    for code, stderr in agents(nodes, *smoke):
        assert code == 0, stderr[-4000:]
    first, second = (node / "out-smoke" for node in nodes)
    before = first / "model.safetensors"
    kept = before.rename(tmp_path / "kept.safetensors")
    for out in (first, second):
        shutil.rmtree(out / f"checkpoint-{STEPS}")
    middle = f"checkpoint-{MIDDLE}"
    assert [path.name for path in (second / middle).iterdir()] == ["rng_state_1.pth"]
    shutil.copytree(first / middle, second / middle, dirs_exist_ok=True)
    for code, stderr in agents(nodes, *smoke, "--resume_from_checkpoint", "last"):
        assert code == 0, stderr[-4000:]
    assert largest_difference(before, kept) == 0.0
    history = json.loads((first / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == list(range(1, STEPS + 1))


def test_a_node_that_does_not_come_is_a_time_out(tmp_path):
    begin = time.monotonic()
    smoke = ["--config", str(NODES / "smoke.yaml")]
    ((code, stderr),) = agents([tmp_path / "alone"], *smoke, wait=3)
    assert code == 1
    assert "RendezvousTimeoutError" in stderr.splitlines()[-1]
    assert time.monotonic() - begin < 100
    assert not (tmp_path / "alone" / "out-smoke").exists()


def test_rehearsal_ends_when_a_node_fails(tmp_path):
    done = finished(
        [sys.executable, NODES / "rehearse.py", "--config", "missing.yaml"], cwd=tmp_path
    )
    assert done.returncode != 0
    assert "No such file or directory: 'missing.yaml'" in done.stderr
