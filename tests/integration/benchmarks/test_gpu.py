"""`gpu.sh` on a CPU: all that a machine with a GPU is to find out, rehearsed."""

import os
import re
import subprocess
import sys

import pytest
from benchmarks.harness.provenance import BENCHMARKS, hardware, read_csv
from benchmarks.optimizer_step_gpu import parts

SCRIPT = BENCHMARKS / "gpu.sh"


def run(out, *words, **env):
    given = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        ["bash", SCRIPT, *words, out], env=given, capture_output=True, text=True, timeout=590
    )
    return done.returncode, done.stdout


def test_the_parts_fit_into_eight_minutes():
    limits = re.findall(r"^(?:part|measure) \w+ (\d+)", SCRIPT.read_text(), flags=re.M)
    assert len(limits) == 8
    assert sum(map(int, limits)) <= 8 * 60


@pytest.mark.parametrize("name", ["capture", "scaler"])
def test_checks_that_a_cpu_can_make(name):
    rows = parts.PARTS[name]("cpu", True)
    assert all(row["passed"] for row in rows), rows


def test_a_part_that_hangs_or_fails_takes_no_other_with_it(tmp_path):
    """Each command is replaced by one that sleeps, fails or has nothing to run on."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\ncase \"$*\" in *'parts step'*) exec sleep 60 ;; *'parts capture'*) exit 1 ;; "
        "*'parts dpo'*) exit 3 ;; esac\n"
    )
    python.chmod(0o755)
    short = tmp_path / "recipes" / "benchmarks" / "gpu.sh"
    short.parent.mkdir(parents=True)
    short.write_text(SCRIPT.read_text().replace("measure step 110", "measure step 1"))
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", short, out], env={**os.environ, "PYTHON": str(python)}, capture_output=True
    )
    assert done.returncode == 1
    status = {row["part"]: row["status"] for row in read_csv(out / "parts.csv")}
    assert status == {
        **dict.fromkeys(("versions", "tests", "scaler", "ddp", "stop"), "ok"),
        "step": "out of time",
        "capture": "failed (1)",
        "dpo": "left out",
    }


@pytest.mark.slow
def test_the_whole_script_is_rehearsed(tmp_path):
    status, said = run(tmp_path, "--rehearse")
    assert status == 0, said
    assert {row["status"] for row in read_csv(tmp_path / "parts.csv")} == {"ok"}
    for name in ("step", *parts.PARTS):
        rows = read_csv(tmp_path / f"{name}_{hardware()}.csv")
        assert rows
        assert {row["device"] for row in rows} == {"cpu"}
    assert "passed" in (tmp_path / "tests.log").read_text()
