"""The text under the table must say what the numbers say, losses included."""

import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from poprisk_integrations.cli.demo.comparison import Arm, Comparison, best_arm, find_arm
from poprisk_integrations.cli.demo.findings import Evidence, findings
from poprisk_integrations.cli.demo.table import print_results

RATES = (3e-5, 1e-4, 3e-4)
WON, LOST, LEVEL = Comparison(0.08, 0.02), Comparison(-0.08, 0.02), Comparison(0.01, 0.02)


def arm(optimizer: str, rate: float, accuracy: float, **changes: object) -> Arm:
    values: dict[str, object] = {
        "stop": False,
        "steps": 100,
        "stopped": False,
        "accuracy_se": 0.015,
        "swapped_fitted": 0.99,
        "clean_fitted": 1.0,
        "drift": 0.4,
        "peak_accuracy": 0.90,
        "peak_step": 20,
    }
    return Arm(optimizer, learning_rate=rate, accuracy=accuracy, **{**values, **changes})


def evidence(
    gate: tuple[float, ...] = (0.88, 0.88, 0.88),
    adamw: tuple[float, ...] = (0.87, 0.80, 0.75),
    at: tuple[Comparison, ...] = (LEVEL, WON, WON),
    best: Comparison = LEVEL,
    stops: Mapping[tuple[str, float], Comparison] | None = None,
    gate_changes: Mapping[str, object] | None = None,
    quick: bool = False,
    not_armed: int = 0,
) -> Evidence:
    arms = []
    for index, rate in enumerate(RATES):
        arms.append(arm("AdamW", rate, adamw[index], drift=0.1 * (index + 1)))
        changes = {"swapped_fitted": 0.4, "drift": 0.12, **(gate_changes or {})}
        arms.append(arm("PopRiskAdamW", rate, gate[index], **changes))
    for optimizer, rate in stops or {}:
        end = find_arm(arms, optimizer, rate, stop=False)
        said = "probably memorising: the rest (F = 0.9 +- 0.08)"
        changed = {"stop": True, "stopped": True, "steps": 60, "finding": said}
        arms.append(arm(optimizer, rate, end.accuracy, **changed))
    return Evidence(
        arms=arms,
        default_lr=1e-4,
        gate_vs_adamw=dict(zip(RATES, at, strict=True)),
        best_vs_best=best,
        stop_vs_end=stops or {},
        not_armed=not_armed,
        quick=quick,
    )


def test_robustness_without_a_better_optimum() -> None:
    default, sweep, *_ = findings(evidence())
    assert "PopRiskAdamW 88.0 % of the clean held-out pairs, AdamW 80.0 %" in default
    assert "PopRiskAdamW is ahead by 8.0 points (standard error 2.0 points)" in default
    assert "AdamW 87.0 % (3e-05)" in sweep
    assert "That is level" in sweep
    assert "varies by 0.0 points for PopRiskAdamW and by 12.0 points for AdamW" in sweep
    assert "the gain is robustness to the learning rate, not a better optimum" in sweep


def test_a_better_optimum_is_called_one() -> None:
    sweep = findings(evidence(best=WON))[1]
    assert "ahead even of AdamW at its best rate" in sweep
    assert "not a better optimum" not in sweep


def test_a_loss_is_called_a_loss() -> None:
    case = evidence(
        gate=(0.70, 0.72, 0.79), adamw=(0.85, 0.88, 0.80), at=(LOST, LOST, LEVEL), best=LOST
    )
    default, sweep, *_ = findings(case)
    assert "PopRiskAdamW is behind by 8.0 points" in default
    assert "with a tuned learning rate AdamW is the better choice here" in sweep
    assert "robustness" not in " ".join(findings(case))


def test_ahead_at_the_default_but_behind_when_tuned() -> None:
    sweep = findings(evidence(best=LOST))[1]
    assert "AdamW is the better choice here; PopRiskAdamW only spares some of the tuning" in sweep


def test_a_tie_is_no_advantage() -> None:
    case = evidence(gate=(0.80, 0.80, 0.80), adamw=(0.80, 0.81, 0.80), at=(LEVEL, LEVEL, LEVEL))
    default, sweep, *_ = findings(case)
    assert "That is level: the difference of 1.0 points" in default
    assert "this run shows no advantage of PopRiskAdamW in accuracy" in sweep


@pytest.mark.parametrize(
    ("peak", "words"),
    [
        (0.90, "AdamW needs no gate"),
        (0.95, "PopRiskAdamW's is higher"),
        (0.85, "better without the gate"),
    ],
)
def test_best_moment(peak: float, words: str) -> None:
    assert words in findings(evidence(gate_changes={"peak_accuracy": peak}))[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "leaves wrong labels unfitted while it fits the right ones"),
        ({"clean_fitted": 0.8}, "fits less of both, as a smaller step would"),
        ({"swapped_fitted": 0.97}, "does not keep the wrong labels from being fitted"),
    ],
)
def test_mechanism(changes: dict[str, object], words: str) -> None:
    text = findings(evidence(gate_changes=changes))[3]
    assert words in text
    # AdamW at 3e-5 has drift 0.1, next to the gate's 0.12.
    assert "AdamW at 3e-05: drift 0.10 against 0.12" in text
    assert "AdamW has 87.0 % against 88.0 %" in text


def test_no_stop() -> None:
    assert "ended none of the 6 runs" in findings(evidence())[4]
    assert "too short" in findings(evidence())[4]
    assert "In 6 of them the gradients never agreed" in findings(evidence(not_armed=6))[4]


def test_stop_that_helps_hurts_and_changes_nothing() -> None:
    helped = findings(evidence(stops={("AdamW", 3e-4): WON}))[4]
    assert "ended 1 of the 6 runs: AdamW 0.0003 at step 60 of 100" in helped
    assert "It helped in 1 and hurt in 0" in helped
    assert "AdamW 0.0003 was probably memorising: the rest (F = 0.9 +- 0.08)." in helped
    assert "the best moment had passed" in helped  # 0.90 against 0.75
    hurt = findings(evidence(stops={("PopRiskAdamW", 3e-4): LOST}))[4]
    assert "It helped in 0 and hurt in 1" in hurt
    assert "the best moment had passed" not in hurt  # 0.90 against 0.88
    level = findings(evidence(stops={("AdamW", 3e-4): LEVEL}))[4]
    assert "changed no accuracy by more than noise" in level


def test_limits() -> None:
    assert "one seed of one very small model" in findings(evidence())[5]
    assert "standard error of 1.5 points" in findings(evidence())[5]
    assert "numbers mean little" not in findings(evidence())[5]
    assert "numbers mean little" in findings(evidence(quick=True))[5]


def test_best_arm_ignores_the_stop_and_prefers_less_drift() -> None:
    arms = [
        arm("AdamW", 1e-4, 0.8, drift=0.5),
        arm("AdamW", 3e-5, 0.8, drift=0.1),
        arm("AdamW", 3e-4, 0.9, stop=True),
        arm("PopRiskAdamW", 3e-4, 0.95),
    ]
    assert best_arm(arms, "AdamW") == arms[1]


def test_table_fits_eighty_columns() -> None:
    case = evidence(stops={("AdamW", 3e-4): WON})
    console = Console(width=80, file=io.StringIO())
    print_results(console, "title", case.arms, 1e-4, ["first finding", "second finding"])
    text = console.file.getvalue()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "\u2026" not in text  # nothing cut
    assert "0.0001*" in text
    assert text.count("PopRiskAdamW") == 3
    assert "ended it" in text
    assert "second finding" in text
