"""The study of the spectrum, pruning, closed heads and grokking: its parts against plain twins."""

import itertools
import math

import pytest
import torch
from benchmarks.harness.provenance import BENCHMARKS, PROVENANCE, read_csv
from benchmarks.reservoir import grokking_time, heads, pruning, spectrum, study


def committed(pattern):
    (path,) = (BENCHMARKS / "reservoir" / "results").glob(pattern)
    return [{k: v for k, v in r.items() if k not in PROVENANCE} for r in read_csv(path)]


def test_the_committed_comparisons_follow_from_the_tables():
    found = {name: committed(f"{name}_*.csv") for name in study.QUESTIONS}
    rows = [{k: str(v) for k, v in row.items()} for row in study.comparisons(found)]
    assert rows == committed("2*.csv")


def test_the_identity_holds_to_rounding_and_the_flow_as_steps_shorten():
    rows = spectrum.identity_rows([7], quick=True)
    assert {float(row["exact"]) < 1e-13 for row in rows} == {True}
    for model in spectrum.MODELS:
        flow = [float(row["flow"]) for row in rows if row["model"] == model]
        for long, short in itertools.pairwise(flow):
            assert short == pytest.approx(long / 2, rel=0.2)
    left = {row["model"]: float(row["residual"]) for row in rows if row["lr"] == "0.3"}
    assert left["tangent"] < 1e-13 < 1e-6 < left["GELU net"]


def test_ridge_is_ridge_and_its_strength_the_best_of_gcv():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(30, 50, generator=draw, dtype=torch.float64)
    y = x[:, :3] + 2 * torch.randn(30, 3, generator=draw, dtype=torch.float64)
    kernel, eye = x @ x.T, torch.eye(30, dtype=torch.float64)

    def gcv(strength):
        left = strength * torch.linalg.inv(kernel + strength * eye)
        return float((left @ y).square().sum() / left.trace() ** 2)

    scale = float(kernel.trace()) / 30
    best = min((float(s) * scale for s in heads.STRENGTHS), key=gcv)
    assert heads.STRENGTHS[0] * scale < best < heads.STRENGTHS[-1] * scale
    wanted = torch.linalg.solve(kernel + best * eye, y)
    torch.testing.assert_close(heads.ridge(kernel, y), wanted)


@pytest.mark.parametrize("unit", ["weight", "row"])
@pytest.mark.parametrize("name", ["magnitude", "Wanda"])
def test_the_lowest_share_is_cut(unit, name):
    task = pruning.Digits([pruning.Member(seed=7, condition="right")], 1)
    params = task.initial()
    score = {key: params[key].abs() for key in pruning.CUT}
    left = task.named(pruning.chosen(task, score, 0.75, unit, name).float())
    for key, p in params.items():
        if key not in pruning.CUT:
            assert left[key].all()
            continue
        value, kept = p[0].abs(), left[key][0].bool()
        if unit == "row":
            value, kept = value.mean(1), kept.all(1)
            assert torch.equal(left[key][0].amax(1).bool(), kept)
        whole = (value[None], kept[None]) if (unit, name) != ("weight", "Wanda") else (value, kept)
        for v, k in zip(*whole, strict=True):
            assert int(k.sum()) == k.numel() // 4
            assert v[k].min() > v[~k].max()


def test_a_forecast_that_is_the_law_has_no_error():
    rows = [
        {"lr": lr, "decay": decay, "seed": seed, "grokked": str(round(10 / (lr * decay))),
         "fitted": str(40 + seed), "norm_change": "0.1", "train_loss_change": "-1"}
        for lr in (1e-3, 1e-2) for decay in (0.1, 1.0) for seed in (0, 1)
    ]  # fmt: skip
    found = {what: values for what, _, values, _ in grokking_time.compare(rows)}
    assert max(found["error, 1/(lr x decay)"].values()) < 1e-3
    # Left out, a setting is as far from the mean of the others as the grid is wide: 10 and 100.
    apart = [abs(math.log2(10) * step) for step in (4 / 3, 0, 0, -4 / 3)]
    assert found["error, one number"][0] == pytest.approx(sum(apart) / 4, abs=1e-3)
