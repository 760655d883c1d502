"""The noisy-labels study: flips, what is fitted, verdict, committed tables."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

STUDY = "noisy_labels"
RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / STUDY / "results"


@pytest.fixture(scope="module")
def task_module(study):
    return study.noisy_labels_task


@pytest.mark.parametrize("percent", [0, 10, 40])
def test_exactly_the_share_is_flipped_and_never_to_itself(task_module, percent):
    y = torch.arange(800) % 10
    flipped = task_module.flip(y, percent, 10, torch.Generator().manual_seed(3))
    assert int((flipped != y).sum()) == 8 * percent
    assert flipped.min() >= 0
    assert flipped.max() <= 9


def test_flips_are_symmetric(task_module):
    y = torch.zeros(90_000, dtype=torch.long)
    flipped = task_module.flip(y, 100, 10, torch.Generator().manual_seed(0))
    counts = torch.bincount(flipped, minlength=10)
    assert counts[0] == 0
    # 10,000 expected in each of nine classes, standard deviation about 94
    assert (counts[1:] - 10_000).abs().max() < 400


def test_a_higher_share_flips_the_same_labels_and_more(task_module):
    few, many = (task_module.draw(f"digits {share}%", 5) for share in (10, 40))
    assert torch.equal(few.x, many.x)
    assert torch.equal(few.test_y, many.test_y)
    assert few.wrong.sum() == 80
    assert many.wrong.sum() == 320
    assert bool((many.wrong | ~few.wrong).all())
    assert torch.equal(few.y[few.wrong], many.y[few.wrong])


@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_the_split_is_disjoint_and_the_test_labels_clean(task_module, name):
    drawn = task_module.draw(f"{name} 40%", 1)
    size = task_module.SETS[name]
    assert (len(drawn.x), len(drawn.test_x)) == (size.train, size.test)
    clean = task_module.draw(f"{name} 0%", 1)
    assert torch.equal(clean.test_y, drawn.test_y)
    assert torch.equal(clean.y != drawn.y, drawn.wrong)
    x, _ = task_module.whole(name)
    assert len(drawn.x) + len(drawn.test_x) <= len(x)
    together = torch.cat([drawn.x, drawn.test_x])
    assert len(together.unique(dim=0)) == len(together)


def test_inputs_are_standardised_by_the_training_set(task_module):
    drawn = task_module.draw("breast_cancer 20%", 2)
    torch.testing.assert_close(drawn.x.mean(0), torch.zeros(30), atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn.x.std(0), torch.ones(30))
    assert drawn.test_x.mean(0).abs().max() > 1e-3


def test_metrics_agree_with_a_loop_over_examples(task_module, harness):
    members = harness.tasks.members_of([0, 1], ["breast_cancer 0%", "breast_cancer 20%"], [1e-3])
    task = task_module.NoisyLabelsTask(members, steps=1)
    params = task.initial()
    found = task.metrics(params)
    for m, member in enumerate(members):
        drawn = task_module.draw(member.condition, member.seed)
        w = {name: p[m].double() for name, p in params.items()}

        def logits(x, w=w):
            hidden = (x.double() @ w["0.weight"].T + w["0.bias"]).clamp_min(0)
            return hidden @ w["2.weight"].T + w["2.bias"]

        hits = logits(drawn.x).argmax(1) == drawn.y
        out = logits(drawn.test_x)
        log_p = out - out.exp().sum(1, keepdim=True).log()
        wrong = hits[drawn.wrong].double().mean() if drawn.wrong.any() else torch.tensor(0.0)
        expected = {
            "fitted_wrong": wrong,
            "fitted_clean": hits[~drawn.wrong].double().mean(),
            "accuracy": (out.argmax(1) == drawn.test_y).double().mean(),
            "loss": -log_p[torch.arange(len(out)), drawn.test_y].mean(),
        }
        for name, value in expected.items():
            assert found[name][m].item() == pytest.approx(value.item(), abs=1e-5), name


def test_training_lowers_the_loss_of_the_noisy_labels(task_module, harness):
    members = harness.tasks.members_of([0], ["breast_cancer 20%"], [3e-3])
    task = task_module.NoisyLabelsTask(members, steps=120)
    trace = harness.training.train(task, harness.arms.ARMS["AdamW"])
    assert trace["eval_step"].tolist() == [0, 25, 50, 100, 120]
    assert trace["fitted_clean"][-1, 0] > 0.95
    assert trace["accuracy"].max() > 0.93


def made_up(values):
    """Score rows from {arm: (noisy, clean)}; each seed moves all arms alike."""
    return [
        {
            "metric": "accuracy",
            "higher": "1",
            "arm": arm,
            "condition": condition,
            "seed": str(seed),
            **dict.fromkeys(("tuned", "tuned_stopped"), f"{tuned * (1 + seed / 100)}"),
            "range": f"{ranged * (1 + seed / 100)}",
        }
        for arm, by_kind in values.items()
        for condition, (tuned, ranged) in zip(("digits 20%", "digits 0%"), by_kind, strict=True)
        for seed in range(3)
    ]


BASE = {"AdamW": ((0.8, 0.8), (0.9, 0.9))}


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ({"soft-5": ((0.88, 0.88), (0.9, 0.9))}, "helps with wrong labels"),
        ({"soft-5": ((0.8, 0.88), (0.9, 0.9))}, "only there"),
        ({"soft-5": ((0.72, 0.88), (0.9, 0.9))}, "does not help with wrong labels (tuned worse"),
        ({"soft-5": ((0.8, 0.8), (0.9, 0.9))}, "no difference shown"),
        (
            {"soft-5": ((0.88, 0.88), (0.9, 0.9)), "ratio(soft-5)": ((0.88, 0.8), (0.9, 0.9))},
            "a control reaches it",
        ),
        (
            {"soft-5": ((0.88, 0.88), (0.9, 0.9)), "norm(soft-5)": ((0.8, 0.8), (0.9, 0.9))},
            "the gate's own",
        ),
    ],
)
def test_verdict(study, arms, expected):
    lines = study.noisy_labels_verdict.verdict(made_up({**BASE, **arms}))
    (last,) = (line for line in lines if line.startswith("=> soft-5"))
    assert expected in last


def test_verdict_on_clean_labels(study):
    def line(clean):
        scores = made_up({**BASE, "soft-5": ((0.8, 0.8), (clean, 0.9))})
        (found,) = (x for x in study.noisy_labels_verdict.verdict(scores) if "clean labels" in x)
        return found

    assert line(0.8).endswith("costs accuracy")
    assert "-11.11%" in line(0.8)
    assert line(0.898).endswith("costs at most 0.5 %")


def test_less_loss_is_better(study):
    rows = made_up({**BASE, "soft-5": ((0.4, 0.8), (0.9, 0.9))})
    rows = [row | {"metric": "loss", "higher": "0"} for row in rows]
    found = study.noisy_labels_verdict.differences(rows, "soft-5", "AdamW", "tuned", "loss")
    assert found["digits 20%", 1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.1, 0.3, "level"), (0.0, 0.3, "level")],
)
def test_an_interval_across_zero_is_level(study, low, high, expected):
    assert study.noisy_labels_verdict.word(low, high) == expected


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("prefix", ["", "selection_"])
def test_committed_scores_agree_with_the_committed_rows(prefix):
    (path,) = RESULTS.glob("selection_[0-9]*.csv" if prefix else "2*.csv")
    members = {}
    for m in read(path):
        members.setdefault((m["arm"], m["condition"], m["seed"]), []).append(m)
    (scores,) = RESULTS.glob(f"{prefix}scores_*.csv")
    compared = 0
    for row in read(scores):
        mine = members[(row["arm"], row["condition"], row["seed"])]
        higher = row["metric"] == "accuracy"
        pick = max if higher else min
        ends = {}
        for m in mine:
            start, end = (float(m[f"{row['metric']}_{when}"]) for when in ("start", "end"))
            fine = m["diverged"] == "0" and np.isfinite(end)
            ends[float(m["lr"])] = pick(start, end) if fine else start
        assert float(row["tuned"]) == pytest.approx(ends[float(row["tuned_lr"])], rel=1e-4)
        ranged = np.mean([ends[lr] for lr in (3e-4, 1e-3, 3e-3, 1e-2)])
        assert float(row["range"]) == pytest.approx(ranged, rel=1e-4)
        compared += 1
    assert compared == 2 * len(members)


def test_committed_tables_name_the_usual_arms(study):
    (report,) = RESULTS.glob("2*.csv")
    (selection,) = RESULTS.glob("selection_[0-9]*.csv")
    for path, arms, seeds in (
        (report, study.bench.ARMS, range(5)),
        (selection, study.bench.SELECTION_ARMS, range(100, 105)),
    ):
        rows = read(path)
        assert set(arms) <= {row["arm"] for row in rows}
        assert {int(row["seed"]) for row in rows} == set(seeds)
