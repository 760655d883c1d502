"""The harness: members of a stack train as `PopRiskAdamW` would train them alone."""

import dataclasses

import numpy as np
import pytest
import torch
from benchmarks.harness import provenance
from benchmarks.harness.arms import ARMS, GATES
from benchmarks.harness.grid import run_arms
from benchmarks.harness.stacked_adam import StackedAdam
from benchmarks.harness.tables import differences, interval, relative, score_rows, word
from benchmarks.harness.timing import block_interval, blocks, ratio_row
from benchmarks.harness.train import (
    SupervisedTask,
    accuracy,
    cross_entropy,
    members_of,
    train,
)
from torch import nn

from poprisk_integrations import PopRiskAdamW

STEPS, BATCH = 40, 8
MEMBERS = members_of([0, 3], ["0.5", "1"], [1e-3, 1e-2], [0.0, 0.1])


def blobs(condition, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (64,), generator=generator)
    x = torch.randn(64, 5, generator=generator) + y[:, None] * float(condition)
    return x[:40], y[:40], x[40:], y[40:]


def network():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def build(members, kind=SupervisedTask):
    return kind(
        members,
        blobs,
        network,
        cross_entropy,
        {"accuracy": accuracy, "loss": cross_entropy},
        batch_size=BATCH,
        steps=STEPS,
        eval_steps=[STEPS // 2, STEPS],
    )


def alone(member, options, exempt=()):
    """Loss on the test set after training one member with the optimizer itself."""
    x, y, test_x, test_y = blobs(member.condition, member.seed)
    torch.manual_seed(member.seed)
    model = network()
    params = list(model.parameters())
    groups = [
        {"params": [p for i, p in enumerate(params) if i not in exempt]},
        {"params": [params[i] for i in exempt], "gate": "none"},
    ]
    optimizer = PopRiskAdamW(
        groups[: 2 if exempt else 1],
        member.lr,
        weight_decay=member.weight_decay,
        fused=False,
        foreach=False,
        **options,
    )
    generator = torch.Generator().manual_seed(40_000 + member.seed)
    for step in range(STEPS):
        if step % (len(x) // BATCH) == 0:
            order = torch.randperm(len(x), generator=generator)
        first = step % (len(x) // BATCH) * BATCH
        rows = order[first : first + BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(test_x), test_y))


@pytest.fixture(scope="module")
def plain():
    return train(build(MEMBERS), GATES["AdamW"])["loss"][-1]


@pytest.mark.parametrize("name", GATES)
def test_every_gated_arm_is_the_optimizer(name, plain):
    arm = GATES[name]
    if arm.gate_warmup:  # the task has fewer steps than its warm-up
        arm = dataclasses.replace(arm, gate_warmup=10)
    trace = train(build(MEMBERS), arm)
    for place in (0, 5, len(MEMBERS) - 1):
        assert trace["loss"][-1, place] == pytest.approx(
            alone(MEMBERS[place], arm.options()), rel=2e-5
        )
    assert (name == "AdamW") == np.array_equal(trace["loss"][-1], plain)  # it did something


@pytest.mark.parametrize("gate", ["soft-5", "paper", "snr-fresh", "soft-5-decay"])
def test_exempt_tensors_are_a_group_without_gate(gate):
    arm = dataclasses.replace(GATES[gate], exempt=(0, 3))
    trace = train(build(MEMBERS), arm)
    for place in (1, len(MEMBERS) - 2):
        expected = alone(MEMBERS[place], arm.options(), exempt=(0, 3))
        assert trace["loss"][-1, place] == pytest.approx(expected, rel=2e-5)
    gated = train(build(MEMBERS), GATES[gate])
    assert np.abs(gated["loss"][-1] - trace["loss"][-1]).max() > 1e-4


def test_members_neither_see_each_other_nor_depend_on_their_group():
    whole, part = (train(build(some), GATES["soft-5"]) for some in (MEMBERS, MEMBERS[3:5]))
    np.testing.assert_allclose(whole["loss"][:, 3:5], part["loss"], rtol=1e-5)


def test_controls_imitate_what_they_should():
    gated, plain = (train(build(MEMBERS), ARMS[name]) for name in ("soft-5", "AdamW"))
    norm = train(build(MEMBERS), ARMS["norm(soft-5)"], recorded=gated)
    np.testing.assert_allclose(norm["update_norm"], gated["update_norm"], rtol=1e-4)
    assert (gated["update_norm"][5:] < plain["update_norm"][5:]).mean() > 0.9
    mask = train(build(MEMBERS), ARMS["mask(soft-5)"], recorded=gated)
    numel = sum(p.numel() for p in network().parameters())
    assert np.abs(mask["moved_share"] - gated["moved_share"]).max() < 5 * 0.5 / numel**0.5
    assert mask["loss"][-1].tolist() != norm["loss"][-1].tolist()


def test_ratio_opens_where_the_mean_beats_the_rest_of_the_second_moment():
    """The control by hand, in double precision."""
    arm = ARMS["ratio(soft-5)"]
    grads = torch.randn(12, 2, 7, generator=torch.Generator().manual_seed(0)) + 0.8
    theta = torch.zeros(2, 7)
    stacked = StackedAdam(arm, [7], torch.ones(2), torch.zeros(2), [0, 1])
    m = v = np.zeros((2, 7))
    expected = np.zeros((2, 7))
    for t, g in enumerate(grads.double().numpy(), start=1):
        stacked.step(theta, grads[t - 1])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        mean, second = m / (1 - 0.9**t), v / (1 - 0.999**t)
        q = np.maximum(0, 1 - arm.alpha * np.maximum(second - mean**2, 0) / mean**2)
        expected -= q * mean / (np.sqrt(second) + 1e-8)
    np.testing.assert_allclose(theta.numpy(), expected, rtol=1e-3, atol=1e-4)


class Fragile(SupervisedTask):
    """The larger rate meets a loss that is not a number at step 7."""

    def losses(self, params, step):
        bad = torch.tensor([m.lr == 1e-2 for m in self.members])
        return super().losses(params, step) * torch.where(bad & (step == 7), torch.nan, 1.0)


def test_a_member_that_diverges_does_not_take_the_others_along():
    trace = train(build(MEMBERS, Fragile), GATES["AdamW"])
    whole = train(build(MEMBERS), GATES["AdamW"])
    bad = trace["lr"] == 1e-2
    assert (trace["diverged"] == bad).all()
    np.testing.assert_allclose(trace["loss"][-1, ~bad], whole["loss"][-1, ~bad], rtol=1e-6)
    assert (trace["loss"][1, bad] == trace["loss"][2, bad]).all()  # it stopped there


def test_runs_resume_from_their_files(tmp_path, capsys):
    arms = ["norm(soft-5)", GATES["paper"]]
    first = run_arms(build, arms, MEMBERS, tmp_path, group=5)
    assert list(first) == ["norm(soft-5)", "paper"]  # what a control needs is not returned
    assert "soft-5_0: 5 members" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 3 * 4
    (tmp_path / "paper_1.npz").unlink()
    again = run_arms(build, arms, MEMBERS, tmp_path, group=5)
    assert capsys.readouterr().out.count("members") == 1
    for name, trace in first.items():
        for key, value in trace.items():
            np.testing.assert_array_equal(value, again[name][key])
    with pytest.raises(ValueError, match="holds other members"):
        run_arms(build, arms, MEMBERS[1:], tmp_path, group=5)


def trace_of(values):
    """A made-up trace of end values by (lr, seed), each with a better middle of training."""
    cells = [(lr, seed, v) for lr, row in values.items() for seed, v in enumerate(row)]
    ends = np.array([v for _, _, v in cells])
    return {
        "condition": np.array(["c"] * len(cells)),
        "lr": np.array([lr for lr, _, _ in cells]),
        "weight_decay": np.zeros(len(cells)),
        "seed": np.array([seed for _, seed, _ in cells]),
        "diverged": np.zeros(len(cells), bool),
        "eval_step": np.array([0, 10, 20]),
        "score": np.stack([np.full(len(cells), 0.1), ends + 0.05, ends]),
    }


def test_rates_are_tuned_on_the_other_seeds():
    # The second seed alone would choose 1e-2; the others choose 1e-3 for it.
    trace = trace_of({1e-3: [0.8, 0.2, 0.8], 1e-2: [0.3, 0.9, 0.3]})
    rows = score_rows("arm", trace, "score", higher=True)
    assert [row["tuned_lr"] for row in rows] == ["0.01", "0.001", "0.01"]
    assert [row["tuned"] for row in rows] == ["0.3", "0.2", "0.3"]
    assert [row["range"] for row in rows] == ["0.55", "0.55", "0.55"]
    assert [row["stopped_step"] for row in rows] == [10, 10, 10]
    assert rows[1]["tuned_stopped"] == "0.25"


def test_untrained_is_the_worst_that_counts_and_losses_are_better_lower():
    trace = trace_of({1e-3: [0.8, 0.8], 1e-2: [0.01, np.nan]})
    trace["diverged"][0] = True
    rows = score_rows("arm", trace, "score", higher=True)
    assert [row["range_worst"] for row in rows] == ["0.1", "0.1"]
    assert [row["range"] for row in rows] == ["0.1", "0.45"]
    rows = score_rows("arm", trace_of({1e-3: [0.05] * 2, 1e-2: [0.09] * 2}), "score", higher=False)
    assert [row["tuned"] for row in rows] == ["0.05", "0.05"]
    assert relative(0.9, 1.0, higher=False) == pytest.approx(0.1)


def test_differences_are_paired_by_condition_and_seed():
    cells = (("AdamW", "0", 2.0), ("AdamW", "1", 4.0), ("soft-5", "1", 3.0), ("soft-5", "2", 9.0))
    row = {"condition": "c", "metric": "loss", "higher": "0"}
    rows = [{**row, "arm": arm, "seed": seed, "tuned": f"{v}"} for arm, seed, v in cells]
    assert differences(rows, "soft-5", "AdamW", "tuned") == {("c", 1): 0.25}
    assert differences(rows, "soft-5", "AdamW", "tuned", "accuracy") == {}


def test_interval_pairs_by_seed_and_weights_tasks_alike():
    few, many = (
        {(name, seed): x for seed in range(n)} for name, n, x in (("a", 2, 1.0), ("b", 8, 0.0))
    )
    assert interval({**few, **many}) == (0.5, 0.5, 0.5)
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        _, low, high = interval({("a", s): generator.normal() for s in range(20)}, draws=1000)
        hits += low < 0 < high
    assert 0.88 < hits / 200 < 0.98
    words = [word(*ends) for ends in ((0.01, 0.2), (-0.2, -0.01), (-0.1, 0.3), (0.0, 0.3))]
    assert words == ["better", "worse", "level", "level"]


def test_blocks_of_times_have_an_interval_and_ratios_their_points():
    assert ratio_row(range(1, 12)) == {"ratio": 6, "ratio_p10": 2, "ratio_p90": 10}
    assert blocks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    mean = lambda parts: sum(map(sum, parts)) / sum(map(len, parts))  # noqa: E731
    assert block_interval([[1.0]] * 6, mean) == (1.0, 1.0)
    generator = np.random.default_rng(0)
    values = generator.normal(size=400).tolist()
    low, high = block_interval(blocks(values, 4), mean)
    assert low < np.mean(values) < high
    assert high - low == pytest.approx(4 * np.std(values) / 20, rel=0.35)


def test_rows_say_which_code_made_them_and_keep_it_when_read_back(tmp_path, monkeypatch):
    provenance.write_csv(tmp_path / "one.csv", [{"x": 1}])
    (row,) = provenance.read_csv(tmp_path / "one.csv")
    assert list(row) == ["x", *provenance.PROVENANCE]
    assert (len(row["commit"]), row["dirty"]) in ((40, "0"), (40, "1"), (0, ""))
    old = {**row, "commit": "abc", "torch": "1.0"}
    provenance.write_csv(tmp_path / "two.csv", [old, {"x": 2}])
    first, second = provenance.read_csv(tmp_path / "two.csv")
    assert (first["commit"], first["torch"]) == ("abc", "1.0")
    assert second["commit"] == row["commit"]
    with pytest.raises(ValueError, match="fields"):
        provenance.write_csv(tmp_path / "two.csv", [{"x": 3}, {"y": 4}])
    assert len(provenance.read_csv(tmp_path / "two.csv")) == 2  # whole or not at all
