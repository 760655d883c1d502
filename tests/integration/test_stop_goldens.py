"""Checkpoints in mid-window that an earlier release wrote end as its uninterrupted runs did."""

import json
import shutil
from pathlib import Path

import pytest
import transformers

from tests.goldens.stop import jobs
from tests.integration.lightning import toy

pytestmark = toy.third_party_warnings

GOLDENS = Path(jobs.__file__).parent
needs_v5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="the golden states are of transformers 5",
)


def _approximately(expected):
    """Plain numbers of another machine, on which sums may round differently."""
    if isinstance(expected, float):
        return pytest.approx(expected, rel=1e-4, abs=1e-12)
    if isinstance(expected, dict):
        return {key: _approximately(value) for key, value in expected.items()}
    if isinstance(expected, list):
        return [_approximately(value) for value in expected]
    return expected


# The name of its own ModelCheckpoint depends on which of Lightning's two packages is in use.
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")
@pytest.mark.parametrize("kind", jobs.KINDS)
@pytest.mark.parametrize("framework", [pytest.param("huggingface", marks=needs_v5), "lightning"])
def test_an_old_checkpoint_goes_on_to_the_same_end(tmp_path, framework, kind, caplog):
    golden = GOLDENS / f"{framework}_{kind}"
    expected = json.loads((golden / "end.json").read_text())
    if framework == "huggingface":
        name = f"checkpoint-{jobs.SAVED[kind]}"
        path = shutil.copytree(golden / name, tmp_path / "old" / name)
    else:
        path = shutil.copy(golden / "middle.ckpt", tmp_path / "middle.ckpt")
    ours, trainer = getattr(jobs, framework)(kind, tmp_path / "run", resume=str(path))
    found = jobs.ending(framework, kind, ours, trainer)
    assert found["step"] == expected["step"]
    assert found["rule"] == _approximately(expected["rule"])
    assert "afresh" not in caplog.text
    if kind != "cut":
        assert found["history"] == _approximately(expected["history"])
        assert found["history"][-1]["step"] > jobs.SAVED[kind]
