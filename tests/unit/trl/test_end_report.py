"""The last line of a run says one rate, with its interval, or that there is none."""

import numpy as np
import torch

from poprisk_integrations.trl.end_report import describe_end
from poprisk_integrations.trl.label_noise import LabelNoise
from poprisk_integrations.trl.pair_loss import PairLoss


def noise_of(signal: float, rate: float, mode: str, count: int = 4000) -> LabelNoise:
    noise = LabelNoise(count, loss=PairLoss(mode=mode))
    rng = np.random.default_rng(0)
    margins = rng.normal(signal, 1, count) * np.where(rng.random(count) < rate, -1, 1)
    noise.margins.record(torch.arange(count), torch.as_tensor(margins), step=0)
    noise.update_estimate(step=5)
    return noise


def test_a_mode_that_gets_no_rate_says_so_in_the_line() -> None:
    line = describe_end(noise_of(0.2, 0.0, "rdpo"))
    assert line.startswith("the margins do not tell how many labels are wrong (0 to ")
    assert "no noise rate for noise='rdpo': the loss is DPO's" in line
    assert "suspect" not in line
    assert "labels are taken as right" in describe_end(noise_of(0.2, 0.0, "weights"))
    assert "no noise rate for" not in describe_end(noise_of(0.2, 0.0, "auto"))


def test_another_rate_beside_the_estimate_is_explained() -> None:
    noise = noise_of(1.8, 0.42, "rdpo")
    line = describe_end(noise)
    assert noise.estimate is not None
    assert str(noise.estimate) in line
    assert "loss rdpo at noise rate 0.35, the largest that is used" in line
    assert "the largest" not in describe_end(noise_of(1.8, 0.2, "rdpo"))
