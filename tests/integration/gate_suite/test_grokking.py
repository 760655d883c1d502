"""The grokking study: its table, transformer and censored statistics, its committed numbers."""

import csv
import math
from fractions import Fraction
from statistics import median_high

import numpy as np
import pytest
import torch

STUDY = "grokking"
INF = math.inf


def test_division_table_inverts_multiplication(study):
    x, y = study.division_task.division_table(7)
    assert x.shape == (42, 4)
    for (a, op, b, equals), c in zip(x.tolist(), y.tolist(), strict=True):
        assert (op, equals) == (7, 8)
        assert b != 0
        assert c * b % 7 == a
    assert len({tuple(row) for row in x.tolist()}) == 42


def test_training_and_held_out_pairs_are_disjoint_and_differ_by_seed(study):
    setting = study.division_task.Setting(p=13, share=0.4)
    data = [study.division_task.division_data(setting, seed) for seed in (0, 1)]
    for x, _, held, _ in data:
        assert len(x) == int(0.4 * 13 * 12) == setting.count
        assert len(x) + len(held) == 13 * 12
        assert not {tuple(r) for r in x.tolist()} & {tuple(r) for r in held.tolist()}
    assert not torch.equal(data[0][0], data[1][0])
    assert setting.batch_size == setting.count // 2
    assert study.division_task.Setting(p=97).batch_size == 512
    assert study.division_task.Setting(p=97).count == 2328


def plain_transformer(parameters, x, heads, layers):
    """All positions of all examples in float64, with numpy alone."""

    def norm(h, name):
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return h * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]

    h = parameters["embed"][x] + parameters["place"]
    for layer in range(layers):
        at = f"blocks.{layer}"
        q, k, v = (h @ parameters[f"{at}.{n}.weight"].T for n in ("query", "key", "value"))
        mixed = np.zeros_like(h)
        size = h.shape[-1] // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for i in range(4):
                score = (k[:, : i + 1, part] * q[:, i : i + 1, part]).sum(-1) / math.sqrt(size)
                share = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
                mixed[:, i, part] = (share[..., None] * v[:, : i + 1, part]).sum(1)
        h = norm(h + mixed @ parameters[f"{at}.out.weight"].T, f"{at}.norm1")
        up = np.maximum(h @ parameters[f"{at}.up.weight"].T, 0)
        h = norm(h + up @ parameters[f"{at}.down.weight"].T, f"{at}.norm2")
    return h[:, -1] @ parameters["head.weight"].T


@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_is_the_plain_one_at_the_last_position(study, layers):
    torch.manual_seed(0)
    model = study.division_model.DivisionModel(7, width=8, layers=layers, heads=2).double()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x, _ = study.division_task.division_table(7)
    parameters = {name: p.detach().numpy() for name, p in model.named_parameters()}
    want = plain_transformer(parameters, x.numpy(), 2, layers)
    assert torch.allclose(model(x), torch.from_numpy(want), atol=1e-10)


def test_stacked_members_are_the_single_ones_and_leave_when_done(study, harness):
    setting = study.division_task.Setting(p=7, width=8, steps=10, every=5)
    members = harness.tasks.members_of([0, 1], [""], [1e-3])
    task = study.division_task.DivisionTask(members, setting)
    stacked = task.initial()
    x, y = task.batch(0)
    assert x.shape == (2, setting.batch_size, 4)
    for place, seed in enumerate((0, 1)):
        alone = study.division_task.DivisionTask([members[place]], setting)
        alone.initial()
        assert torch.equal(alone.batch(0)[0][0], x[place])
        torch.manual_seed(seed)
        model = study.division_model.DivisionModel(7, width=8)
        want = torch.nn.functional.cross_entropy(model(x[place]), y[place])
        task.order, task.generators = alone.order | task.order, task.generators
        out = task.predict(stacked, x)[place]
        assert torch.allclose(torch.nn.functional.cross_entropy(out, y[place]), want, atol=1e-6)
    metrics = {"accuracy": torch.tensor([0.949, 0.95])}
    assert task.finished(metrics).tolist() == [False, True]
    task.keep(torch.tensor([1]))
    assert [m.seed for m in task.members] == [1]
    assert task.metrics({n: p[1:] for n, p in stacked.items()})["weight_norm"].shape == (1,)


def test_ratio_of_medians_with_and_without_censoring(study):
    scores = study.grokking_scores
    base = {0: 1000.0, 1: 2000.0, 2: 3000.0}
    arm = {0: 500.0, 1: 500.0, 2: 600.0}
    value, low, high = scores.ratio(base, arm, 4000)
    assert value == pytest.approx(2000 / 500)
    # Exact: all 27 ordered draws of three seeds.
    ratios = []
    for draw in np.ndindex(3, 3, 3):
        ratios.append(median_high([base[s] for s in draw]) / median_high([arm[s] for s in draw]))
    assert (low, high) == (min(ratios), max(ratios))  # each has probability above 2.5 %
    assert scores.ratio(base, arm, 4000).word == "faster"
    assert scores.ratio(arm, base, 4000).word == "slower"
    assert scores.ratio(base, base, 4000).word == "level"
    never = dict.fromkeys(range(3), INF)
    assert scores.ratio(never, arm, 4000)[0] == 8.0  # at least: the budget over 500
    assert scores.ratio(never, never, 4000).word == "not decided"
    assert str(scores.ratio(never, never, 4000)) == "none [none, none]"


def test_a_cell_is_chosen_on_the_other_seeds(study):
    scores = study.grokking_scores
    cells = {
        ("a", "0"): {0: 10.0, 1: 900.0, 2: 910.0},
        ("b", "0"): {0: 500.0, 1: 505.0, 2: 510.0},
        ("c", "0"): {0: INF, 1: INF, 2: INF},
    }
    steps, chosen = scores.tuned(cells, 1000)
    assert steps == {0: 500.0, 1: 505.0, 2: 510.0}
    assert set(chosen.values()) == {("b", "0")}
    # With all three seeds a is better; seed 0 is given what 1 and 2 prefer.
    cells["b", "0"] = {0: INF, 1: 905.0, 2: 905.0}
    assert scores.tuned(cells, 1000)[0][0] == INF
    assert scores.median(cells["c", "0"]) == (INF, INF, INF)


def rows_of(arm, cell, steps):
    lr, decay = cell
    return [
        {"arm": arm, "lr": lr, "weight_decay": decay, "seed": seed, "finished_at": done}
        for seed, done in enumerate(steps)
    ]


def test_verdict_on_made_up_rows(study):
    power, other = ("0.001", "1"), ("0.01", "1")
    rows = rows_of("AdamW", power, [2500, 2600, 2700]) + rows_of("AdamW", other, [500] * 3)
    rows += rows_of("paper", power, [500, 510, 520]) + rows_of("paper", other, [-1] * 3)
    rows += rows_of("soft-5", power, [250] * 3) + rows_of("norm(soft-5)", power, [251] * 3)
    rows += rows_of("soft-5-decay", power, [500] * 3)
    lines = study.verdict.lines_of(study.grokking_scores.steps_of(rows), 3000)
    text = "\n".join(lines)
    assert "paper at lr 0.001, decay 1: AdamW / paper 5.10 [5.00, 5.19]: faster" in text
    assert "cells where paper is at least 4.9 times faster: lr 0.001 decay 1" in text
    assert "tuned AdamW: 500 steps" in text
    assert "target 'faster than AdamW with tuned decay', paper: missed" in text
    assert "target 'faster than AdamW with tuned decay', soft-5: met" in text
    assert "soft-5, gated decay: ungated / gated 0.50 [0.50, 0.50]: slower" in text
    assert "soft-5 against norm(soft-5): control / arm 1.00 [1.00, 1.00]: faster" in text


def test_cells_follow_the_look(study):
    look = []
    for arm in ("AdamW", "soft-5", "soft-32"):
        for lr, done, accuracy in (("0.1", -1, 0.5), ("0.2", 700, 1.0), ("0.3", -1, 0.7)):
            row = rows_of(arm, (lr, "1"), [done])[0]
            look.append(row | {"accuracy_max": accuracy})
    assert study.cells.ranked(look, "AdamW") == [("0.2", "1"), ("0.3", "1"), ("0.1", "1")]
    assert study.cells.cells_of("AdamW", look) == [("0.2", "1"), ("0.3", "1"), ("0.001", "1")]
    assert study.cells.cells_of("norm(soft-5)", look) == [("0.2", "1"), ("0.3", "1")]
    assert study.cells.cells_of("soft-32", look)[2:] == [("0.001", "1")]  # AdamW's are its own too
    assert study.cells.looked_at(["ratio(soft-5)", "soft-5"]) == ["AdamW", "soft-5"]


def committed(study, pattern):
    folder = study.bench.HERE / "results"
    (path,) = folder.glob(pattern)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_committed_summary_follows_from_the_committed_rows(study):
    scores, bench = study.grokking_scores, study.bench
    rows = [row for row in committed(study, "2*.csv") if row["condition"] != bench.LOOK]
    summary = scores.summary_rows(scores.steps_of(rows), bench.DEFAULT.steps)
    kept = committed(study, "summary_*.csv")
    assert len(summary) == len(kept) == 26 + 11  # cells, and each arm tuned
    for made, found in zip(summary, kept, strict=True):
        assert {name: str(value) for name, value in made.items()}.items() <= found.items()


def test_readme_states_the_committed_medians(study):
    text = (study.bench.HERE / "README.md").read_text()
    assert len(committed(study, "2*.csv")) == 7 * 9 + 5 * 26  # looks, and cells by seeds
    for row in committed(study, "summary_*.csv"):
        if row["arm"] in ("AdamW", "paper", "soft-5", "grokfast") and row["lr"].startswith("tuned"):
            assert f"| {row['arm']} | {row['median']} " in text


def test_share_of_the_paper_is_the_ratio_it_reports(study):
    assert round(Fraction(29450, 5950), 1) == Fraction(str(study.grokking_scores.PAPER_RATIO))


def test_the_table_of_equal_settings_is_what_was_measured(study):
    """Runs done and the median of AdamW, as the README says them."""
    text = (study.bench.HERE / "README.md").read_text(encoding="utf-8")
    (table,) = (study.bench.HERE / "results").glob("equal_*.csv")
    with table.open(newline="") as file:
        found = study.grokking_scores.steps_of(csv.DictReader(file))
    assert sorted(found) == sorted(study.equal.ARMS)
    for arm, cells in found.items():
        steps = cells[study.cells.POWER]
        done = sum(step <= study.equal.STEPS for step in steps.values())
        assert f"| {arm} | {done} of {len(steps)} |" in text
    assert study.grokking_scores.median(found["AdamW"][study.cells.POWER])[0] == 14_250
