"""What a person sees of a run: a short line, while trackers and the history get every number."""

import pytest
from transformers import PrinterCallback, ProgressCallback, Trainer

import poprisk_integrations.huggingface as hf
from poprisk_integrations.huggingface.run_callback import for_the_console
from tests.helpers.tiny_trainer import Tracker, arguments, train


@pytest.mark.parametrize("printer", [PrinterCallback, ProgressCallback])
def test_at_most_three_of_our_numbers_on_a_line(tmp_path, capsys, printer):
    tracker = Tracker()
    ours = (
        hf.PopRiskEarlyStoppingCallback(criterion="signal", window=8, action="monitor"),
        hf.PopRiskLRCut(window=8),
        hf.PopRiskMonitorCallback(every_n_steps=2, per_layer=True),
    )
    args = arguments(tmp_path, max_steps=24, disable_tqdm=printer is PrinterCallback)
    trainer = train(args, tracker, *ours)
    captured = capsys.readouterr()
    lines = [x for x in (captured.out + captured.err).splitlines() if "loss'" in x]
    assert len(lines) == 7
    for line in lines:
        assert line.count("poprisk/") <= 3
    assert "'poprisk/signal_ratio'" in lines[-1]
    assert "'poprisk/open_fraction'" in lines[-1]
    history = [line for line in trainer.state.log_history if "loss" in line]
    for seen in (tracker.lines[5], history[5]):
        assert sum(key.startswith("poprisk/") for key in seen) > 30
        assert "poprisk/head/mean_gate" in seen


def test_lines_without_our_numbers_are_trainers_own(tmp_path, capsys):
    train(arguments(tmp_path, max_steps=4, optim="adamw_torch"))
    (line, last) = capsys.readouterr().out.splitlines()
    assert line.startswith("{'loss': ")
    assert "poprisk" not in line + last


@pytest.mark.skipif(
    not hasattr(Trainer, "_clip_grad_norm"), reason="transformers < 5.3 tells nobody the norm"
)
def test_an_ordinary_run_says_a_line_at_the_start_and_one_at_the_end(tmp_path, caplog, capsys):
    """Trainer's defaults: clipping at 1.0, any progress bar; nothing to warn of."""
    args = arguments(tmp_path, max_steps=24, max_grad_norm=1.0, report_to=[])
    train(args, hf.PopRiskEarlyStoppingCallback(criterion="signal"), hf.PopRiskMonitorCallback())
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("poprisk: ")]
    assert len(said) == 2
    assert "memorising can be noticed from step 16 of 24 on" in said[0]
    assert "did not stop this run; " in said[1]
    assert not caplog.records


def test_the_most_telling_three_are_shown_and_no_rate_that_cannot_be_told():
    names = ("lr_cuts", "open_fraction", "reward_accuracy", "noise_rate", "predicted_stop_step")
    logs = {"loss": 0.5, **{f"poprisk/{name}": 0.25 for name in (*names, "signal_ratio")}}
    told = {**logs, "poprisk/noise_rate_low": 0.2, "poprisk/noise_rate_high": 0.3}
    kept = {"loss", "poprisk/signal_ratio", "poprisk/predicted_stop_step", "poprisk/noise_rate"}
    assert set(for_the_console(told)) == kept
    untold = {**logs, "poprisk/noise_rate_low": 0.0, "poprisk/noise_rate_high": 0.4}
    kept = kept - {"poprisk/noise_rate"} | {"poprisk/reward_accuracy"}
    assert set(for_the_console(untold)) == kept
    assert len(untold) == 9  # trackers get the dict itself
