"""The harness of the benchmark of ordinary use trains and judges as its README says."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.harness.provenance import BENCHMARKS
from benchmarks.ordinary_use import (
    conditions,
    data,
    estimators,
    recorders,
    report,
    rules,
    scores,
    training,
)
from benchmarks.ordinary_use.runs import Runs
from torch import nn

SEED = 100  # a design seed


def short(name, **changes):
    return replace(conditions.CONDITIONS[name], **{"epochs": 3, **changes})


def trained(condition, task=None, **plan):
    task = condition.task(SEED, Path("unused")) if task is None else task
    return task, training.run(condition, task, SEED, training.Plan(**plan))


def test_a_plain_run_is_a_plain_loop():
    condition = short("digits-mlp-1200-clean")
    task, trace = trained(condition)
    torch.manual_seed(10_000 + SEED)
    twin = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.01)
    order = torch.Generator().manual_seed(20_000 + SEED)
    x, y = task.train.x[0], task.train.y
    step, total, first = 0, 3 * math.ceil(1200 / 32), []
    for epoch in range(3):
        for rows in torch.randperm(1200, generator=order).split(32):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / total)
            loss = nn.functional.cross_entropy(twin(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if epoch == 0:
                first.append(float(loss.detach()))
    with torch.no_grad():
        logits = twin(task.clean.x[0])
    loss = float(nn.functional.cross_entropy(logits, task.clean.y))
    right = float((logits.argmax(1) == task.clean.y).float().mean())
    assert trace["clean_loss"][-1] == pytest.approx(loss, rel=1e-4)
    assert trace["clean_accuracy"][-1] == pytest.approx(right, abs=2e-3)
    assert trace["at"].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert trace["step"][-1] == total == len(trace["rates"])
    assert (trace["train_loss"][1] + trace["train_loss"][2]) / 2 == pytest.approx(
        np.mean(first), rel=0.02
    )


def test_who_sits_out_makes_no_gradient_and_takes_no_step_away():
    condition = short("digits-mlp-400")
    _, trace = trained(condition, sit_out=True)
    always = torch.tensor(trace["sits"].all(0))
    assert not always.any()  # in the last epoch everybody is trained on
    sits = torch.tensor(trace["sits"][:2].all(0))
    assert sits.sum() >= 10
    other = condition.task(SEED, Path("unused"))
    other.train.y = torch.where(sits, (other.train.y + 1) % 10, other.train.y)
    _, changed = trained(condition, task=other, sit_out=True)
    before_last = trace["at"] <= 2.0
    np.testing.assert_array_equal(
        trace["clean_loss"][before_last], changed["clean_loss"][before_last]
    )
    assert trace["clean_loss"][-1] != changed["clean_loss"][-1]
    assert np.isfinite(trace["losses"]).all()  # everybody is measured in every epoch
    differs = trace["losses"][0] != changed["losses"][0]
    np.testing.assert_array_equal(differs, sits.numpy())
    _, full = trained(condition)
    assert trace["step"][-1] == full["step"][-1]
    late = trace["positions"][0][trace["sits"][0]].mean()
    assert late == pytest.approx(trace["positions"][0][~trace["sits"][0]].mean(), abs=0.05)


def test_held_out_labels_change_nothing_but_the_held_out_loss():
    condition = short("digits-mlp-400")
    _, trace = trained(condition, hold=0.1)
    other = condition.task(SEED, Path("unused"))
    other.train.y[360:] = (other.train.y[360:] + 1) % 10
    _, changed = trained(condition, task=other, hold=0.1)
    np.testing.assert_array_equal(trace["clean_loss"], changed["clean_loss"])
    assert trace["held_loss"][-1] != changed["held_loss"][-1]
    # Its cooldown is on all data.
    assert trace["cool_clean_loss"][0] != changed["cool_clean_loss"][0]


def test_a_cooldown_goes_on_from_its_epoch_and_leaves_the_run_alone():
    condition = short("digits-mlp-400", epochs=5)
    _, plain = trained(condition)
    _, trace = trained(condition, cool_from=(2, 4))
    np.testing.assert_array_equal(plain["clean_loss"], trace["clean_loss"])
    assert trace["cool_from"].tolist() == [2, 4]
    for row, epoch in enumerate((2, 4)):  # a quarter more training time, half of it at full rate
        before, after = trace["noisy_loss"][epoch], trace["noisy_loss"][epoch + 1]
        assert after - 0.05 < trace["cool_noisy_loss"][row] < before


@pytest.mark.parametrize("kind", ["symmetric", "pair", "class"])
def test_chances_of_wrong_labels_are_their_frequencies(kind):
    random = np.random.default_rng(0)
    y = random.integers(0, 6, 60_000)
    found = data.wrong_labels(y, 0.2, kind, 6, random)
    assert (found != y).mean() == pytest.approx(0.2, abs=1e-9)
    expected = data.label_chances(y, 0.2, kind, 6).numpy()
    counts = np.zeros((6, 6))
    np.add.at(counts, (y, found), 1)
    for label in range(6):
        row = counts[label] / counts[label].sum()
        np.testing.assert_allclose(row, expected[y == label][0], atol=0.015)


def test_losses_with_chances_are_expectations():
    torch.manual_seed(0)
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    chances = data.label_chances(y.numpy(), 0.3, "symmetric", 3)
    loss, right = data.class_loss(logits, chances)
    parts = [data.class_loss(logits, torch.full((5,), k)) for k in range(3)]
    for k, expected in enumerate((loss, right)):
        naive = sum(chances[:, c] * parts[c][k] for c in range(3))
        torch.testing.assert_close(expected, naive)
    margin, half = torch.tensor([2.0, -1.0]), torch.tensor([0.7, 0.7])
    loss, right = data.preference_loss(margin, half)
    one, other = (data.preference_loss(margin, torch.full((2,), p)) for p in (1.0, 0.0))
    torch.testing.assert_close(loss, 0.7 * one[0] + 0.3 * other[0])
    torch.testing.assert_close(right, torch.tensor([0.7, 0.3]))
    prediction, values = torch.tensor([[0.5]]), torch.tensor([-1.0, 0.0, 4.0])
    fixed = torch.tensor([[2.0, 0.1, values.mean(), values.var(correction=0)]])
    loss, _ = data.squared_loss(prediction, fixed)
    naive = 0.9 * 1.5**2 + 0.1 * float((0.5 - values).square().mean())
    assert float(loss) == pytest.approx(naive, rel=1e-6)


def trace_of(epochs, **columns):
    rows = epochs + 1
    empty = {
        f"{prefix}{name}_{kind}": np.zeros(rows)
        for prefix in ("", "average_")
        for name in ("clean", "noisy", "held")
        for kind in ("loss", "accuracy")
    }
    base = {"at": np.arange(rows, dtype=float), "cool_from": np.array([2.0, 8.0])}
    return {**empty, **base, **columns}


def runs_of(traces, epochs=20, schedule="linear"):
    condition = short("digits-mlp-400", epochs=epochs, schedule=schedule)
    found = Runs(condition=condition, seed=SEED, folder=Path("nowhere"))
    found._traces = traces
    return found


def test_rules_keep_what_the_readme_says():
    held = np.array([9, 5, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1, 2, 2, 2, 2, 2, 2, 2], float)
    signal = {
        f"signal_{k}": np.array(v)
        for k, v in {
            "step": [10, 20, 30, 40],
            "ratio": [5.0, 3.0, 0.5, 0.4],
            "ratio_se": [0.1] * 4,
            "noise": [1.0] * 4,
        }.items()
    }
    full = trace_of(
        20,
        clean_accuracy=np.linspace(0, 1, 21),
        noisy_loss=np.abs(np.arange(21) - 7.0),
        rates=np.full(200, 1e-3),
        epoch_steps=np.array(10),
        **signal,
    )
    hold = trace_of(20, held_loss=held, held_accuracy=-held)
    average = np.where(np.arange(21) == 3, 0.5, 9.0)
    hold["average_held_loss"] = average
    refit = trace_of(2, clean_accuracy=np.array([0.0, 0.5, 0.75]))
    traces = {
        "full": full,
        "sit": full,
        "hold10": hold,
        "hold20": hold,
        "refit10": refit,
        "refit20": None,
    }
    found = dict(rules.basic_rules(runs := runs_of(traces)))
    assert found["train to the end"].row == 20
    assert (found["hold-out 10 %"].row, found["hold-out 10 %"].epochs) == (2, 12)
    assert found["hold-out 10 %, best of the whole run"].row == 13
    assert found["hold-out 10 %, by accuracy"].row == 2
    kept = found["hold-out 10 %, best of last and average"]
    assert (kept.row, kept.of) == (3, "average")
    kept = found["hold-out 10 %, refit"]
    assert (kept.arm, kept.row, kept.epochs) == ("refit10", 2, 14)
    assert rules.values_of(runs, kept)["clean_accuracy"] == 0.75
    assert found["hold-out 20 %, refit"] == found["hold-out 20 %, refit, cut"]
    assert found["hold-out 20 %, refit"].arm == "full"
    assert found["oracle of noisy loss"].row == 7


def test_what_a_rule_that_watched_keeps():
    """Stopped after 12 and after 6 epochs with the best after 5; to the end; best after 6."""
    sit = trace_of(
        20,
        epoch_steps=np.array(10),
        live_stop=np.array([120.0, 60.0, math.nan, math.nan]),
        live_from=np.array([5.0, 5.0, 5.0, 6.0]),
        live_row=np.array([0, 0, 0, 1]),
        live_keeps_best=np.array([True, True, False, True]),
    )
    runs = runs_of({"sit": sit})
    kept = [
        rules.live_kept(runs, name, cool)
        for name, cool in (
            ("as shipped", True),
            ("as shipped", False),
            ("patience 5", True),
            ("confidence 0.7", True),
            ("confidence 1.3", True),
        )
    ]
    assert [(k.of, k.row, k.epochs) for k in kept] == [
        ("live_cool", 0, 14.5),
        ("live_best", 0, 12),
        ("live_cool", 0, 8.5),
        ("", 20, 20),
        ("live_best", 1, 20),
    ]


def test_the_nearest_cooldown_is_nearest_in_proportion():
    runs = runs_of({"sit": trace_of(20)})
    rows = [int(rules.cooled(runs, "sit", epoch).row) for epoch in (1, 3.9, 4.1, 20)]
    assert rows == [0, 0, 1, 1]


def test_a_replay_is_the_experiment_of_the_run():
    condition = short("digits-mlp-400", epochs=6)
    _, trace = trained(condition, sit_out=True)
    found = runs_of({"sit": trace}, epochs=6)
    curve = estimators.shipped(found)
    assert curve.middle.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]
    # In the first epoch every loss is one of data never trained on.
    assert curve.value[0] == pytest.approx(trace["losses"][0].mean(), rel=1e-5)
    true = estimators.truth(trace, curve.middle)
    low, high = sorted(trace["noisy_loss"][2:5:2])
    assert low < true[1] < high
    assert np.abs(curve.value - true).max() < 0.2
    # The rule that ran beside the training saw the same.
    rule = recorders.RiskStopping(epoch_steps=13, windows=6)
    for row in found.once(estimators.replay).history:
        rule.update(row)
    assert rule.best_step == trace["live_from"][0] * 13
    assert math.isnan(trace["live_stop"][0])
    assert trace["live_keeps_best"][0] == rule.keeps_best()
    row = int(trace["live_row"][0])
    end = trace["at"].tolist().index(trace["live_from"][0])
    assert trace["live_best_clean_loss"][row] == trace["clean_loss"][end]
    broken = {**trace, "sits": ~trace["sits"]}
    with pytest.raises(AssertionError, match="another design"):
        estimators.replay(runs_of({"sit": broken}, epochs=6))


def test_differences_are_paired_and_conditions_weigh_alike():
    def row(condition, seed, arm, accuracy, loss):
        return {
            "condition": condition,
            "seed": seed,
            "arm": arm,
            "clean_accuracy": accuracy,
            "clean_loss": loss,
            "noisy_loss": loss,
            "trained_epochs": 3,
        }

    held, end = scores.HELD, scores.END
    rows = [
        row("digits-mlp-400", 0, end, 0.80, 0.5), row("digits-mlp-400", 0, held, 0.90, 0.4),
        row("digits-mlp-400", 1, end, 0.82, 0.5), row("digits-mlp-400", 1, held, 0.90, 9.0),
        row("lm-scratch-2000", 0, end, "", 3.0), row("lm-scratch-2000", 0, held, "", 2.9),
        row("wine-120", 0, end, 1.0, 0.1), row("wine-120", 0, held, 0.95, 0.1),
    ]  # fmt: skip
    table = scores.table_of(rows)
    found = scores.difference(table, end, held, "clean_accuracy")
    assert set(found) == {("digits-mlp-400", 0), ("digits-mlp-400", 1), ("wine-120", 0)}
    mean, low, high = scores.mean_of(found)
    assert mean == pytest.approx((-0.09 + 0.05) / 2)
    assert low == pytest.approx((-0.10 + 0.05) / 2)
    assert high == pytest.approx((-0.08 + 0.05) / 2)
    capped = scores.difference(table, end, held, "clean_loss")
    assert capped["digits-mlp-400", 1] == -1.0
    line = next(r for r in scores.summary(rows) if r["arm"] == end)
    assert line["clean_accuracy minus hold-out, worst in"] == "digits-mlp-400"
    assert line["clean_loss minus hold-out, worst in"] == "lm-scratch-2000"


@pytest.mark.parametrize(("change", "word"), [(0.02, "better"), (-0.02, "worse")])
def test_the_verdict_applies_the_rule(change, word):
    held, end, oracle = scores.HELD, scores.END, report.ORACLE
    rows = []
    for name, stop in (("digits-mlp-400", 0.88), ("dpo-clean-3-epochs", 0.80 + change)):
        for seed in range(5):
            for arm, accuracy in ((held, 0.80), (end, 0.80), (oracle, 0.9), ("mine", stop)):
                value = accuracy + (change - 0.08 if arm == "mine" and name[:3] == "dig" else 0)
                rows.append({"condition": name, "seed": seed, "arm": arm,
                             "clean_accuracy": value, "clean_loss": 0.5})  # fmt: skip
    lines = report.verdict(rows, "mine")
    assert lines[1].endswith(word)
    assert ("harmed: none" in lines[2]) == (change > 0)


def test_conditions_are_as_the_issue_of_ordinary_use_asks():
    found = list(conditions.CONDITIONS.values())
    assert len(found) >= 16
    assert {c.schedule for c in found} == {"constant", "linear", "cosine", "onecycle", "plateau"}
    assert {c.optimizer for c in found} == {"AdamW", "PopRiskAdamW", "SGD"}
    assert {2, 3, 4, 10, 30, 100} <= {c.epochs for c in found}
    assert {c.share for c in found} >= {0.0, 0.1, 0.3}
    for c in found:
        assert all(0 < epoch < c.epochs for epoch in c.cool_from)
        assert c.cool_from


def test_the_readme_lists_the_conditions():
    text = (BENCHMARKS / "ordinary_use" / "README.md").read_text(encoding="utf-8")
    assert report.conditions_table() in text
