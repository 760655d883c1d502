"""The choice of the default: its rule on made-up scores."""

import csv

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core.alpha import calibrated_alpha

STUDY = "default_gate"


def scores(**arms):
    """Score rows of a study on four seeds: (tuned, range) by arm, AdamW at 1."""
    cells = {"AdamW": (1.0, 1.0), **{name.replace("_", "-"): v for name, v in arms.items()}}
    return [
        {
            "arm": arm,
            "condition": condition,
            "seed": str(seed),
            "metric": "accuracy",
            "higher": "1",
            "tuned": str(tuned + 1e-4 * seed),
            "range": str(spread),
        }
        for arm, (tuned, spread) in cells.items()
        for condition in ("a", "b")
        for seed in range(4)
    ]


def decide(study, harness, selection, report=None):
    rows = [
        {"stage": stage, **row}
        for stage, found in (("selection", selection), ("confirmation", report or {}))
        for row in harness.comparison.comparisons(found, 200)
    ]
    lines, chosen = study.choice.choose(rows, selection, 200)
    return rows, lines, chosen


def test_differences_are_paired_by_condition_and_seed(harness):
    rows = scores(soft_5=(1.1, 0.9))
    rows[-1]["range"] = "1.7"  # soft-5, condition b, seed 3: a mean over conditions of 0.3
    found = harness.comparison.differences(rows, "soft-5", "range")
    assert found == pytest.approx({0: -0.1, 1: -0.1, 2: -0.1, 3: 0.3})
    for row in rows:
        row["higher"] = "0"
    found = harness.comparison.differences(rows, "soft-5", "tuned")
    assert found[0] == pytest.approx(-0.1)
    assert harness.comparison.differences(rows, "hard-5", "tuned") == {}


def test_the_worst_study_decides_among_those_that_qualify(study, harness):
    one = scores(soft_5=(0.97, 1.3), snr_32=(0.995, 1.02), snr_fresh=(1.0, 1.5))
    two = scores(soft_5=(1.0, 1.3), snr_32=(1.01, 1.03), snr_fresh=(1.0, 0.9))
    rows, lines, chosen = decide(study, harness, {"one": one, "two": two})
    assert chosen == "snr-32"  # soft-5 does not qualify, snr-fresh loses in a study
    assert "soft-5: tuned at worst -3.0" in "\n".join(study.choice.candidates(rows))
    assert "default: snr-32" in lines


def test_the_present_default_stays_where_the_winner_is_level_with_it(study, harness):
    one = scores(soft_5=(1.0, 1.05), snr_32=(1.0, 1.1))
    two = scores(soft_5=(1.0, 1.2), snr_32=(1.0, 1.1))
    for seed, row in enumerate(r for r in two if r["arm"] == "snr-32"):
        row["range"] = str(1.1 + 0.4 * (seed % 2))  # seeds disagree widely
    assert decide(study, harness, {"one": one, "two": two})[2] == "soft-5"


def test_adamw_ahead_is_said_and_no_gate_qualifying_is_said(study, harness):
    _, lines, chosen = decide(study, harness, {"one": scores(soft_5=(1.0, 0.9))})
    assert (chosen, lines[1]) == ("soft-5", "AdamW (0, 0) is ahead of every gate by this rule")
    _, lines, chosen = decide(study, harness, {"one": scores(soft_5=(0.9, 1.2), snr_5=(0.95, 0.5))})
    assert chosen == "snr-5"
    assert lines[0].startswith("no gate qualifies")


def test_confirmation_is_on_the_other_stage(study, harness):
    selection = {"one": scores(soft_5=(1.0, 1.1))}
    report = {"one": scores(soft_5=(0.98, 1.1)), "pinn": scores(soft_5=(1.2, 1.1))}
    rows, _, chosen = decide(study, harness, selection, report)
    lines = study.choice.confirmation(rows, chosen)
    assert "one -2.00% (MISSED)" in lines[0]
    assert "+10.00% [+10.00%, +10.00%] (met)" in lines[1]
    assert study.choice.confirmation(rows, "hard-5") == ["confirmation: hard-5 was not run"]


def test_scores_of_the_main_metric_are_read(harness, tmp_path):
    rows = scores(soft_5=(1.1, 0.9))
    others = [row | {"metric": "loss", "higher": "0", "tuned": "7"} for row in rows]
    folder = tmp_path / "one" / "results"
    folder.mkdir(parents=True)
    with (folder / "scores_here.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows + others)
    found = harness.comparison.read_scores(tmp_path, ["one", "two"], "scores")
    assert list(found) == ["one"]
    assert found["one"] == rows


def test_the_default_of_the_optimizer_is_the_choice(study, harness):
    scores = harness.comparison.read_scores(
        study.bench.BENCHMARKS, study.bench.SELECTION, "selection_scores"
    )
    rows = [{"stage": "selection", **row} for row in harness.comparison.comparisons(scores, 200)]
    _, chosen = study.choice.choose(rows, scores, 200)
    options = PopRiskAdamW([torch.zeros(1, requires_grad=True)]).defaults
    arm = harness.arms.GATES[chosen]
    alpha = calibrated_alpha(harness.arms.BETAS[0], options["false_open_rate"])
    assert (options["gate"], options["alpha"], alpha) == (arm.gate, "calibrated", arm.alpha)
    for name in ("lambda_pop", "rho", "gate_warmup", "gate_blend", "preserve_norm", "gate_decay"):
        assert options[name] == getattr(arm, name)


def test_an_option_changes_only_where_it_is_better_beyond_doubt(study, harness):
    names = {"soft-32": 0.0, "soft-32-rho999": 0.02, "soft-32-warmup": 0.02, "soft-32-blend": -0.1}
    noise = {"soft-32-warmup": (0.3, -0.3, 0.3, -0.2)}  # ahead on average, not beyond doubt

    def study_of(shift):
        rows = scores(soft_5=(1.0, 0.9), **{n.replace("-", "_"): (1.0, 1.0) for n in names})
        for row in rows:
            if row["arm"] in names:
                extra = noise.get(row["arm"], (0.0,) * 4)[int(row["seed"])]
                row["range"] = str(1.0 + shift + names[row["arm"]] + extra)
        return rows

    selection = {"one": study_of(0.1), "two": study_of(0.2)}
    rows, _, chosen = decide(study, harness, selection)
    assert chosen == "soft-32"  # the options do not take part in rules 1 to 4
    found = study.choice.options(rows, selection, chosen, 2000)
    words = {line.split(":")[0]: line.rsplit(": ", 1)[1] for line in found}
    assert words == {
        "soft-32-rho999": "change",
        "soft-32-warmup": "keep",
        "soft-32-blend": "keep",
    }
