"""One diagnosis with its uncertainty: what it says, when, and with which numbers."""

import math
import random
from pathlib import Path

import pytest

import poprisk_integrations.core as core
from poprisk_integrations.core import PHRASES, diagnose


def row(ratio, se=0.1, gain=None, agreement=None, step=20, **more):
    return {
        "step": step,
        "signal_ratio": ratio,
        "signal_ratio_se": se,
        "risk_decrease": gain,
        "risk_decrease_se": None if gain is None else 0.01,
        "agreement": agreement,
        "agreement_se": None if agreement is None else 0.01,
        "reused": True,
        **more,
    }


@pytest.mark.parametrize(
    ("found", "certainty", "kind"),
    [
        (row(3.0, 0.1, 0.1, 0.2), "very probably", "learning"),
        (row(1.15, 0.1), "probably", "learning"),
        (row(1.09, 0.1), "", "unclear"),
        (row(0.965, 0.41), "", "unclear"),  # was told as a certainty
        (row(0.996, 0.083), "", "unclear"),
        (row(0.85, 0.1), "probably", "memorising"),
        (row(0.5, 0.1, -0.1, -0.02), "very probably", "memorising"),
        (row(0.5, 0.1, -0.1, 0.2), "very probably", "overshooting"),
        (row(1.5, 0.1, -0.1, 0.2), "very probably", "overshooting"),
        (row(0.5, 0.1, -0.015, 0.2), "very probably", "memorising"),  # a loss of 1.5 errors is none
        (row(0.5, 0.1, -0.1, 0.015), "very probably", "memorising"),
        (row(0.5, None), "", "unclear"),  # nothing to be sure with
        (row(0.5, 0.0), "", "unclear"),
        (row(0.5, 0.1, reused=False), "", "unclear"),  # nothing can have been memorised
        (row(None), "", "unclear"),
        (row(math.nan), "", "unclear"),
    ],
)
def test_four_findings(found, certainty, kind):
    diagnosis = diagnose([found])
    assert (diagnosis.certainty, diagnosis.kind) == (certainty, kind)
    assert diagnosis.phrase in PHRASES.values()
    assert diagnosis.phrase in str(diagnosis)


def test_no_window_is_no_finding():
    assert str(diagnose([])) == PHRASES["unclear, nothing measured"]


def test_the_window_of_the_onset_was_picked_for_being_low():
    rows = [row(1.5, step=8), row(0.6, 0.2, step=16), row(1.02, 0.2, step=24)]
    assert diagnose(rows[:2], since=16).kind == "memorising"
    assert diagnose(rows, since=16).kind == "unclear"
    assert diagnose(rows, since=16).numbers == "F = 1 +- 0.2 over 1 window, 1 is chance alone"


def test_windows_since_the_onset_count_together():
    """Four times 0.88 +- 0.2 are 0.88 +- 0.1; one of them tells nothing."""
    rows = [row(0.8, 0.2, step=8)] + [row(0.88, 0.2, step=8 * k) for k in range(2, 6)]
    assert diagnose(rows[:2], since=8).kind == "unclear"
    pooled = diagnose(rows, since=8)
    assert (pooled.certainty, pooled.kind) == ("probably", "memorising")
    assert pooled.numbers == "F = 0.88 +- 0.1 over 4 windows, 1 is chance alone"


def test_without_an_onset_the_last_three_count():
    rows = [row(9.0)] * 5 + [row(1.2)] * 3
    assert diagnose(rows).numbers == "F = 1.2 +- 0.058 over 3 windows, 1 is chance alone"


def test_overshooting_has_its_own_numbers():
    text = str(diagnose([row(0.5, 0.1, -0.1, 0.2)]))
    assert "the learning rate is too high" in text
    assert "F = 0.5 +- 0.1" in text
    assert "C = -0.1 +- 0.01, U = 0.2 +- 0.01" in text


def test_the_threshold_is_the_users():
    assert diagnose([row(1.3)], threshold=1.6).kind == "memorising"
    assert "F = 1.3 +- 0.1 over 1 window, below 1.6" in str(diagnose([row(1.3)], threshold=1.6))


def risk_rows(values, train, change=0.02, se=0.1):
    return [
        {
            "step": 10 * (k + 1),
            "epoch": k + 1.0,
            "train_loss": loss,
            "estimated_test_loss": value,
            "estimated_test_loss_se": se,
            "estimated_test_loss_change_se": change,
            "signal_ratio": None,
        }
        for k, (value, loss) in enumerate(zip(values, train, strict=True))
    ]


@pytest.mark.parametrize(
    ("values", "train", "certainty", "kind"),
    [
        ([2.0, 1.5, 1.2, 1.0], [2.0, 1.4, 1.0, 0.8], "very probably", "learning"),
        # 0.05 down, each change known to 0.02: 1.4 standard errors of three changes.
        ([1.05, 1.02, 1.01, 1.0], [1.0, 0.9, 0.8, 0.7], "probably", "learning"),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 0.9, 0.8, 0.7], "", "unclear"),
        ([2.0, 1.0, 1.2, 1.3], [2.0, 0.9, 0.8, 0.7], "very probably", "memorising"),
        # 0.04 and 0.05 up: 2 and 1.8 standard errors, 1.9 on average, less 0.5.
        ([2.0, 1.0, 1.04, 1.05], [2.0, 0.9, 0.8, 0.7], "probably", "memorising"),
        ([2.0, 1.0, 1.2], [2.0, 0.9, 0.8], "", "unclear"),  # one window above only
        ([1.0, 1.2], [1.0, 0.8], "very probably", "memorising"),  # there are no others
        ([2.0, 1.0, 1.2, 1.3], [2.0, 0.9, 1.1, 1.2], "very probably", "overshooting"),
        ([2.0, 1.0, None, 1.3, 1.3], [2.0, 0.9, 0.8, 0.7, 0.7], "very probably", "memorising"),
        ([2.0, 1.0, 1.2, math.nan, 1.3], [2.0, 0.9, 0.8, 0.7, 0.7], "very probably", "memorising"),
    ],
)
def test_the_estimated_test_loss_speaks_for_itself(values, train, certainty, kind):
    diagnosis = diagnose(risk_rows(values, train))
    assert (diagnosis.certainty, diagnosis.kind) == (certainty, kind)
    assert diagnosis.phrase in PHRASES.values()


def test_the_change_is_known_better_than_the_value():
    """0.1 up where R is known to 0.1: the same examples are compared with themselves."""
    values, train = [2.0, 1.0, 1.1, 1.1], [2.0, 0.9, 0.8, 0.7]
    assert diagnose(risk_rows(values, train)).kind == "memorising"
    assert diagnose(risk_rows(values, train, change=0.2)).kind == "unclear"
    assert diagnose(risk_rows(values, train, change=None, se=None)).kind == "unclear"


def test_numbers_of_the_estimated_test_loss():
    text = str(diagnose(risk_rows([2.0, 1.0, 1.2, 1.3], [2.0, 0.9, 0.8, 0.7])))
    assert text.startswith("very probably memorising: the test loss has risen from its minimum")
    assert text.endswith("(R = 1.3 +- 0.1, lowest 1 at step 20; training loss 0.7)")
    assert "seen only once" in str(diagnose(risk_rows([2.0], [2.0])))


def test_a_flat_test_loss_is_seldom_called_memorising():
    """R wanders by its errors alone: the lowest window was picked, and that is allowed for."""
    draw = random.Random(0)
    found = []
    for _ in range(400):
        values = [1.0]
        for _ in range(9):
            values.append(values[-1] + draw.gauss(0.0, 0.02))
        found.append(diagnose(risk_rows(values, [1.0] * 10)))
    memorising = [d.certainty for d in found if d.kind == "memorising"]
    assert memorising.count("very probably") <= 0.03 * len(found)
    assert len(memorising) <= 0.2 * len(found)


def test_the_table_of_phrases_is_the_code():
    """README's table is for people; the words are the code's."""
    readme = Path(core.__file__).with_name("README.md").read_text(encoding="utf-8")
    for phrase in PHRASES.values():
        assert f"| {phrase} |" in readme
