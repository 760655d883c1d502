"""LightningCLI: optimizer and callbacks by class path, with typed arguments."""

import pytest
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.lightning import PopRiskEarlyStopping, PopRiskMonitor, PopRiskOptimizer
from tests.integration.lightning import toy

pytestmark = [
    *toy.third_party_warnings,
    pytest.mark.filterwarnings("ignore:`Classifier.configure_optimizers` will be overridden"),
    # LightningCLI uses what newer jsonargparse deprecates.
    pytest.mark.filterwarnings(r"ignore:\s*.*(Jsonargparse|deprecated in v4)"),
]

LAYER = "poprisk_integrations.lightning"


class Classifier(toy.Classifier):
    """Arguments that a command line can give."""

    def __init__(self, width: int = 32):
        super().__init__(width=width)

    def train_dataloader(self) -> DataLoader:
        return toy.loader()


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Parses as if the arguments had been typed."""
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 20}
    trainer |= {"default_root_dir": str(tmp_path), **dict.fromkeys(names, False)}

    def parse(*arguments):
        monkeypatch.setattr("sys.argv", ["train.py", *arguments])
        settings = {"trainer_defaults": trainer, "seed_everything_default": 0}
        return LightningCLI(Classifier, run=False, save_config_callback=None, **settings)

    return parse


def callback_of(run, cls):
    (found,) = [c for c in run.trainer.callbacks if type(c) is cls]
    return found


def test_optimizer_and_stop_by_class_path(cli):
    run = cli(
        "--optimizer=poprisk_integrations.PopRiskAdamW",
        "--optimizer.lr=0.02",
        "--optimizer.gate=hard",
        "--optimizer.alpha=0.5",
        f"--trainer.callbacks+={LAYER}.PopRiskEarlyStopping",
        "--trainer.callbacks.criterion=signal",
        "--trainer.callbacks.window=8",
        "--trainer.callbacks.kappa=2.0",
        "--trainer.callbacks.restore=null",
        f"--trainer.callbacks+={LAYER}.PopRiskMonitor",
        "--trainer.callbacks.every_n_steps=4",
        "--trainer.callbacks.per_layer=2",
    )
    run.trainer.fit(run.model)
    (optimizer,) = run.trainer.optimizers
    assert type(optimizer) is PopRiskAdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["gate"], group["alpha"]) == (0.02, "hard", 0.5)
    assert group["collect_stats_every"] == 4
    assert callback_of(run, PopRiskMonitor).per_layer == 2
    stop = callback_of(run, PopRiskEarlyStopping)
    assert (stop.window, stop.restore) == (8, None)
    assert run.trainer.global_step == stop.stopped_step > stop.onset_step > 0


def test_replacement_by_class_path(cli):
    run = cli(
        f"--trainer.callbacks+={LAYER}.PopRiskOptimizer",
        "--trainer.callbacks.gate=snr",
        "--trainer.callbacks.alpha=fresh",
        "--trainer.max_epochs=1",
    )
    run.trainer.fit(run.model)
    group = run.trainer.optimizers[0].param_groups[0]
    assert (group["gate"], group["alpha"], group["lr"]) == ("snr", "fresh", 1e-2)
    assert callback_of(run, PopRiskOptimizer).options["alpha"] == "fresh"


def test_a_config_file_round_trips(tmp_path, cli):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
optimizer:
  class_path: poprisk_integrations.PopRiskAdamW
  init_args: {{lr: 0.02, betas: [0.8, 0.99], alpha: calibrated}}
trainer:
  max_epochs: 1
  callbacks:
    - class_path: {LAYER}.PopRiskEarlyStopping
      init_args: {{criterion: signal, window: auto, action: monitor, restore: onset}}
    - class_path: {LAYER}.PopRiskMonitor
"""
    )
    run = cli("--config", str(config))
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(run.parser.dump(run.config, skip_none=False))
    again = cli("--config", str(dumped))
    again.trainer.fit(again.model)
    stop = callback_of(again, PopRiskEarlyStopping)
    assert (stop.window, stop.action, stop.restore) == ("auto", "monitor", "onset")
    assert callback_of(again, PopRiskMonitor).every_n_steps == 50
    assert tuple(again.trainer.optimizers[0].param_groups[0]["betas"]) == (0.8, 0.99)


STOP = f"--trainer.callbacks+={LAYER}.PopRiskEarlyStopping"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([STOP, "--trainer.callbacks.window=sometimes"], "window"),
        ([STOP, "--trainer.callbacks.action=halt"], "action"),
        ([STOP, "--trainer.callbacks.patiences=3"], "patiences"),
        (["--optimizer=poprisk_integrations.PopRiskAdamW", "--optimizer.gates=soft"], "gates"),
    ],
)
def test_a_wrong_argument_is_named(cli, capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        cli(*arguments)
    assert stopped.value.code != 0
    assert named in capsys.readouterr().err
