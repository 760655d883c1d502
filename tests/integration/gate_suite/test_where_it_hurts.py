"""The toys against independent checks, the exempt groups against `PopRiskAdamW`, the verdict."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from poprisk_integrations import PopRiskAdamW
from tests.integration.gate_suite.conftest import BENCHMARKS

STUDY = "where_it_hurts"
RESULTS = BENCHMARKS / STUDY / "results"


@pytest.fixture
def toys(study):
    return {toy.name: toy for toy in study.bench.TOYS}


def one_member(toy, harness, steps, lr=1e-2, seed=0, decay=0.0):
    """Task of one member and its parameters, for an optimizer of torch."""
    task = toy.build([harness.tasks.Member(seed=seed, lr=lr, weight_decay=decay)], steps)
    return task, {name: nn.Parameter(p.clone()) for name, p in task.initial().items()}


def test_halting_labels_follow_one_cycle(study):
    x, y, test_x, test_y = study.halting_task.halting_data("", 3)
    node, hard = test_x[:, 64:].argmax(1), test_y[:, 1].bool()
    after = {int(n): int(v) for n, v in zip(node[~hard], test_y[~hard, 0], strict=True)}
    path = [0]
    while (following := after[path[-1]]) not in path:
        path.append(following)
    assert sorted(path) == list(range(8))
    assert following == 0
    twice = [after[after[int(n)]] for n in node[hard]]
    assert twice == test_y[hard, 0].tolist()
    wrong = [
        int(v) != (after[after[int(n)]] if h else after[int(n)])
        for n, (v, h) in zip(x[:, 64:].argmax(1), y, strict=True)
    ]
    assert np.mean(wrong) == pytest.approx(0.2 * 7 / 8, abs=0.02)


def test_halting_optimum_against_integration_and_a_linear_rule(study):
    assert study.halting_task.CUES == 64
    grid = np.linspace(-9, 9, 200_001)
    bell = lambda mean: np.exp(-((grid - mean) ** 2) / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    best = np.maximum(0.4 * bell(1), 0.6 * bell(-1)).sum() * (grid[1] - grid[0])
    assert study.halting_task.best_accuracy() == pytest.approx(best, abs=1e-4)
    _, _, x, y = study.halting_task.halting_data("", 3)
    hard = y[:, 1].bool()
    centre = x[hard, :64].mean(0) - x[~hard, :64].mean(0)  # 2 c, |c| = 1, and noise
    assert float(centre.norm()) == pytest.approx(math.sqrt(4 + 64 * (1 / 400 + 1 / 600)), abs=0.1)


def test_halting_net_against_numpy(study):
    torch.manual_seed(0)
    net = study.halting_task.HaltingNet().double()
    x = study.halting_task.halting_data("", 0)[0][:5].double()
    out = net(x).detach().numpy()
    table = net.table.detach().numpy()
    move = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    weight, bias = (p.detach().numpy() for p in (net.router.weight, net.router.bias))
    for row, given in zip(out, x.numpy(), strict=True):
        cues, node = given[:64], given[64:].argmax()
        h = 1 / (1 + math.exp(-(weight[0] @ cues + bias[0])))
        belief = h * move[node] + (1 - h) * (move @ move)[node]
        np.testing.assert_allclose(row, [*np.log(belief), h], rtol=1e-10)


def test_expert_labels_and_that_no_single_rule_serves_all(study):
    x, y, test_x, test_y = study.experts_task.experts_data("", 1)
    z = test_x[:, 32:].double()
    signs = 2.0 * test_y[:, 0].double() - 1
    right = []
    for kind in range(4):
        mine = test_y[:, 1] == kind
        rule = torch.linalg.lstsq(z[mine], signs[mine, None]).solution[:, 0]
        right.append((((z[mine] @ rule) > 0) == (signs[mine] > 0)).double().mean().item())
    assert min(right) > 0.85  # linear within a kind
    rule = torch.linalg.lstsq(x[:, 32:].double(), 2.0 * y[:, :1].double() - 1).solution[:, 0]
    assert (((z @ rule) > 0) == (signs > 0)).double().mean() < 0.56


def test_routing_information(study):
    kind = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    y = torch.stack([torch.zeros_like(kind), kind], 1)

    def of(mix):
        out = torch.cat([torch.zeros(8, 2), torch.as_tensor(mix, dtype=torch.float32)], 1)
        return float(study.experts_task.routing_information(out, y))

    assert of(torch.eye(4)[kind]) == pytest.approx(1.0)
    assert of(torch.full((8, 4), 0.25)) == pytest.approx(0.0, abs=1e-6)
    assert of(torch.eye(4)[torch.zeros_like(kind)]) == pytest.approx(0.0, abs=1e-6)
    # kinds 0 and 1 to one expert, 2 and 3 to another: one bit of two
    assert of(torch.eye(4)[kind // 2]) == pytest.approx(0.5)


def test_word_labels_by_counting(study):
    _, _, x, y = study.words_task.words_data("", 2)
    topic = torch.randint(4, (500,), generator=torch.Generator().manual_seed(1002)).tolist()
    for bag, (label, rare) in zip(x[:200].tolist(), y[:200].tolist(), strict=True):
        votes = [0.0] * 4
        for word in bag:
            votes[topic[word]] += math.log(word + 2)
        assert votes[label] == pytest.approx(max(votes))
        assert rare == any(word >= 100 for word in bag)


def test_rare_words_are_rare(study):
    p = study.words_task.word_frequencies().double()
    harmonic = sum(1 / k for k in range(1, 501))
    assert float(p[9]) == pytest.approx(1 / (10 * harmonic), rel=1e-5)
    in_bag = 1 - (1 - float(p[100])) ** 5
    assert in_bag < 0.008
    assert 1 - (1 - in_bag) ** 32 == pytest.approx(0.2, abs=0.02)


def test_blur_by_hand(study):
    image = np.random.default_rng(0).random((8, 8))
    padded = np.pad(image, 1)
    mean = [[padded[i : i + 3, j : j + 3].mean() for j in range(8)] for i in range(8)]
    found = study.finetune_task.blurred(torch.tensor(image).reshape(1, 64))
    np.testing.assert_allclose(found.reshape(8, 8).numpy(), mean, rtol=1e-12)


def test_fine_tuning_starts_from_a_good_network(study, harness, toys):
    task, params = one_member(toys["finetune"], harness, 10)
    start = task.metrics({n: p.detach() for n, p in params.items()})
    assert float(start["probe"]) > 0.94  # sharp digits
    assert 0.4 < float(start["accuracy"]) < 0.85  # blurred ones
    old, new, test = study.finetune_task._split(0)
    assert len({*old.tolist(), *new.tolist(), *test.tolist()}) == 900 + 200 + 600


@pytest.mark.parametrize("gate", ["soft-5", "paper", "snr-fresh", "soft-5-decay"])
def test_exempt_group_equals_two_groups_of_the_optimizer(gate, study, harness, toys):
    toy, lr, decay, steps = toys["halting"], 3e-2, 0.1, 30
    arm = study.remedies.arm_named(f"no_gate({gate})", toy.tensors, toy.affected)
    assert arm.exempt == tuple(i for i, n in enumerate(toy.tensors) if "router" in n)
    members = [harness.tasks.Member(seed=s, lr=lr, weight_decay=decay) for s in (0, 1)]
    last = final_parameters(toy.build(members, steps), arm, harness, study.remedies.ExemptAdam)

    task, params = one_member(toy, harness, steps, lr, seed=1, decay=decay)
    router = [p for n, p in params.items() if "router" in n]
    rest = [p for n, p in params.items() if "router" not in n]
    options = harness.arms.GATES[gate].options()
    groups = [{"params": rest}, {"params": router, "gate": "none"}]
    optimizer = PopRiskAdamW(groups, lr, weight_decay=decay, **options)
    descend(task, params, optimizer, steps)
    for name, p in params.items():
        torch.testing.assert_close(last[name][1], p.detach()[0], rtol=1e-5, atol=2e-6)

    plain = toy.build(members, steps)
    ungated = final_parameters(plain, harness.arms.GATES[gate], harness, study.remedies.ExemptAdam)
    assert not torch.allclose(ungated["router.weight"], last["router.weight"], atol=1e-3)


def final_parameters(task, arm, harness, optimizer_class):
    seen = {}
    measure = task.metrics

    def keep(params):
        seen.update({name: p.clone() for name, p in params.items()})
        return measure(params)

    task.metrics = keep
    harness.training.train(task, arm, optimizer_class=optimizer_class)
    return seen


def descend(task, params, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        task.losses(params, step).sum().backward()
        optimizer.step()


def test_without_exempt_tensors_nothing_changes(study, harness, toys):
    members = [harness.tasks.Member(seed=0, lr=1e-2)]
    arm = harness.arms.GATES["soft-5"]
    found = [
        final_parameters(toys["experts"].build(members, 20), arm, harness, kind)
        for kind in (study.remedies.ExemptAdam, harness.stacked_adam.StackedAdam)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_arms_by_name(study, toys):
    tensors, affected = toys["finetune"].tensors, toys["finetune"].affected
    assert tensors == ["0.weight", "0.bias", "2.weight", "2.bias"]
    name = study.remedies.arm_named
    assert name("no_gate(soft-5)", tensors, affected).exempt == (0, 1)
    only = name("only(paper)", tensors, affected)
    assert (only.exempt, only.alpha, only.noise_mean) == ((2, 3), 1.0, "raw")
    assert name("blend(hard-5)", tensors, affected).gate_blend == 0.5
    assert name("warmup(hard-5)", tensors, affected).gate_warmup == 100
    assert name("norm(hard-32)", tensors, affected).needs == "hard-32"
    for wrong in ("no_gate(nothing)", "twice(soft-5)"):
        with pytest.raises(ValueError, match="Invalid arm"):
            name(wrong, tensors, affected)


def test_watched_path_is_adamw(study, harness, toys):
    lr, steps = 1e-2, 25
    task, params = one_member(toys["words"], harness, steps, lr)
    descend(task, params, study.closed_reasons.watched(toys["words"], params, lr, "AdamW"), steps)
    task, usual = one_member(toys["words"], harness, steps, lr)
    descend(task, usual, torch.optim.AdamW(usual.values(), lr, weight_decay=0.0), steps)
    for name, p in params.items():
        torch.testing.assert_close(p, usual[name], rtol=1e-5, atol=1e-6)


def test_closed_shares_agree_with_gate_stats(study, harness, toys):
    toy, lr, steps = toys["words"], 1e-2, 40
    task, params = one_member(toy, harness, steps, lr)
    optimizer = study.closed_reasons.watched(toy, params, lr, "soft-5")
    descend(task, params, optimizer, steps)
    stats = optimizer.gate_stats()
    rows = study.closed_reasons.closed_rows(toy, lr, steps, steps)
    (row,) = [r for r in rows if (r["path"], r["group"]) == ("soft-5", "affected")]
    for mine, theirs in (("open", "open_fraction"), ("closed_zero_grad", "closed_zero_grad")):
        assert float(row[mine]) == pytest.approx(float(stats[f"group0/{theirs}"]), abs=2e-3)
    seen = params["embed.weight"].grad[0].abs().sum(1) > 0
    assert float(row["closed_no_gradient_now"]) > 0.5 * (1 - seen.float().mean())


def made_up(toy, arm, tuned):
    usual = {"loss": "1", "probe": "0.6", "step_ratio": "1", "jump": 1, "jump_in_place": 0}
    return [
        {"task": toy, "arm": arm, "seed": s, "tuned": v, "in_place": 0.5 * v, "range": v, **usual}
        for s, v in enumerate(tuned)
    ]


def test_verdict_on_made_up_rows(study):
    rows = [
        *made_up("a", "AdamW", [0.8, 0.8, 0.8]),
        *made_up("a", "paper", [0.4, 0.5, 0.6]),
        *made_up("a", "soft-5", [0.796, 0.797, 0.798]),
        *made_up("a", "snr-fresh", [0.7, 0.8, 0.81]),
        *made_up("a", "no_gate(paper)", [0.8, 0.81, 0.8]),
        *made_up("a", "blend(paper)", [0.7, 0.7, 0.7]),
        *made_up("a", "warmup(paper)", [0.4, 0.5, 0.59]),
        *made_up("a", "no_gate(soft-5)", [0.8, 0.8, 0.8]),
    ]
    summary = {row["arm"]: row for row in study.hurt_verdict.summarise(rows)}
    assert float(summary["paper"]["tuned vs AdamW"]) == pytest.approx(-0.375)
    assert summary["paper"]["tuned verdict"] == "broken"
    assert summary["soft-5"]["tuned verdict"] == "unharmed"
    assert summary["soft-5"]["in_place verdict"] == "unharmed"
    assert summary["snr-fresh"]["tuned verdict"] == "undecided"
    assert summary["no_gate(paper)"]["remedy"] == "repairs"
    assert summary["blend(paper)"]["remedy"] == "helps"
    assert summary["warmup(paper)"]["remedy"] == "does not help"
    assert summary["no_gate(soft-5)"]["remedy"] == ""  # nothing was broken
    assert (summary["paper"]["jumps"], summary["paper"]["jumps_in_place"]) == ("3/3", "0/3")
    lines = study.hurt_verdict.verdict(list(summary.values()))
    assert len(lines) == 3
    assert "remedies: no_gate repairs, blend helps, warmup does not help" in lines[0]


def test_score_at_adamws_rate(study, toys):
    def trace(ends):
        lr = np.array([1e-3, 1e-2] * 2)
        curves = np.array([[0.2] * 4, ends])
        return {
            "seed": np.array([0, 0, 1, 1]),
            "condition": np.array([""] * 4),
            "lr": lr,
            "weight_decay": np.zeros(4),
            "diverged": np.zeros(4, dtype=bool),
            "eval_step": np.array([0, 10]),
            "accuracy": curves,
            "loss": 1 - curves,
            "probe": curves,
            "update_norm": np.full((10, 4), sum(ends)),
        }

    traces = {"AdamW": trace([0.7, 0.5, 0.8, 0.5]), "soft-5": trace([0.3, 0.6, 0.1, 0.7])}
    rows = study.hurt_scores.toy_scores(toys["halting"], traces)
    own = [r for r in rows if r["arm"] == "soft-5"]
    assert [(r["tuned"], r["in_place"], r["in_place_lr"]) for r in own] == [
        ("0.6", "0.3", "0.001"),
        ("0.7", "0.2", "0.001"),  # worse than before training: counts as untrained
    ]
    assert [(r["jump"], r["jump_in_place"]) for r in own] == [(1, 0), (1, 0)]
    assert float(own[0]["step_ratio"]) == pytest.approx(1.7 / 2.5)


@pytest.fixture
def committed():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from reporting import read_csv
    finally:
        sys.path.remove(str(BENCHMARKS))
    (members,) = RESULTS.glob("2*.csv")

    def table(name: str) -> list[dict[str, str]]:
        (path,) = RESULTS.glob(f"{name}_*.csv")
        return read_csv(Path(path))

    return {"members": read_csv(members), **{n: table(n) for n in ("scores", "summary", "closed")}}


def test_committed_scores_agree_with_the_members(committed):
    ends: dict = {}
    for row in committed["members"]:
        end = max(float(row["accuracy_end"]), float(row["accuracy_start"]))
        ends.setdefault((row["task"], row["arm"]), {})[int(row["seed"]), row["lr"]] = end
    assert {task for task, _ in ends} >= {"halting", "words", "finetune"}
    for row in committed["scores"]:
        mine = ends[row["task"], row["arm"]]
        seed, lrs = int(row["seed"]), {lr for _, lr in mine}
        others = {s for s, _ in mine} - {seed}
        mean = {lr: np.mean([mine[s, lr] for s in others]) for lr in lrs}
        assert mean[row["tuned_lr"]] == pytest.approx(max(mean.values()), abs=1e-6)
        assert float(row["tuned"]) == pytest.approx(mine[seed, row["tuned_lr"]], abs=1e-6)
        assert float(row["in_place"]) == pytest.approx(mine[seed, row["in_place_lr"]], abs=1e-6)


def test_committed_summary_follows_from_the_scores(study, committed):
    for found, row in zip(
        study.hurt_verdict.summarise(committed["scores"]), committed["summary"], strict=True
    ):
        assert {name: row[name] for name in found} == found


def test_committed_shares_of_closed_coordinates(committed):
    assert {row["task"] for row in committed["closed"]} == {
        row["task"] for row in committed["scores"]
    }
    for row in committed["closed"]:
        shares = [float(row[n]) for n in ("open", "closed_zero_grad", "closed_noise")]
        assert sum(shares) == pytest.approx(1, abs=2e-4)
        assert float(row["closed_no_gradient_now"]) <= 1 - shares[0] + 1e-4
