"""The INR study: images, features, loss and metrics by other means; committed tables."""

import csv
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image

STUDY = "inr"
SHORT = {"steps": 32, "eval_steps": [16, 32]}


@pytest.fixture
def inr(study):
    return study.inr_task


def members(harness, conditions=("china", "flower"), seeds=(0, 1), lrs=(1e-3,)):
    return harness.tasks.members_of(seeds, conditions, lrs)


@pytest.mark.parametrize("name", ["china", "flower"])
def test_image_is_a_block_mean(inr, name):
    image = inr.clean_image(name).view(64, 64)
    photo = load_sample_image(f"{name}.jpg").astype(np.float64) / 255
    top, left = inr.CORNERS[name]
    for row, column in ((0, 0), (63, 63), (10, 40)):
        a, b = top + 6 * row, left + 6 * column
        wanted = photo[a : a + 6, b : b + 6].mean()
        assert float(image[row, column]) == pytest.approx(wanted, abs=1e-6)


def test_noise_has_its_size_and_its_seed(inr):
    noise = torch.stack([inr.noisy_image("china", s) - inr.clean_image("china") for s in range(10)])
    assert float(noise.std()) == pytest.approx(0.15, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=4 * 0.15 / 40_960**0.5)
    assert torch.equal(inr.noisy_image("china", 3), inr.noisy_image("china", 3))
    assert not torch.equal(noise[0], noise[1])


def test_features_are_waves_of_the_pixel_centres(inr):
    found = inr.features(5).double()
    g = torch.Generator().manual_seed(10_005)
    frequency = inr.BANDWIDTH * torch.randn(2, 64, generator=g).double()
    assert found.shape == (4096, 128)
    for row, column in ((0, 0), (7, 60)):
        at = torch.tensor([(row + 0.5) / 64, (column + 0.5) / 64], dtype=torch.float64)
        phase = 2 * math.pi * (at @ frequency)
        wanted = torch.cat([phase.cos(), phase.sin()])
        torch.testing.assert_close(found[64 * row + column], wanted, atol=1e-4, rtol=0)


def test_metrics_by_hand(inr):
    clean = torch.rand(2, 4096, dtype=torch.float64)
    noisy = clean + 0.1 * torch.randn(2, 4096, dtype=torch.float64)
    error = (noisy - clean).square().mean(1)
    torch.testing.assert_close(inr.psnr(noisy, clean), 10 * (1 / error).log10())
    for share in (0.0, 0.3, 1.0):
        mixed = share * noisy + (1 - share) * clean
        wanted = torch.full((2,), share, dtype=torch.float64)
        torch.testing.assert_close(inr.noise_share(mixed, clean, noisy), wanted)


def test_loss_is_the_mean_square_over_the_batch(inr, harness):
    task = inr.InrTask(members(harness), **SHORT)
    params = task.initial()
    found = task.losses(params, 0)
    weights = {name: value.double().numpy() for name, value in params.items()}
    for m, member in enumerate(task.members):
        rows = task.order[member.seed][:256]
        x = inr.features(member.seed)[rows].double().numpy()
        for i in range(3):
            x = x @ weights[f"w{i}"][m] + weights[f"b{i}"][m]
            x = x if i == 2 else np.maximum(x, 0)
        target = inr.noisy_image(member.condition, member.seed)[rows].double().numpy()
        assert float(found[m]) == pytest.approx(np.square(x[:, 0] - target).mean(), rel=1e-4)


def test_an_epoch_sees_each_pixel_once(inr, harness):
    task = inr.InrTask(members(harness), **SHORT)
    params = task.initial()
    task.losses(params, 0)
    first = task.order.clone()
    assert first.shape == (2, 4096)
    assert torch.equal(first.sort(1).values, torch.arange(4096).expand(2, -1))
    task.losses(params, 15)
    assert torch.equal(task.order, first)
    task.losses(params, 16)
    assert not torch.equal(task.order, first)


def test_members_share_the_start_and_go_on_alone(inr, harness):
    task = inr.InrTask(members(harness, lrs=(1e-3, 1e-2)), **SHORT)
    params = task.initial()
    torch.testing.assert_close(params["w0"][0], params["w0"][2])
    full = task.metrics(params)
    index = torch.tensor([1, 6])
    task.keep(index)
    part = task.metrics({name: value[index] for name, value in params.items()})
    for name, value in full.items():
        torch.testing.assert_close(part[name], value[index])


def made(shift):
    scores, rows = [], []
    for condition in ("china", "flower"):
        for seed in range(5):
            for arm, more in (("AdamW", 0.0), ("soft-5", shift), ("norm(soft-5)", shift)):
                key = {"arm": arm, "condition": condition, "seed": seed}
                numbers = dict.fromkeys(("tuned", "tuned_stopped", "range"), 20.0 + seed + more)
                scores.append(key | numbers)
                end = {"psnr_max": 21.5, "psnr_end": 20.0, "noise_share_end": 0.25}
                rows.append(key | {"lr": "0.001"} | end)
    return rows, scores


def test_verdict_on_made_up_rows(study):
    lines = study.inr_verdict.verdict(*made(1.0))
    assert lines[0] == "AdamW, lr 0.001: 1.50 dB below its best at the end, noise 25%"
    assert lines[1].startswith("soft-5 over AdamW: tuned +1.00 dB [+1.00, +1.00] better (+4.6%")
    assert lines[3].startswith("soft-5 over norm(soft-5): tuned +0.00 dB [+0.00, +0.00] level")
    assert "worse" in study.inr_verdict.verdict(*made(-1.0))[1]
    mean, low, high = study.inr_verdict.relative_difference(made(2.0)[1], "soft-5", "range")
    assert mean == pytest.approx(np.mean([2 / (20 + s) for s in range(5)]))
    assert low < mean < high


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_committed_scores_follow_from_the_committed_members(study, harness):
    folder = study.bench.HERE / "results"
    (table,) = folder.glob("2*.csv")
    (scores,) = folder.glob("scores_*.csv")
    cells = {}
    for row in read(table):
        cells.setdefault((row["arm"], row["condition"]), []).append(row)
    scored = read(scores)
    assert {(r["arm"], r["condition"]) for r in scored} == set(cells)

    def end(row):  # a run that ends worse than it began counts as untrained
        return max(float(row["psnr_end"]), float(row["psnr_start"]))

    for row in scored:
        cell = cells[row["arm"], row["condition"]]
        mine = {r["lr"]: end(r) for r in cell if r["seed"] == row["seed"]}
        assert float(row["tuned"]) == pytest.approx(mine[row["tuned_lr"]], rel=1e-5)
        wanted = np.mean([mine[f"{lr:g}"] for lr in harness.scores.RANGE])
        assert float(row["range"]) == pytest.approx(wanted, rel=1e-5)
        others = {}
        for r in cell:
            if r["seed"] != row["seed"]:
                others.setdefault(r["lr"], []).append(end(r))
        mean = {lr: np.mean(values) for lr, values in others.items()}
        assert mean[row["tuned_lr"]] == pytest.approx(max(mean.values()), rel=1e-5)
        best = max(float(r["psnr_max"]) for r in cell if r["seed"] == row["seed"])
        assert float(row["tuned_stopped"]) <= best + 1e-4
