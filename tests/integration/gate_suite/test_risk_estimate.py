"""The study of the risk estimate: its estimators against brute force, its statistics by hand."""

import csv
import itertools
import math

import numpy as np
import pytest
import torch

from poprisk_integrations.diagnostics.gradient_window import GradientWindow

STUDY = "risk_estimate"


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def after_some_steps(study, name, steps=6, batch=8, size=12, lr=0.01, decay=0.1, seed=0):
    """A real optimizer on drawn per-example gradients: all of its last step."""
    generator = torch.Generator().manual_seed(seed)
    arm = study.step_estimators.OPTIMIZERS[name]
    mean = torch.linspace(-1, 1, size)
    weights = torch.nn.Parameter(torch.randn(size, generator=generator))
    optimizer = study.risk_record.make_optimizer(name, weights, lr)
    optimizer.param_groups[0]["weight_decay"] = decay
    zero = torch.zeros(size)
    state = study.step_estimators.Moments(exp_avg=zero, exp_avg_sq=zero, exp_dev_sq=zero, step=0)
    for _ in range(steps):
        grads = mean + 2 * torch.randn(batch, size, generator=generator)
        before, w = state, weights.detach().clone()
        weights.grad = grads.mean(0)
        optimizer.step()
        move = w - weights.detach()
        state = study.risk_record.moments_of(optimizer, weights, weights.grad, before, arm.rho)
    return arm, w, grads, move, before, state, optimizer.state[weights]


@pytest.mark.parametrize("name", ["AdamW", "PopRiskAdamW"])
def test_step_is_what_depends_on_the_batch_and_what_does_not(study, name):
    arm, w, grads, move, before, after, state = after_some_steps(study, name)
    if name == "PopRiskAdamW":
        torch.testing.assert_close(after.exp_dev_sq, state["exp_dev_sq"])
        assert int(state["dev_step"]) == after.step - 1
    precondition, direction = study.step_estimators.fixed_direction(after, arm, 0.01)
    rest = precondition * 0.9 * before.exp_avg / (1 - 0.9**after.step) + 0.01 * 0.1 * w
    torch.testing.assert_close(move, rest + direction * grads.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "PopRiskAdamW"])
@pytest.mark.parametrize("pieces", [8, 4, 2])
def test_cross_terms_equal_the_double_loop(study, name, pieces):
    arm, _, grads, move, _, after, _ = after_some_steps(study, name)
    found, _ = study.step_estimators.step_predictions(grads, move, after, arm, 0.01)
    _, direction = study.step_estimators.fixed_direction(after, arm, 0.01)
    parts = grads.double().unflatten(0, (pieces, -1)).mean(1)
    rest = (move - direction * grads.mean(0)).double()
    crossed = [
        float(parts[i] @ (direction.double() * parts[j]))
        for i, j in itertools.permutations(range(pieces), 2)
    ]
    wanted = float(grads.double().mean(0) @ rest) + sum(crossed) / len(crossed)
    if pieces == 8:  # of 8 examples, both
        assert float(found["exact"]) == pytest.approx(wanted, rel=1e-4)
        assert float(found["micro-8"]) == pytest.approx(wanted, rel=1e-4)
    elif pieces == 4:
        assert float(found["micro-4"]) == pytest.approx(wanted, rel=1e-4)


def numpy_step(weights, grad, state, name, lr, decay, alpha):
    """AdamW or the soft gate, from the equations, for step t = `state` + 1."""
    m, v, s = (np.asarray(x, dtype=np.float64) for x in state[:3])
    t = state[3] + 1
    if t > 1:
        s = 0.99 * s + 0.01 * (grad - m / (1 - 0.9 ** (t - 1))) ** 2
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
    mean = m / (1 - 0.9**t)
    move = mean / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    if name != "AdamW" and t > 1:
        noise = s / (1 - 0.99 ** (t - 1))
        move = move * np.maximum(0, 1 - alpha * noise / mean**2)
    return lr * move + lr * decay * weights


@pytest.mark.parametrize("name", ["AdamW", "PopRiskAdamW"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_leave_one_out_makes_the_whole_step_anew(study, name, steps):
    arm, w, grads, move, before, _, _ = after_some_steps(study, name, steps=steps)
    state = (before.exp_avg, before.exp_avg_sq, before.exp_dev_sq, before.step)
    g, weights = grads.double().numpy(), w.double().numpy()
    whole = numpy_step(weights, g.mean(0), state, name, 0.01, 0.1, arm.alpha)
    np.testing.assert_allclose(move.numpy(), whole, rtol=2e-4, atol=1e-6)
    wanted = np.mean(
        [
            g[i]
            @ numpy_step(weights, np.delete(g, i, 0).mean(0), state, name, 0.01, 0.1, arm.alpha)
            for i in range(len(g))
        ]
    )
    found = study.step_estimators.leave_one_out_step(w, grads, before, arm, 0.01, 0.1)
    assert float(found) == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def simulated(study, name, replicas, size=8, batch=8, step=200):
    """Differences predicted - mu'u for gradients mu + noise, late in a run (v is old)."""
    generator = torch.Generator().manual_seed(1)
    arm = study.step_estimators.OPTIMIZERS[name]
    mean, lr = torch.linspace(-0.2, 0.5, size), 0.01
    w = torch.ones(size)
    before = study.step_estimators.Moments(
        exp_avg=0.3 * mean, exp_avg_sq=0.03 * torch.ones(size), exp_dev_sq=0.1 * torch.ones(size),
        step=step,
    )  # fmt: skip
    state = (before.exp_avg, before.exp_avg_sq, before.exp_dev_sq, before.step)
    off = {}
    for _ in range(replicas):
        grads = mean + torch.randn(batch, size, generator=generator)
        g = grads.mean(0)
        move = numpy_step(w.numpy(), g.double().numpy(), state, name, lr, 0.1, arm.alpha)
        move = torch.from_numpy(move).float()
        noise = before.exp_dev_sq * 0.99 + 0.01 * (g - before.exp_avg / (1 - 0.9**step)) ** 2
        after = study.step_estimators.Moments(
            exp_avg=0.9 * before.exp_avg + 0.1 * g,
            exp_avg_sq=0.999 * before.exp_avg_sq + 0.001 * g**2,
            exp_dev_sq=noise,
            step=step + 1,
        )
        found, errors = study.step_estimators.step_predictions(grads, move, after, arm, lr)
        found["leave-one-out"] = study.step_estimators.leave_one_out_step(
            w, grads, before, arm, lr, 0.1
        )
        fresh = (mean + torch.randn(batch, size, generator=generator)).mean(0)
        found["lagged"] = fresh @ move
        true = mean @ move
        for key, value in found.items():
            off.setdefault(key, []).append(float(value - true))
        off.setdefault("error", []).append(float(errors["exact"]))
    return {key: np.array(values) for key, values in off.items()}


@pytest.mark.parametrize("name", ["AdamW", "PopRiskAdamW"])
def test_unbiased_where_it_should_be(study, name):
    off = simulated(study, name, replicas=500)
    z = {k: x.mean() / (x.std(ddof=1) / math.sqrt(len(x))) for k, x in off.items()}
    assert abs(z["lagged"]) < 4
    # mu'u of this batch's own step is what is predicted, so the means over batches agree.
    assert abs(z["leave-one-out"]) < 4
    assert z["naive"] > 8
    if name == "AdamW":  # the preconditioner hardly depends on the batch
        assert abs(z["exact"]) < 4
        assert abs(z["micro-4"]) < 4
        spread = off["exact"].var()
        assert 0.8 * spread < off["error"].mean() < 2.2 * spread


def test_lagged_is_what_the_window_logs(study, monkeypatch):
    problem = study.risk_tasks.build("B", 3, stream=True, quick=True)
    problem.steps = 30
    window = GradientWindow(30)
    made = study.risk_record.make_optimizer

    def with_window(name, weights, lr):
        optimizer = made(name, weights, lr)
        optimizer.register_step_pre_hook(lambda *_: window.add([weights]))
        return optimizer

    monkeypatch.setattr(study.risk_record, "make_optimizer", with_window)
    run = study.risk_record.record(problem, "PopRiskAdamW", 1e-3, 3)
    result = window.close()
    lagged = run["lagged"][:-1]  # the last one needs a batch that the window has not seen
    assert result.risk_decrease == pytest.approx(lagged.mean(), rel=1e-3)
    series = study.risk_statistics.series_error(lagged[None])[0] / len(lagged)
    assert result.risk_decrease_se == pytest.approx(series, rel=1e-3)
    change = (run["measured_a"] + run["measured_b"]) / 2
    assert change.sum() == pytest.approx(run["held_loss"][0] - run["held_loss"][-1], rel=1e-6)
    both = run["first order, both ends"]
    assert np.abs(both - change).max() < 0.05 * np.abs(run["first order"] - change).max() + 1e-7


def test_held_out_targets_are_means_over_the_noise(study):
    rng = np.random.default_rng(0)
    clean = np.repeat(np.arange(6), 20_000)
    drawn = study.risk_tasks.flipped(clean, 6, rng).numpy()
    share = [[np.mean(drawn[clean == c] == k) for k in range(6)] for c in range(6)]
    wanted = study.risk_tasks.expected(np.arange(6), 6).numpy()
    np.testing.assert_allclose(share, wanted, atol=0.01)
    out = torch.randn(4, 3, 5)
    y = torch.randint(5, (4, 3))
    one_hot = torch.nn.functional.one_hot(y, 5).float()
    losses = study.risk_tasks.cross_entropies
    wanted = torch.nn.functional.cross_entropy(out.transpose(1, 2), y, reduction="none").mean(1)
    torch.testing.assert_close(losses(out, y), wanted)
    torch.testing.assert_close(losses(out, one_hot), wanted)


def test_a_stream_sees_each_example_once(study):
    problem = study.risk_tasks.build("A", 0, stream=True, quick=True)
    seen = torch.cat([x for x, _ in study.risk_record.batches(problem, 0)])
    assert len(seen) == len(problem.x) == (problem.steps + 1) * 32
    assert len(seen.unique(dim=0)) == len(seen)
    again = study.risk_tasks.build("A", 0, stream=False, quick=True)
    rows = [x for x, _ in study.risk_record.batches(again, 0)][: again.epoch_steps]
    assert len(torch.cat(rows).unique(dim=0)) == again.epoch_steps * 32


def test_statistics_by_hand(study):
    s = study.risk_statistics
    assert s.windows(np.arange(10), 1, 9, 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    predicted, actual = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 8.0])
    found = s.compare(predicted, actual, predicted)
    assert found["correlation"] == pytest.approx(np.corrcoef(predicted, actual)[0, 1])
    assert found["bias"] == pytest.approx((7 - 12) / 12)
    assert found["slope"] == pytest.approx(np.polyfit(predicted, actual, 1)[0])
    assert found["correlation_first_order"] == pytest.approx(1.0)
    assert found["bias_first_order"] == 0.0
    straight = np.arange(8.0)
    np.testing.assert_allclose(s.detrended(3 * straight + 1), 0, atol=1e-12)
    rng = np.random.default_rng(0)
    truth = rng.normal(size=100_000)
    halves = truth + rng.normal(size=(2, 100_000))
    wanted = np.corrcoef(truth, halves.mean(0))[0, 1]
    assert s.ceiling(*halves) == pytest.approx(wanted, abs=0.01)
    steps = np.repeat([3.0, 2.0, -1.0, -3.0, -1.0], 2)
    assert s.sign_change({"epoch_steps": np.array(2), "x": steps}, "x") == 3.0  # 2 - 1 - 3 < 0
    assert s.sign_change({"epoch_steps": np.array(2), "x": -steps}, "x") == 2.0
    assert math.isinf(s.sign_change({"epoch_steps": np.array(2), "x": np.ones(10)}, "x"))


def test_half_time_in_the_quadratic_model(study):
    rows = study.half_time.half_time_rows(replicas=150, rate=0.05)
    strong = [row for row in rows if row["signal"] == 10.0]
    for row in strong:
        assert float(row["best_time"]) == pytest.approx(float(row["best_time_theory"]), rel=0.25)
        assert 0.4 < float(row["ratio"]) < 0.6


def made_up(r_first, r_second, bias_after=0.5):
    """Rows of two seeds of one stream and one reused set."""
    rows = []
    for seed in (0, 1):
        for phase, r in (("first epoch", r_first), ("second half", r_second)):
            for name in ("lagged", "leave-one-out", "first order", "persistence"):
                row = dict.fromkeys(("detrended", "slope", "error", "covered_series"), "0")
                row |= dict.fromkeys(("correlation_first_order", "bias_first_order"), "0")
                row |= {"task": "A", "data": "stream", "optimizer": "AdamW", "lr": "0.001"}
                row |= {"phase": phase, "horizon": 25, "estimator": name, "seed": seed}
                row |= {"windows": 20, "covered": "0.95", "covered_first_order": "0.95"}
                r_row = 0.1 if name == "persistence" else r + 0.01 * seed
                rows.append({**row, "correlation": str(r_row), "z": "2", "bias": "0.02",
                             "ceiling": "0.99"})  # fmt: skip
        for phase, bias in (("until the best", 0.1), ("after the best", bias_after)):
            reused = {"data": "reused", "phase": phase, "horizon": 1, "estimator": "lagged"}
            rows.append({**rows[0], **reused, "seed": seed, "bias": str(bias)})
    return rows


@pytest.mark.parametrize(
    ("second", "word"), [(0.9, "holds"), (0.6, "partly"), (0.3, "partly"), (0.05, "fails")]
)
def test_verdict(study, second, word):
    halves = [{"ratio": "0.5"}]
    lines = study.risk_verdict.verdict(
        study.risk_verdict.summary_rows(made_up(0.85, second)), [], halves
    )
    assert lines[0].endswith("right")
    assert lines[2].endswith(word)
    assert "z = +2.83: BIASED" in lines[4]  # 2 * 2 runs / sqrt(2)
    assert "grows in 1 of 1" in lines[-2]
    assert lines[-1].endswith("holds")
    rows = study.risk_verdict.summary_rows(made_up(0.75, second, bias_after=0.05))
    lines = study.risk_verdict.verdict(rows, [], [{"ratio": "0.4"}])
    assert lines[0].endswith("missed")
    assert "grows in 0 of 1" in lines[-2]
    assert lines[-1].endswith("missed")


def test_committed_tables_agree(study):
    results = study.bench.HERE / "results"
    (table,) = results.glob("2*.csv")
    rows = read_csv(table)
    (path,) = results.glob("summary_*.csv")
    committed = {tuple(row[k] for k in study.risk_verdict.KEYS): row for row in read_csv(path)}
    some = [row for row in rows if row["estimator"] in ("lagged", "naive", "persistence")]
    for row in some:
        row["windows"] = int(row["windows"])
    found = study.risk_verdict.summary_rows(some)
    assert len(found) > 50
    for row in found:
        other = committed[tuple(str(row[k]) for k in study.risk_verdict.KEYS)]
        for name in ("correlation", "low", "high", "bias", "z"):
            assert row[name] == other[name]
