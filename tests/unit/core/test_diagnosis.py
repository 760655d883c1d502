import math

import pytest
import torch

from poprisk_integrations.core import WindowRatio, diagnose, explain


def window(ratio, gain=math.nan, agreement=math.nan):
    return WindowRatio(
        ratio=ratio,
        per_tensor=torch.ones(1),
        noise=torch.ones(1),
        steps=20,
        ratio_se=0.1,
        risk_decrease=gain,
        risk_decrease_se=0.01,
        agreement=agreement,
        agreement_se=0.01,
    )


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (window(3.0, 0.1, 0.2), "learning"),
        (window(0.5, -0.1, -0.02), "memorising"),
        (window(0.5, -0.1, 0.2), "overshooting"),
        (window(1.5, -0.1, 0.2), "overshooting"),
        (window(0.5, -0.015, 0.2), "memorising"),  # a loss of 1.5 standard errors is none
        (window(0.5, -0.1, 0.015), "memorising"),
        (window(0.5), "memorising"),  # nothing but F was measured
        (window(math.nan), "unknown"),
    ],
)
def test_overshooting_is_told_from_memorising(found, said):
    assert diagnose(found) == said


def test_the_message_has_the_numbers():
    text = explain(window(0.5, -0.1, 0.2))
    assert "the learning rate is too high" in text
    assert "F = 0.5 +- 0.1, C = -0.1 +- 0.01, U = 0.2 +- 0.01" in text
