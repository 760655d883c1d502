"""The recipe two-node-torchrun: what its shell files start, with stand-ins that note it."""

import os
import re
import shutil
import subprocess

import pytest

from tests.helpers.recipe_script import RECIPES

RECIPE = RECIPES / "two-node-torchrun"
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="bash is not installed")

# What each notes goes to a file of its own: two of them run at once.
STAND_INS = {
    "torchrun": 'printf "%s\\n" "$*" > "$NOTES/torchrun.$$"; exit "${FAIL:-0}"',
    "scontrol": 'echo node0; echo node1; echo "$*" > "$NOTES/scontrol"',
    "srun": 'shift; "$@" && "$@"',
    "ssh": 'echo "$2" > "$NOTES/ssh.$2"; exec bash -c "$3"',
}


@pytest.fixture
def run(tmp_path):
    """Runs a file of the recipe where the stand-ins are found first."""
    stand_ins, notes = tmp_path / "bin", tmp_path / "notes"
    stand_ins.mkdir()
    notes.mkdir()
    for name, body in STAND_INS.items():
        path = stand_ins / name
        path.write_text(f"#!{BASH}\n{body}\n")
        path.chmod(0o755)

    def start(*command, **variables):
        path = f"{stand_ins}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "NOTES": str(notes), **variables}
        done = subprocess.run(
            [BASH, *command], cwd=RECIPE, env=env, capture_output=True, text=True, timeout=60
        )
        return done, sorted(note.read_text().strip() for note in notes.glob("torchrun.*"))

    return start


def told(endpoint, run_id, wait="600", local="", nproc="gpu"):
    local = f" --local-addr {local}" if local else ""
    return (
        f"--nnodes 2 --nproc-per-node {nproc} --rdzv-backend c10d --rdzv-endpoint {endpoint} "
        f"--rdzv-id {run_id} --rdzv-conf join_timeout={wait}{local} "
        "train.py --config config.yaml --seed 3"
    )


ARGUMENTS = ("--config", "config.yaml", "--seed", "3")


def test_node(run):
    done, (line,) = run("node.sh", *ARGUMENTS, HEAD="node0")
    assert (done.returncode, line) == (0, told("node0:29500", "poprisk"))


def test_node_needs_a_head(run):
    done, lines = run("node.sh", *ARGUMENTS)
    assert done.returncode != 0
    assert "name the node where the agents meet" in done.stderr
    assert not lines


def test_slurm(run):
    variables = {"SLURM_SUBMIT_DIR": str(RECIPE), "SLURM_JOB_NODELIST": "node[0-1]"}
    variables |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "4711007"}
    done, lines = run("slurm.sbatch", *ARGUMENTS, **variables)
    assert done.returncode == 0, done.stderr
    assert lines == [told("node0:21007", "4711007")] * 2
    options = re.findall(r"^#SBATCH --(\S+)", (RECIPE / "slurm.sbatch").read_text(), re.M)
    assert {"nodes=2", "ntasks-per-node=1", "requeue"} <= set(options)


def test_ssh(run):
    done, lines = run("ssh.sh", "node0", "node1", "--", *ARGUMENTS, PORT="29777", WAIT="9")
    assert done.returncode == 0, done.stderr
    assert len(lines) == 2
    (run_id,) = {re.search(r"--rdzv-id (\S+)", line)[1] for line in lines}
    nodes = ("node0", "node1")
    assert lines == [told("node0:29777", run_id, wait="9", local=node) for node in nodes]


def test_ssh_fails_with_a_node_and_without_nodes(run):
    assert run("ssh.sh", "node0", "node1", "--", *ARGUMENTS, FAIL="3")[0].returncode != 0
    for arguments in (("--", *ARGUMENTS), ARGUMENTS, ()):
        done = run("ssh.sh", *arguments)[0]
        assert done.returncode == 2
        assert done.stderr.startswith("usage: bash ssh.sh NODE ...")


def test_shell_files_say_what_they_take():
    text = (RECIPE / "node.sh").read_text()
    used = set(re.findall(r"\$\{?([A-Z_]+)", text)) - {"SCRIPT"}
    assert used == set(re.findall(r"^# ([A-Z_]+) +\S", text, re.M))
