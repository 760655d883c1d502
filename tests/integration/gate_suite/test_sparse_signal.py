"""The sparse-signal study: data, exact excess error, verdict, committed tables."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

STUDY = "sparse_signal"
RESULTS = Path(__file__).parents[3] / "recipes" / "benchmarks" / STUDY / "results"


@pytest.fixture(scope="module")
def task_module(study):
    return study.sparse_signal_task


def test_rotation_is_orthogonal_and_differs(task_module):
    first, second = (
        task_module.rotation(20, torch.Generator().manual_seed(s)).double() for s in (0, 1)
    )
    torch.testing.assert_close(first @ first.T, torch.eye(20).double(), atol=1e-5, rtol=0)
    assert (first - second).abs().max() > 0.1


def test_rotations_have_no_preferred_sign(task_module):
    traces = [
        task_module.rotation(6, torch.Generator().manual_seed(s)).trace().item() for s in range(400)
    ]
    # Haar: the trace has mean 0 and variance 1; the QR of LAPACK alone has a mean well below 0
    assert abs(np.mean(traces)) < 0.2
    assert np.var(traces) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("name", ["linear", "net"])
def test_rotated_data_are_the_sparse_data_turned(task_module, name):
    sparse, rotated = (task_module.draw(f"{name} {kind}", 4) for kind in ("sparse", "rotated"))
    torch.testing.assert_close(rotated.x @ rotated.basis, sparse.x, atol=2e-5, rtol=0)
    torch.testing.assert_close(rotated.test_x @ rotated.basis, sparse.test_x, atol=2e-5, rtol=0)
    assert torch.equal(rotated.y, sparse.y)
    assert torch.equal(rotated.test_y, sparse.test_y)
    assert int(sparse.relevant.sum()) == task_module.MODELS[name].relevant
    assert torch.equal(sparse.basis, torch.eye(sparse.x.shape[1]))


@pytest.mark.parametrize("condition", ["linear sparse", "linear rotated", "linear dense"])
def test_linear_targets_follow_from_the_weights(task_module, condition):
    drawn = task_module.draw(condition, 2)
    torch.testing.assert_close(
        drawn.test_y[:, 0].double(),
        drawn.test_x.double() @ drawn.weight.double(),
        atol=1e-4,
        rtol=0,
    )
    assert drawn.weight.norm().item() == pytest.approx(1, abs=1e-5)
    assert drawn.test_y.var().item() == pytest.approx(1, abs=0.2)
    noise = drawn.y - (drawn.x @ drawn.weight)[:, None]
    assert noise.std().item() == pytest.approx(0.7, abs=0.15)


def test_net_targets_depend_on_the_relevant_inputs_alone(task_module):
    drawn = task_module.draw("net sparse", 1)
    assert drawn.test_y.mean().item() == pytest.approx(0, abs=0.15)
    assert drawn.test_y.var().item() == pytest.approx(1, abs=0.25)

    def explained(x):  # by least squares on all products of two inputs
        pairs = torch.stack([x[:, i] * x[:, j] for i in range(3) for j in range(i, 3)], 1)
        design = torch.cat([torch.ones(len(x), 1), x, pairs, x.relu()], 1).double()
        fit = design @ torch.linalg.lstsq(design, drawn.test_y.double()).solution
        return 1 - (drawn.test_y - fit).var() / drawn.test_y.double().var()

    assert explained(drawn.test_x[:, drawn.relevant]) > 0.6
    assert explained(drawn.test_x[:, ~drawn.relevant][:, :3]) < 0.05


@pytest.mark.parametrize("kind", ["sparse", "rotated"])
def test_linear_metrics(task_module, harness, kind):
    members = harness.tasks.members_of([0, 3], [f"linear {kind}"], [1e-3])
    task = task_module.SparseSignalTask(members, steps=1)
    start = task.initial()
    assert not start["weight"].any()
    assert task.metrics(start)["excess"].tolist() == pytest.approx([1, 1], abs=1e-5)
    generator = torch.Generator().manual_seed(9)
    weight = 0.1 * torch.randn(2, 1, 200, generator=generator)
    found = task.metrics({"weight": weight})
    for m, seed in enumerate((0, 3)):
        drawn = task_module.draw(f"linear {kind}", seed)
        x = torch.randn(40_000, 200, generator=generator, dtype=torch.float64)
        error = x @ (weight[m, 0] - drawn.weight).double()
        assert found["excess"][m].item() == pytest.approx(error.square().mean().item(), rel=0.05)
        in_z = drawn.basis.double().T @ weight[m, 0].double()
        assert found["on"][m].item() == pytest.approx(in_z[drawn.relevant].norm().item(), rel=1e-4)
        assert found["off"][m].item() == pytest.approx(
            in_z[~drawn.relevant].norm().item(), rel=1e-4
        )


def test_net_metrics(task_module, harness):
    members = harness.tasks.members_of([1], ["net sparse", "net rotated"], [1e-3])
    task = task_module.SparseSignalTask(members, steps=1)
    params = task.initial()
    found = task.metrics(params)
    for m, member in enumerate(members):
        drawn = task_module.draw(member.condition, 1)
        w = {name: p[m].double() for name, p in params.items()}
        hidden = (drawn.test_x.double() @ w["0.weight"].T + w["0.bias"]).clamp_min(0)
        error = hidden @ w["2.weight"].T + w["2.bias"] - drawn.test_y
        assert found["excess"][m].item() == pytest.approx(error.square().mean().item(), rel=1e-4)
        in_z = w["0.weight"] @ drawn.basis.double()
        assert found["on"][m].item() == pytest.approx(
            in_z[:, drawn.relevant].norm().item(), rel=1e-4
        )


def test_full_training_reaches_the_interpolating_solutions(task_module, harness):
    """Long training fits the noisy targets: excess well above that of the best stopped model."""
    members = harness.tasks.members_of([0], ["linear sparse"], [3e-3])
    task = task_module.SparseSignalTask(members, steps=1200)
    trace = harness.training.train(task, harness.arms.ARMS["AdamW"])
    assert trace["excess"][0, 0] == pytest.approx(1, abs=1e-5)
    assert trace["excess"].min() < 0.95
    assert trace["excess"][-1, 0] > trace["excess"].min() + 0.1


def made_up(values):
    """Score rows from {arm: (sparse, other)} with (tuned, range); seeds move all arms alike."""
    kinds = {
        "linear sparse": 0,
        "linear rotated": 1,
        "linear dense": 1,
        "net sparse": 0,
        "net rotated": 1,
    }
    return [
        {
            "arm": arm,
            "condition": condition,
            "seed": str(seed),
            **dict.fromkeys(("tuned", "tuned_stopped"), f"{by_kind[kind][0] * (1 + seed / 100)}"),
            "range": f"{by_kind[kind][1] * (1 + seed / 100)}",
        }
        for arm, by_kind in values.items()
        for condition, kind in kinds.items()
        for seed in range(3)
    ]


BASE = {"AdamW": ((0.8, 1.0), (0.8, 1.0))}


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ({"soft-5": ((0.4, 0.5), (0.9, 1.0))}, "other: worse; the gain needs the signal along"),
        ({"soft-5": ((0.4, 0.5), (0.8, 1.0))}, "dense: level; the gain needs the signal along"),
        ({"soft-5": ((0.4, 0.5), (0.4, 1.0))}, "dense: better; that the coordinates matter is not"),
        (
            {"soft-5": ((0.8, 0.5), (0.9, 1.0))},
            "no win on sparse signals with a tuned rate (level)",
        ),
        (
            {"soft-5": ((0.4, 0.5), (0.9, 1)), "ratio(soft-5)": ((0.4, 0.7), (0.9, 1))},
            "a control reaches the gain",
        ),
        (
            {"soft-5": ((0.4, 0.5), (0.9, 1)), "norm(soft-5)": ((0.8, 0.7), (0.9, 1))},
            "the gain is the gate's own",
        ),
    ],
)
def test_verdict(study, arms, expected):
    lines = study.sparse_signal_verdict.verdict(made_up({**BASE, **arms}))
    (last,) = (line for line in lines if line.startswith("=> soft-5"))
    assert expected.replace("other: ", "rotated or dense: ") in last


def test_basis_effect_is_the_difference_of_the_relative_differences(study):
    scores = made_up({**BASE, "soft-5": ((0.4, 0.5), (0.9, 1.0))})
    mean, low, high = study.sparse_signal_verdict.basis_effect(scores, "soft-5", "tuned")
    assert mean == pytest.approx(0.5 + 0.125)
    assert low == pytest.approx(high)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.1, 0.3, "level"), (0.0, 0.3, "level")],
)
def test_an_interval_across_zero_is_level(study, low, high, expected):
    assert study.sparse_signal_verdict.word(low, high) == expected


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("prefix", ["", "selection_"])
def test_committed_scores_agree_with_the_committed_rows(prefix):
    (path,) = RESULTS.glob("selection_[0-9]*.csv" if prefix else "2*.csv")
    members = {}
    for m in read(path):
        members.setdefault((m["arm"], m["condition"], m["seed"], m["weight_decay"]), []).append(m)
    (scores,) = RESULTS.glob(f"{prefix}scores_*.csv")
    compared = 0
    for row in read(scores):
        mine = members[(row["arm"], row["condition"], row["seed"], row["tuned_decay"])]
        ends = {}
        for m in mine:
            start, end = float(m["excess_start"]), float(m["excess_end"])
            fine = m["diverged"] == "0" and np.isfinite(end)
            ends[float(m["lr"])] = min(start, end) if fine else start
        assert float(row["tuned"]) == pytest.approx(ends[float(row["tuned_lr"])], rel=1e-4)
        ranged = np.mean([ends[lr] for lr in (3e-4, 1e-3, 3e-3, 1e-2)])
        assert float(row["range"]) == pytest.approx(ranged, rel=1e-4)
        compared += 1
    assert compared == len({key[:3] for key in members})


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
