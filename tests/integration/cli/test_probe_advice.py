"""Advice, case by case; names and groups of layers; sizes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from poprisk_integrations.cli.probe.advice import advise, noise_scale_text
from poprisk_integrations.cli.probe.report import state_bytes
from poprisk_integrations.cli.probe.sources import RunSizes
from poprisk_integrations.cli.probe.watch import parameter_names
from poprisk_integrations.core.sit_out_schedule import smallest_pool
from poprisk_integrations.diagnostics.layer_sample import layer_groups
from poprisk_integrations.diagnostics.probe import (
    DEFAULT_PRESET,
    STRICT_PRESET,
    GradientProbe,
    GroupProbe,
    PresetProbe,
)
from poprisk_integrations.diagnostics.probe.gates import ShadowGate, gate_verdict
from poprisk_integrations.diagnostics.probe.signal import NoiseScale
from poprisk_integrations.diagnostics.run_length import stop_outlook

WORKS = stop_outlook(1000, 100)


def preset(name: str, noise_open: float, expected: float, kept: float) -> PresetProbe:
    shadow = ShadowGate(
        open_fractions=(expected,), open_fraction=expected, noise_open=noise_open,
        mean_gate=0.4, update_norm_ratio=0.6,
    )  # fmt: skip
    return PresetProbe(
        name=name, alpha=0.2, half_open_snr=0.5, noise_open=noise_open, expected_open=expected,
        signal_kept=kept, measured=shadow, verdict=gate_verdict(noise_open, kept),
    )  # fmt: skip


def probe(
    *,
    ratio: float = 0.5,
    error: float = 0.05,
    expected: float = 0.4,
    strict: float = 0.8,
    default: float = 0.9,
    batch_size: int | None = 32,
) -> GradientProbe:
    total = GroupProbe(
        name="all", parameters=10, dead=0.0, snr=None, rms_snr_sq=ratio, rms_snr_sq_se=error,
        scale=NoiseScale(signal=ratio, noise=1.0, ratio=ratio, ratio_se=error), signal_ratio=4.2,
    )  # fmt: skip
    return GradientProbe(
        steps=30, nonfinite=0, clipped=1, sampled=1.0, betas=(0.9, 0.999), batch_size=batch_size,
        dataset_size=None, total=total, groups=(total,),
        presets=(
            preset(STRICT_PRESET, 0.05, expected, strict),
            preset(DEFAULT_PRESET, 0.3173, expected, default),
        ),
    )  # fmt: skip


GATE_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no signal": (
        {"ratio": 0.01, "error": 0.02, "strict": math.nan, "default": math.nan},
        ["agree no more than noise would", "above 640 examples", "take plain AdamW with the stop"],
    ),
    "all signal": (
        {"ratio": 4.0, "expected": 0.97},
        ["97 % of the coordinates pass", "would change little: take plain AdamW with the stop"],
    ),
    "selective": (
        {},
        ["default gate of PopRiskAdamW would keep 90 % of the signal", "68 % of pure noise",
         "0.60 times as long", "(false_open_rate=0.05 keeps 80 %", "worth a run",
         "well-tuned plain AdamW with the stop should do as well"],
    ),
    "only the default gate": (
        {"strict": 0.3, "default": 0.7},
        ["keep 70 % of the signal", "would keep no more than 30 % of it", "worth a run"],
    ),
    "too weak for any": (
        {"strict": 0.1, "default": 0.4},
        ["too weak in each coordinate", "40 % (default) and 10 % (false_open_rate=0.05)",
         "take plain AdamW with the stop."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GATE_CASES)
def test_advice_on_the_gate(case: str) -> None:
    numbers, expected = GATE_CASES[case]
    sentence, _ = advise(probe(**numbers), WORKS)
    for text in expected:
        assert text in sentence
    assert sentence.endswith(".")
    assert ". " not in sentence  # one sentence
    others = {c: advise(probe(**n), WORKS)[0] for c, (n, _) in GATE_CASES.items() if c != case}
    assert sentence not in others.values()


def test_the_stop_is_recommended_only_where_it_can_work() -> None:
    for stop in (stop_outlook(90, 100), stop_outlook(None, None)):
        for numbers, _ in GATE_CASES.values():
            assert "with the stop" not in advise(probe(**numbers), stop)[0]


@pytest.mark.parametrize(
    ("total", "epoch", "expected"),
    [
        (1000, 100, ["once in each of 10 passes over the data, in the last from {pool:.0f} of",
                     "probably still learning", "F = 4.2 +- 1.5"]),
        (None, 100, ["once per pass over the data. In the probed steps"]),
        (600, 3, ["from {pool:.0f} of the 96 examples, so with a wide band", "F = 0.42 +- 0.15",
                  "very probably memorising"]),
        (100, 100, ["will not act", "100 steps are at most one pass", "is the test loss"]),
        (120, 100, ["of 1.2 passes over the data, in the last from {pool:.0f} of the 3,200"]),
        (500, 1, ["once in each of 500 passes"]),
        (500, None, ["--batch-size and --dataset-size"]),
    ],
)  # fmt: skip
def test_advice_on_the_stop(total: int | None, epoch: int | None, expected: list[str]) -> None:
    _, sentence = advise(probe(), stop_outlook(total, epoch))
    examples, passes = 32 * (epoch or 1), (total or 1) / (epoch or 1)
    pool = smallest_pool(examples, share=0.15, epochs=passes)
    for text in expected:
        assert text.format(pool=pool) in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"ratio": 0.5, "error": 0.05}, "64 +- 6.4 examples"),
        ({"ratio": 0.01, "error": 0.001}, "3,200 +- 320 examples"),
        ({"ratio": 0.01, "error": 0.001, "batch_size": None}, "100 +- 10 batches"),
        ({"ratio": -0.01, "error": 0.02}, "above 1,067 examples"),
        ({"ratio": -0.1, "error": 0.02}, "not measurable"),
        ({"ratio": math.inf, "error": 0.0}, "0 examples"),
    ],
)
def test_noise_scale_in_words(numbers: dict[str, Any], text: str) -> None:
    assert noise_scale_text(probe(**numbers)) == text


def test_names_come_from_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = Wrapper(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}))
    lone = nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())[1:]}, {"params": [lone]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    params = [*groups[0]["params"], lone]
    names = parameter_names(optimizer, params)
    assert names == [
        "module.layers.0.bias", "module.layers.1.weight", "module.layers.1.bias", "group1.param0"
    ]  # fmt: skip
    assert list(layer_groups(names).values()) == ["layers.0", "layers.1", "layers.1", "group1"]


def test_sizes_that_the_user_gave_win() -> None:
    trainer = RunSizes(batch_size=8, dataset_size=80, epoch_steps=10, total_steps=100)
    assert RunSizes().or_else(trainer) == trainer
    said = RunSizes(batch_size=16, total_steps=7).or_else(trainer)
    assert said == RunSizes(batch_size=16, dataset_size=80, epoch_steps=5, total_steps=7)
    assert RunSizes(batch_size=4).or_else(RunSizes()).epoch_steps is None


def test_state_bytes_follow_the_optimizer() -> None:
    matrix, bias = torch.zeros(128, 128), torch.zeros(128)
    found = state_bytes([matrix, bias])
    count = matrix.numel() + bias.numel()
    assert found["float32 (8 B)"] == 8 * count
    assert found["temporal noise (12 B)"] == 12 * count
    assert found["bfloat16 (4 B)"] == 4 * count
    assert found["8bit (2.1 B)"] == round(2.125 * matrix.numel()) + 8 * bias.numel()


def test_another_optimizer_stays_what_it_is() -> None:
    sentence, _ = advise(probe(ratio=4.0, expected=0.97), WORKS, "SGD")
    assert sentence.endswith("take plain SGD with the stop.")


def test_f_is_divided_by_the_passes() -> None:
    """Thirty steps over ten batches see each example three times."""
    _, sentence = advise(replace(probe(), steps=30), stop_outlook(200, 10))
    assert "F = 1.4 +- 0.5 over" in sentence
