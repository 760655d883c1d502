"""A whole probe of gradients whose SNRs are known."""

import math
from inspect import signature

import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.diagnostics.probe import (
    DEFAULT_PRESET,
    GradientHistory,
    probe_gradients,
)
from poprisk_integrations.diagnostics.probe.gates import PRESETS, open_probability
from poprisk_integrations.diagnostics.run_length import stop_outlook

STEPS = 30


def probed(means, layers=None, steps=STEPS, scale=1.0, **options):
    """Probe independent Gaussian gradients of different size and the given SNRs."""
    params = [nn.Parameter(torch.zeros(mean.shape)) for mean in means]
    sizes = [torch.randn(mean.shape).exp() for mean in means]
    history = GradientHistory(params, steps)
    for _ in range(steps):
        for param, mean, size in zip(params, means, sizes, strict=True):
            param.grad = scale * size * (mean + torch.randn(mean.shape))
        history.record()
    options = {"batch_size": 32, "dataset_size": 1600, **options}
    return probe_gradients(history, layers or [str(i) for i in range(len(means))], **options), sizes


def test_known_snrs_are_recovered_per_group():
    means = [torch.zeros(20_000), torch.full((10_000,), 0.5), torch.full((10_000,), 1.0)]
    probe, sizes = probed(means)
    quiet, middle, loud = probe.groups
    assert not quiet.has_signal()
    assert quiet.rms_snr < 0.05
    for group, snr in ((middle, 0.5), (loud, 1.0)):
        assert group.has_signal()
        assert group.rms_snr == pytest.approx(snr, abs=0.02)
        assert group.snr.quantile(0.5) == pytest.approx(snr, rel=0.1)
    assert probe.total.rms_snr_sq == pytest.approx((0.25 + 1.0) / 4, rel=0.03)
    signal = sum(float((m * s).square().sum()) for m, s in zip(means, sizes, strict=True))
    ratio = signal / sum(float(size.square().sum()) for size in sizes)
    assert abs(probe.total.scale.ratio - ratio) < 3 * probe.total.scale.ratio_se
    assert probe.total.scale.ratio_se < 0.1 * ratio


def test_expected_and_measured_open_fractions():
    means = [torch.zeros(15_000), torch.full((5_000,), 0.75)]
    probe, _ = probed(means)
    assert [p.name for p in probe.presets] == list(PRESETS)
    for preset in probe.presets:
        noise, signal = open_probability(torch.tensor([0.0, 0.75]), preset.alpha, 0.9).tolist()
        assert preset.noise_open == pytest.approx(noise)
        assert preset.expected_open == pytest.approx(0.75 * noise + 0.25 * signal, abs=0.03)
        early = preset.measured.noise_open
        assert preset.measured.open_fractions[0] == pytest.approx(early, abs=0.03)
        assert preset.measured.open_fractions[1] == pytest.approx(signal, abs=0.06)
        assert preset.signal_kept == pytest.approx(signal, abs=0.06)
    assert {p.name: p.verdict for p in probe.presets} == {
        "fresh (paper)": "lethal",
        "calibrated 5 %": "selective",
        "calibrated 32 %": "selective",
        "finite b/(n-b)": "vacuous",  # 50 batches per epoch
    }


def test_pure_noise_has_no_signal_to_keep():
    probe, _ = probed([torch.zeros(5_000)])
    assert not probe.total.has_signal()
    assert math.isnan(probe.preset("calibrated 5 %").signal_kept)
    assert probe.preset("calibrated 5 %").verdict == "no signal"
    assert probe.preset("finite b/(n-b)").verdict == "vacuous"
    assert probe.total.signal_ratio == pytest.approx(1.0, abs=0.05)
    assert probe.total.rms_snr_sq == pytest.approx(0.0, abs=0.004)


def test_one_loud_layer_does_not_speak_for_the_rest():
    probe, _ = probed([torch.full((2_000,), 3.0), torch.full((38_000,), 0.15)])
    strict = probe.preset("calibrated 5 %")
    assert strict.signal_kept < 0.3
    assert strict.verdict == "lethal"
    power = (2_000 * 9.0) / (2_000 * 9.0 + 38_000 * 0.15**2)
    assert power > 0.9  # of the squared SNR, which alone would have called it selective


def test_scale_of_the_loss_does_not_matter():
    first, second = (
        (torch.manual_seed(3), probed([torch.full((2_000,), 0.5)], scale=scale)[0])[1]
        for scale in (1.0, 1e-6)
    )
    assert second.total.scale.ratio == pytest.approx(first.total.scale.ratio, rel=1e-4)
    assert second.total.rms_snr == pytest.approx(first.total.rms_snr, rel=1e-4)
    for a, b in zip(first.presets, second.presets, strict=True):
        assert b.measured.open_fraction == pytest.approx(a.measured.open_fraction, abs=2e-3)
        assert b.expected_open == pytest.approx(a.expected_open, abs=1e-3)


def test_sampled_coordinates_stand_for_the_whole():
    """Only a part of a large tensor is read; a small one beside it keeps its due weight."""
    torch.manual_seed(1)
    means = [torch.full((1_000_000,), 0.4), torch.zeros(1_000)]
    probe, _ = probed(means, steps=12)
    assert probe.sampled < 0.55
    assert probe.total.parameters == 1_001_000
    assert probe.total.dead == pytest.approx(0.0, abs=1e-9)
    assert probe.total.rms_snr_sq == pytest.approx(0.16, rel=0.05)
    assert probe.groups[1].parameters == 1_000


def test_dead_and_absent_tensors():
    mean = torch.full((1_000,), 1.0)
    params = [nn.Parameter(torch.zeros(1_000)) for _ in range(3)]
    history = GradientHistory(params, STEPS)
    for _ in range(STEPS):
        params[0].grad = mean + torch.randn(1_000)
        params[0].grad[:250] = 0.0
        params[1].grad = torch.zeros(1_000)
        history.record()
    probe = probe_gradients(history, ["a", "b", "never"])
    assert [group.name for group in probe.groups] == ["a", "b"]
    assert probe.groups[0].dead == pytest.approx(0.25)
    assert probe.groups[1].dead == 1.0
    assert probe.groups[1].snr is None
    assert probe.total.parameters == 2_000
    assert probe.total.rms_snr == pytest.approx(1.0, rel=0.05)
    assert math.isnan(probe.preset("calibrated 5 %").measured.open_fractions[1])
    assert probe.preset("calibrated 5 %").measured.open_fraction > 0.95


def test_finite_needs_sizes_and_a_batch_below_the_data():
    for sizes in ({"dataset_size": None}, {"batch_size": None}, {"dataset_size": 32}):
        probe, _ = probed([torch.zeros(50)], steps=8, **sizes)
        assert [p.name for p in probe.presets] == list(PRESETS)[:3]


def test_clipped_steps_have_one_norm():
    param = nn.Parameter(torch.zeros(1_000))
    history = GradientHistory([param], STEPS)
    for step in range(STEPS):
        param.grad = torch.randn(1_000) * (10.0 if step % 3 else 1e-3)
        nn.utils.clip_grad_norm_([param], 1.0)
        history.record()
    assert probe_gradients(history, ["a"]).clipped == 20


@pytest.mark.parametrize(
    ("total", "epoch", "verdict", "window", "first"),
    [
        (1000, 100, "works", 100, 200),
        (300, 100, "works", 33, 165),
        (100, 100, "single_pass", 33, 165),
        (120, 100, "too_short", 33, 165),
        (None, 100, "works", 100, 200),
        (500, 3, "coarse", 8, 16),
        (500, 1, "full_batch", 8, 16),
        (500, None, "unknown", None, None),
    ],
)
def test_stop_outlook(total, epoch, verdict, window, first):
    found = stop_outlook(total, epoch)
    assert (found.verdict, found.window, found.first_step) == (verdict, window, first)


def test_presets_are_the_defaults_of_the_package():
    rate = PRESETS[DEFAULT_PRESET][1]
    assert rate == signature(PopRiskAdamW).parameters["false_open_rate"].default


def test_refusals():
    history = GradientHistory([nn.Parameter(torch.zeros(1))], 7)
    with pytest.raises(ValueError, match="Must be >= 8"):
        probe_gradients(history, ["a"])
    with pytest.raises(ValueError, match="2 for 1"):
        probed([torch.zeros(5)], layers=["a", "b"])
