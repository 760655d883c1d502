"""The recipe lightning-cli: optimizer, monitor and stop by class path, changed by arguments."""

import csv
import json
import shutil

import pytest
import yaml

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskEarlyStopping
from tests.helpers.recipe_script import RECIPES, load_script
from tests.integration.lightning import toy

pytestmark = [
    *toy.third_party_warnings,
    # LightningCLI uses what newer jsonargparse deprecates.
    pytest.mark.filterwarnings(r"ignore:\s*.*(Jsonargparse|deprecated in v4)"),
    pytest.mark.filterwarnings("ignore:.*(exists and is not empty|logs directory)"),
]
RECIPE = RECIPES / "lightning-cli"


@pytest.fixture(scope="module")
def script():
    return load_script("lightning-cli", "main.py")


@pytest.fixture
def typed(script, copied, monkeypatch):
    """Runs the script as if the arguments had been typed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["main.py", *arguments])
        return script.main()

    return run


@pytest.fixture
def copied(offline):
    """As a user has it after `poprisk recipes copy`: in the working directory."""
    shutil.copytree(RECIPE, offline, dirs_exist_ok=True)
    return offline


def test_fit_ends_and_test_leaves_its_files_alone(typed, copied):
    before = (copied / "config.yaml").read_bytes()
    run = typed("fit", "--config", "config.yaml")
    (optimizer,) = run.trainer.optimizers
    assert type(optimizer) is PopRiskAdamW
    assert optimizer.param_groups[0]["false_open_rate"] == 0.05
    report = json.loads((copied / "out/poprisk_stop.json").read_text())
    assert report["criterion"] == "risk"
    assert not report["stopped"]  # the gate keeps the test loss from rising
    assert len(report["history"]) == 30
    assert run.trainer.global_step == 30 * 38
    with (copied / "out/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for column in ("train_loss", "poprisk/estimated_test_loss", "poprisk/open_fraction"):
        assert any(row[column] for row in rows)
    written = {path: path.read_bytes() for path in (copied / "out").rglob("*") if path.is_file()}

    checkpoint = ["--ckpt_path", "out/checkpoints/last.ckpt"]
    test = ["test", "--config", "config.yaml", "--trainer.logger.version", "test", *checkpoint]
    accuracy = float(typed(*test).trainer.callback_metrics["clean_accuracy"])
    assert accuracy > 0.89  # 0.7 of the labels it has seen are right
    assert all(path.read_bytes() == content for path, content in written.items())
    assert (copied / "config.yaml").read_bytes() == before


def test_the_command_line_wins_and_the_last_callback_is_the_stop(typed, copied):
    changes = ["--optimizer.gate", "hard", "--trainer.callbacks.patience", "3"]
    epochs = ["--trainer.max_epochs", "2"]  # at one the stop warns that it cannot
    run = typed("fit", "--config", "config.yaml", *changes, *epochs)
    assert run.trainer.optimizers[0].param_groups[0]["gate"] == "hard"
    (stop,) = [c for c in run.trainer.callbacks if isinstance(c, PopRiskEarlyStopping)]
    assert stop.patience == 3
    settings = yaml.safe_load((copied / "out/settings.yaml").read_text())
    assert settings["optimizer"]["init_args"]["gate"] == "hard"


def test_printed_settings_are_whole(typed, copied, capsys):
    arguments = ["fit", "--config", "config.yaml", "--optimizer.lr", "0.5", "--print_config"]
    with pytest.raises(SystemExit) as left:
        typed(*arguments)
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["optimizer"]["class_path"] == "poprisk_integrations.PopRiskAdamW"
    assert printed["optimizer"]["init_args"]["lr"] == 0.5
    stop = printed["trainer"]["callbacks"][-1]
    assert stop["class_path"] == "poprisk_integrations.lightning.PopRiskEarlyStopping"
    assert stop["init_args"]["threshold"] == 1.0
    assert not (copied / "out").exists()
