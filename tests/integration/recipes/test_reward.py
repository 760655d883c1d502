"""The recipe reward-noisy."""

import json
import re

import pytest

from poprisk_integrations.cli.main import main
from tests.helpers.recipe_script import RECIPES, load_script

# transformers 5.23 deprecates a name that TRL 1.16 still uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

FOLDER = RECIPES / "reward-noisy"


@pytest.fixture(scope="module")
def script():
    return load_script("reward-noisy")


def test_config_parses(script):
    config = ["--config", str(FOLDER / "config.yaml"), "--use_cpu", "true", "--bf16", "false"]
    data, args, model, flips = script.parse(config)
    assert data.dataset_name == "trl-lib/ultrafeedback_binarized"
    assert model.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert (args.optim, args.optim_args) == ("poprisk_adamw", "false_open_rate=0.05")
    assert (args.noise, args.noise_rate, args.stop) == ("auto", None, True)
    assert (flips.flip_rate, flips.flip_seed) == (0.3, 0)
    plain = script.parse([*config, *["--optim", "adamw_torch", "--noise", "off", "--no_stop"]])[1]
    assert (plain.optim, plain.noise, plain.stop) == ("adamw_torch", "off", False)
    with pytest.raises(ValueError, match="flop_rate"):
        script.parse([*config, "--flop_rate", "0.1"])


def test_smoke(script, offline, capsys):
    trainer = script.main(["--config", str(FOLDER / "smoke.yaml"), "--disable_tqdm", "true"])
    assert type(trainer.optimizer.optimizer).__name__ == "PopRiskAdamW"
    out = offline / "out-smoke"
    assert list(offline.iterdir()) == [out]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("eval_poprisk/margin_p50" in line for line in history)
    assert json.loads((out / "label_flips.json").read_text())["num_flipped"] == 29
    assert json.loads((out / "poprisk_noise.json").read_text())["num_pairs"] == 96
    windows = json.loads((out / "poprisk_stop.json").read_text())["history"]
    first, last = windows[0], windows[-1]
    assert last["estimated_test_loss"] > first["estimated_test_loss"]
    assert last["train_reward_accuracy"] > 0.9 > last["estimated_test_reward_accuracy"]
    assert (out / "model.safetensors").is_file()
    assert '"train-0"' in (out / "flip_report.csv").read_text()
    capsys.readouterr()
    assert main(["flips", "out-smoke"]) == 0
    assert "29 labels were swapped on purpose" in capsys.readouterr().out
    assert main(["report", str(out), "--out", str(offline / "page.html")]) == 0


def test_against_truth(monkeypatch, capsys, tmp_path):
    script = load_script("reward-noisy", "against_truth.py")
    for name, value in {"PAIRS": 300, "OTHERS": 60, "EPOCHS": 1}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "disable_progress_bars", lambda: None)  # of all other tests, too
    picture = tmp_path / "margins.png"
    monkeypatch.setattr("sys.argv", ["x", "--seeds", "1", "--picture", str(picture)])
    script.main()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("seed 0: noise")]
    found = re.search(r"AUC of the flip report (\S+), held-out accuracy (\S+), estimated", line)
    assert 0.5 < float(found[1]) <= 1
    assert 0.3 < float(found[2]) < 1
    assert picture.stat().st_size > 10_000


def test_pairs_that_express_no_preference_are_left_out(script):
    pairs = script.load_pairs("builtin:tiny-pairs")["train"].select(range(4))
    rows = [*pairs]
    rows[1]["rejected"] = rows[1]["chosen"]
    kept = script.usable(type(pairs).from_list(rows))
    assert script.source_rows(kept) == [0, 2, 3]
