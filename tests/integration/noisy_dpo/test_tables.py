"""The tables of the noisy-preference benchmark, from shards and from committed rows."""

import importlib
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.integration.noisy_dpo.conftest import CONDITIONS, FOLDER

RESULTS = sorted((FOLDER / "results").glob("2*.csv"))


def test_detection_counts_pairs(recipe):
    random = np.random.default_rng(0)
    margins = random.integers(-3, 4, 60) / 2.0
    flipped = random.random(60) < 0.4
    margins[:5] = np.nan
    won = [
        (wrong < right) + 0.5 * (wrong == right)
        for wrong in margins[5:][flipped[5:]]
        for right in margins[5:][~flipped[5:]]
    ]
    assert recipe.rows.detection_auc(margins, flipped) == pytest.approx(np.mean(won))
    assert math.isnan(recipe.rows.detection_auc(margins, np.zeros(60, dtype=bool)))


def test_second_half_of_the_first_epoch_is_that_of_training(recipe, task):
    order = recipe.training._orders(task, recipe.arms.A1, 384, 384)
    for place, seed in enumerate(task.seeds):
        assert recipe.rows.second_half(seed, 384).tolist() == order[place, 192:].tolist()


def test_a_shard_becomes_rows_and_runs(recipe, trace, tmp_path):
    cell = recipe.grid.Cell(arm="A1", lr=1e-3)
    assert cell.name == "A1_lr0.001_beta0.1_constant_main"
    selection = replace(cell, seeds=recipe.grid.SELECTION)
    assert selection.name == "A1_lr0.001_beta0.1_constant_main_s100-101-102"
    path = tmp_path / f"{selection.name}.npz"
    np.savez(path, **trace)
    again = recipe.grid.load(tmp_path / f"{cell.name}.npz")  # finds that of the selection seeds
    assert again.keys() == trace.keys()
    rows = recipe.rows.rows_of_folder(tmp_path)
    assert [(row["condition"], row["seed"]) for row in rows] == [
        (condition, seed) for condition in CONDITIONS for seed in (0, 100)
    ]
    runs = recipe.runs.read([{name: str(value) for name, value in row.items()} for row in rows])
    noisy = next(run for run in runs if run.setting == ("flips 30", 0.1, "constant"))
    place = [str(c) for c in trace["condition"]].index("flips 30")  # its first seed is 100
    assert noisy.lr == 1e-3
    assert [point.end for point in noisy.epochs] == ["epoch 1", "epoch 2"]
    for metric, digits in recipe.rows.METRICS.items():
        found = [point.of(metric, {100})[0] for point in noisy.epochs]
        np.testing.assert_allclose(found, trace[metric][1:, place], atol=0.51 * 10**-digits)
    ledger = trace["ledger"][place]
    auc = recipe.rows.detection_auc(ledger, trace["flipped"][place])
    assert noisy.single["auc"][100] == pytest.approx(auc, abs=1e-3)
    rate = recipe.estimates.estimate_of(torch.from_numpy(ledger)).reference_rate
    assert noisy.single["e_hat"][100] == pytest.approx(rate, abs=1e-3)
    assert noisy.single["noise_rate"][100] == pytest.approx(115 / 384, abs=1e-3)


def run_of(recipe, arm, lr, seeds, **values):
    """A run of two epochs; values (accuracy, reward, kl) per epoch, or per seed and epoch."""
    ends = len(recipe.rows.ENDPOINTS)

    def series(found):
        return np.concatenate([found, np.full(ends - 2, np.nan)])

    metrics = {}
    for metric in recipe.rows.METRICS:
        found = values.get(metric, (0.5, 0.5))
        metrics[metric] = {
            seed: series(found[seed] if isinstance(found, dict) else found) for seed in seeds
        }
    single = {name: dict.fromkeys(seeds, 0.3) for name in recipe.rows.SINGLE}
    setting = ("flips 30", 0.1, "constant")
    return recipe.runs.Run(arm=arm, setting=setting, lr=lr, values=metrics, single=single)


def test_choices_are_made_on_selection_seeds_and_reported_on_fresh_ones(recipe):
    seeds = (100, 101, 0, 1, 2)
    good_for_selection = {s: (0.8, 0.7) if s >= 100 else (0.6, 0.9) for s in seeds}
    base = run_of(recipe, "A1", 3e-4, seeds, accuracy=good_for_selection)
    rival = {100: (0.7, 0.8), 101: (0.7, 0.8), 0: (0.9, 0.65), 1: (0.9, 0.66), 2: (0.9, 0.67)}
    other = run_of(recipe, "A9", 3e-4, seeds, accuracy=rival)
    lines = [line for line in recipe.scores.lines_of([base, other]) if line["table"] == "tuned"]
    mine = next(line for line in lines if line["arm"] == "A9")
    assert mine["at"] == "lr 0.0003, epoch 2"
    assert mine["seeds"] == "fresh"
    assert mine["n"] == 3
    assert mine["accuracy"] == pytest.approx(0.66)
    # differences .05 .06 .07 to epoch 1 of the baseline: sd .01, t of two degrees 4.303
    half = 4.303 * 0.01 / math.sqrt(3)
    found = [mine[name] for name in ("difference", "low", "high")]
    np.testing.assert_allclose(found, [0.06, 0.06 - half, 0.06 + half], atol=1e-4)


def test_without_fresh_seeds_a_table_says_so(recipe):
    runs = [run_of(recipe, arm, 3e-4, (100, 101)) for arm in ("A1", "A9")]
    lines = recipe.scores.lines_of(runs)
    assert {line["seeds"] for line in lines if line["table"] != "noise"} == {"selection only"}
    assert "selection only" in recipe.tables.text_of(lines)
    assert next(recipe.verdict.verdict(lines)) == "seeds: selection only"


def test_reward_at_matched_kl(recipe):
    """Of two rates, the one that is within the KL; more rates than the rival's do not count."""
    seeds = (100, 101, 0, 1)
    slow = run_of(recipe, "A9", 1e-4, seeds, reward=(0.2, 0.4), kl=(0.9, 2.5))
    fast = run_of(recipe, "A9", 1e-3, seeds, reward=(0.9, 0.7), kl=(4.5, 12.0))
    lone = run_of(recipe, "A9", 3e-3, seeds, reward=(5.0, 5.0), kl=(0.1, 0.1))
    bad = [run_of(recipe, "A1", lr, seeds, reward=(-0.5, -0.1), kl=(1, 2)) for lr in (1e-4, 1e-3)]
    chosen = recipe.matched.frontier([slow, fast])
    rewards = [float(point.mean("reward", {0, 1})) for point in chosen]
    grid = recipe.matched.KL_GRID
    expected = [0 if k < 0.9 else 0.2 if k < 2.5 else 0.4 if k < 4.5 else 0.9 for k in grid]
    np.testing.assert_allclose(rewards, expected)
    area = recipe.matched.area(chosen, {0, 1})
    np.testing.assert_allclose(area, np.trapezoid([0, *expected], [0, *grid]) / 10)
    lines = [
        line
        for line in recipe.scores.lines_of([slow, fast, lone, *bad])
        if (line["table"], line["arm"], line["against"]) == ("matched KL", "A9", "A1")
    ]
    assert {line["lrs"] for line in lines} == {"2"}
    assert lines[-1]["at"] == "area"
    assert lines[-1]["difference"] == pytest.approx(float(area[0]), abs=1e-4)  # A1's best: nothing


def test_flips_at_equal_clean_fit(recipe):
    seeds = (100, 101, 0, 1)
    first = run_of(recipe, "A9", 1e-3, seeds, clean_fitted=(0.84, 0.86), flipped_fitted=(0.1, 0.3))
    second = run_of(recipe, "A9", 1e-4, seeds, clean_fitted=(0.87, 0.95), flipped_fitted=(0.2, 0.6))
    at = {level: recipe.matched.fewest_flips([first, second], level) for level in (0.85, 0.9, 0.99)}
    assert str(at[0.85]) == "lr 0.0001, epoch 1"
    assert str(at[0.9]) == "lr 0.0001, epoch 2"
    assert at[0.99] is None


def test_worst_over_learning_rates(recipe):
    seeds = (100, 0, 1)
    lrs = recipe.scores.ROBUST
    assert max(lrs) / min(lrs) > 30
    runs = [run_of(recipe, "A1", lr, seeds, accuracy=(0.8, 0.8), kl=(1, 1)) for lr in lrs]
    last = [0.8, 0.795, 0.791, 0.792]
    runs += [
        run_of(recipe, "A9", lr, seeds, accuracy=(0.1, a), kl=(9, k))
        for lr, a, k in zip(lrs, last, (0.5, 0.6, 0.7, 0.9), strict=True)
    ]
    lines = recipe.scores.lines_of(runs)
    worst = next(x for x in lines if (x["table"], x["arm"]) == ("robust, worst", "A9"))
    assert worst["at"] == f"epoch 2, worst at lr {lrs[2]:g}"
    assert (worst["lrs"], worst["kl"]) == ("4 of 4", 0.9)
    assert worst["difference"] == pytest.approx(-0.009)
    mean = next(x for x in lines if (x["table"], x["arm"]) == ("robust, mean", "A9"))
    assert mean["accuracy"] == pytest.approx(np.mean(last), abs=1e-4)
    said = [line for line in recipe.verdict.verdict(lines) if line.startswith("1. A9")]
    assert said == ["1. A9 (epoch 2), flips 30: met, -0.9 points, largest KL 0.9 (-0.1)"]


@pytest.mark.skipif(not RESULTS, reason="no results are committed")
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_are_made_from_the_committed_rows(recipe, path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    reporting = importlib.import_module("reporting")
    lines = recipe.scores.lines_of(recipe.runs.read(reporting.read_csv(path)))
    committed = reporting.read_csv(path.with_name(f"summary_{path.name}"))
    sys.modules.pop("reporting")
    assert len(committed) == len(lines)
    for line, old in zip(lines, committed, strict=True):
        for name, value in line.items():
            if isinstance(value, float):
                assert float(old[name]) == pytest.approx(value, abs=2e-4), (line, name)
            else:
                assert old[name] == str(value), (line, name)
