"""The harness: members of a stack train as `PopRiskAdamW` would train them alone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW

STEPS, BATCH = 40, 8


def blobs(condition, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (64,), generator=generator)
    x = torch.randn(64, 5, generator=generator) + y[:, None] * float(condition)
    return x[:40], y[:40], x[40:], y[40:]


def network():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def build(harness):
    def task(members, steps=STEPS):
        return harness.tasks.SupervisedTask(
            members,
            blobs,
            network,
            harness.tasks.cross_entropy,
            {"accuracy": harness.tasks.accuracy, "loss": harness.tasks.cross_entropy},
            batch_size=BATCH,
            steps=steps,
            eval_steps=[steps // 2, steps],
        )

    return task


@pytest.fixture
def members(harness):
    return harness.tasks.members_of([0, 3], ["0.5", "1"], [1e-3, 1e-2], [0.0, 0.1])


def alone(member, options, steps=STEPS):
    """Loss on the test set after training one member with the optimizer itself."""
    x, y, test_x, test_y = blobs(member.condition, member.seed)
    torch.manual_seed(member.seed)
    model = network()
    optimizer = PopRiskAdamW(
        model.parameters(),
        member.lr,
        weight_decay=member.weight_decay,
        fused=False,
        foreach=False,
        **options,
    )
    generator = torch.Generator().manual_seed(40_000 + member.seed)
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            order = torch.randperm(len(x), generator=generator)
        first = step % (len(x) // BATCH) * BATCH
        rows = order[first : first + BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(test_x), test_y))


def test_every_gated_arm_is_the_optimizer(harness, build, members):
    arms = dict(harness.arms.GATES)
    for name in ("soft-5-warmup", "soft-32-warmup"):  # the task has fewer steps than theirs
        arms[name] = dataclasses.replace(arms[name], gate_warmup=10)
    losses = {}
    for name, arm in arms.items():
        trace = harness.training.train(build(members), arm)
        for place in (0, 5, len(members) - 1):
            expected = alone(members[place], arm.options())
            assert trace["loss"][-1, place] == pytest.approx(expected, rel=2e-5), (name, place)
        losses[name] = tuple(trace["loss"][-1])
    assert len(set(losses.values())) == len(losses)  # each option did something


def test_members_neither_see_each_other_nor_depend_on_their_group(harness, build, members):
    whole = harness.training.train(build(members), harness.arms.GATES["soft-5"])
    part = harness.training.train(build(members[3:5]), harness.arms.GATES["soft-5"])
    np.testing.assert_allclose(whole["loss"][:, 3:5], part["loss"], rtol=1e-5)


def test_controls_imitate_what_they_should(harness, build, members):
    ARMS = harness.arms.ARMS
    gated = harness.training.train(build(members), ARMS["soft-5"])
    plain = harness.training.train(build(members), ARMS["AdamW"])
    norm = harness.training.train(build(members), ARMS["norm(soft-5)"], recorded=gated)
    np.testing.assert_allclose(norm["update_norm"], gated["update_norm"], rtol=1e-4)
    assert (gated["update_norm"][5:] < plain["update_norm"][5:]).mean() > 0.9
    mask = harness.training.train(build(members), ARMS["mask(soft-5)"], recorded=gated)
    numel = sum(p.numel() for p in network().parameters())
    spread = np.abs(mask["moved_share"] - gated["moved_share"]).max()
    assert spread < 5 * 0.5 / numel**0.5
    assert mask["loss"][-1].tolist() != norm["loss"][-1].tolist()
    ratio = harness.training.train(build(members), ARMS["ratio(soft-5)"])
    assert 0.05 < ratio["moved_share"][10:].mean() < 0.99


def test_ratio_opens_where_the_mean_beats_the_rest_of_the_second_moment(harness):
    """The control by hand, one coordinate at a time."""
    arm = harness.arms.ARMS["ratio(soft-5)"]
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(12, 2, 7, generator=generator) + 0.8
    theta = torch.zeros(2, 7)
    stacked = harness.stacked_adam.StackedAdam(
        arm, [7], torch.tensor([1.0, 1.0]), torch.zeros(2), [0, 1]
    )
    m = v = np.zeros((2, 7))
    expected = np.zeros((2, 7))
    for t, g in enumerate(grads.double().numpy(), start=1):
        stacked.step(theta, grads[t - 1])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        mean, second = m / (1 - 0.9**t), v / (1 - 0.999**t)
        q = np.maximum(0, 1 - arm.alpha * np.maximum(second - mean**2, 0) / mean**2)
        expected -= q * mean / (np.sqrt(second) + 1e-8)
    np.testing.assert_allclose(theta.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_finished_members_keep_their_figures_and_the_others_go_on_alike(harness, build, members):
    class Early(harness.tasks.SupervisedTask):
        def finished(self, metrics):
            return torch.tensor([m.seed == 3 for m in self.members])

    task = build(members)
    task.__class__ = Early
    trace = harness.training.train(task, harness.arms.GATES["soft-5"])
    whole = harness.training.train(build(members), harness.arms.GATES["soft-5"])
    early = trace["seed"] == 3
    assert (trace["finished_at"][early] == STEPS // 2).all()
    assert (trace["finished_at"][~early] == -1).all()
    np.testing.assert_allclose(trace["loss"][-1, early], whole["loss"][1, early], rtol=1e-6)
    np.testing.assert_allclose(trace["loss"][-1, ~early], whole["loss"][-1, ~early], rtol=1e-5)
    assert trace["update_norm"].shape == (STEPS, len(members))


def test_a_member_that_diverges_does_not_take_the_others_along(harness, build, members):
    class Fragile(harness.tasks.SupervisedTask):
        def losses(self, params, step):
            loss = super().losses(params, step)
            bad = torch.tensor([m.lr == 1e-2 for m in self.members])
            return loss * torch.where(bad & (step == 7), torch.nan, 1.0)

    task = build(members)
    task.__class__ = Fragile
    trace = harness.training.train(task, harness.arms.GATES["AdamW"])
    whole = harness.training.train(build(members), harness.arms.GATES["AdamW"])
    bad = trace["lr"] == 1e-2
    assert (trace["diverged"] == bad).all()
    np.testing.assert_allclose(trace["loss"][-1, ~bad], whole["loss"][-1, ~bad], rtol=1e-6)
    assert (trace["loss"][1, bad] == trace["loss"][2, bad]).all()  # it stopped there


def test_runs_resume_from_their_files(harness, build, members, tmp_path, capsys):
    arms = ["norm(soft-5)", harness.arms.GATES["paper"]]
    first = harness.grid.run_arms(build, arms, members, tmp_path, group=5)
    assert list(first) == ["norm(soft-5)", "paper"]  # what a control needs is not returned
    assert "soft-5_0: 5 members" in capsys.readouterr().out
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(written) == 3 * 4
    (tmp_path / "paper_1.npz").unlink()
    again = harness.grid.run_arms(build, arms, members, tmp_path, group=5)
    assert capsys.readouterr().out.count("members") == 1
    for name, trace in first.items():
        for key, value in trace.items():
            np.testing.assert_array_equal(value, again[name][key])
    with pytest.raises(ValueError, match="holds other members"):
        harness.grid.run_arms(build, arms, members[1:], tmp_path, group=5)


def scored(harness, values, higher=True):
    """Score rows of made-up end values by (lr, seed), each with a better middle of training."""
    cells = [(lr, seed, v) for lr, row in values.items() for seed, v in enumerate(row)]
    ends = np.array([v for _, _, v in cells])
    trace = {
        "condition": np.array(["c"] * len(cells)),
        "lr": np.array([lr for lr, _, _ in cells]),
        "weight_decay": np.zeros(len(cells)),
        "seed": np.array([seed for _, seed, _ in cells]),
        "diverged": np.zeros(len(cells), bool),
        "eval_step": np.array([0, 10, 20]),
        "score": np.stack([np.full(len(cells), 0.1), ends + 0.05, ends]),
    }
    return trace, harness.scores.score_rows("arm", trace, "score", higher=higher)


def test_rates_are_tuned_on_the_other_seeds(harness):
    # The second seed alone would choose 1e-2; the others choose 1e-3 for it.
    _, rows = scored(harness, {1e-3: [0.8, 0.2, 0.8], 1e-2: [0.3, 0.9, 0.3]})
    assert [row["tuned_lr"] for row in rows] == ["0.01", "0.001", "0.01"]
    assert [row["tuned"] for row in rows] == ["0.3", "0.2", "0.3"]
    assert [row["range"] for row in rows] == ["0.55", "0.55", "0.55"]
    assert [row["stopped_step"] for row in rows] == [10, 10, 10]
    assert rows[1]["tuned_stopped"] == "0.25"


def test_untrained_is_the_worst_that_counts(harness):
    trace, _ = scored(harness, {1e-3: [0.8, 0.8], 1e-2: [0.01, np.nan]})
    trace["diverged"][0] = True
    rows = harness.scores.score_rows("arm", trace, "score", higher=True)
    assert [row["range_worst"] for row in rows] == ["0.1", "0.1"]
    assert [row["range"] for row in rows] == ["0.1", "0.45"]


def test_losses_are_better_lower(harness):
    trace, _ = scored(harness, {1e-3: [0.05, 0.05], 1e-2: [0.09, 0.09]})
    rows = harness.scores.score_rows("arm", trace, "score", higher=False)
    assert [row["tuned"] for row in rows] == ["0.05", "0.05"]
    assert harness.scores.relative(0.9, 1.0, higher=False) == pytest.approx(0.1)
    assert harness.scores.relative(0.9, 1.0, higher=True) == pytest.approx(-0.1)


def test_interval_pairs_by_seed_and_weights_tasks_alike(harness):
    few = {("a", seed): 1.0 for seed in range(2)}
    many = {("b", seed): 0.0 for seed in range(8)}
    assert harness.scores.interval({**few, **many}) == (0.5, 0.5, 0.5)
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        sample = {("a", seed): generator.normal() for seed in range(20)}
        _, low, high = harness.scores.interval(sample, draws=1000)
        hits += low < 0 < high
    assert 0.88 < hits / 200 < 0.98
