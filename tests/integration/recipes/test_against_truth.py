"""The scripts that draw the estimated test loss of SFT and DPO runs beside the true one."""

import pytest

from tests.helpers.recipe_script import load_script

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize(
    ("recipe", "size", "most"),
    [("trl-sft-stop", {"LISTS": 160}, 0.3), ("dpo-noisy-qwen2.5-0.5b", {"PAIRS": 160}, 0.2)],
)
def test_the_estimate_is_near_the_truth(recipe, size, most, tmp_path, monkeypatch, capsys):
    script = load_script(recipe, "against_truth.py")
    for name, value in {**size, "OTHERS": 60, "EPOCHS": 2}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path / "x.png")])
    script.main()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("loss: mean error")]
    assert float(line.split()[3].rstrip(";")) < most
    assert (tmp_path / "x.png").stat().st_size > 10_000
