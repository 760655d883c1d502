"""Data and metrics of the studies against independent checks, and steps against plain torch."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from benchmarks.harness.arms import ARMS
from benchmarks.harness.train import Member, members_of, train
from benchmarks.noise_rate_coverage import study as margins
from benchmarks.noisy_labels import study as noisy
from benchmarks.small_lm import study as small_lm
from benchmarks.sparse_signal import study as sparse
from benchmarks.stop_digits import study as stop_digits
from benchmarks.where_it_hurts import study as hurts
from benchmarks.where_it_hurts import toys
from torch import nn

TOYS = {toy.name: toy for toy in toys.TOYS}


# noisy_labels


def test_labels_are_flipped_exactly_symmetrically_and_nested():
    y = torch.zeros(90_000, dtype=torch.long)
    counts = torch.bincount(noisy.flip(y, 100, 10, torch.Generator().manual_seed(0)), minlength=10)
    assert counts[0] == 0
    # 10,000 expected in each of nine classes, standard deviation about 94
    assert (counts[1:] - 10_000).abs().max() < 400
    clean, few, many = (noisy.draw(f"digits {share}%", 5) for share in (0, 10, 40))
    assert torch.equal(few.x, many.x)
    assert torch.equal(clean.test_y, many.test_y)
    assert [int(drawn.wrong.sum()) for drawn in (clean, few, many)] == [0, 80, 320]
    assert torch.equal(clean.y != many.y, many.wrong)
    assert bool((many.wrong | ~few.wrong).all())
    assert torch.equal(few.y[few.wrong], many.y[few.wrong])


@pytest.mark.parametrize("name", noisy.SETS)
def test_the_split_is_disjoint_and_scaled_by_the_training_set(name):
    drawn = noisy.draw(f"{name} 40%", 1)
    size = noisy.SETS[name]
    assert (len(drawn.x), len(drawn.test_x)) == (size.train, size.test)
    together = torch.cat([drawn.x, drawn.test_x])
    assert len(together.unique(dim=0)) == len(together)
    if name == "breast_cancer":
        torch.testing.assert_close(drawn.x.mean(0), torch.zeros(30), atol=1e-4, rtol=0)
        torch.testing.assert_close(drawn.x.std(0), torch.ones(30))
        assert drawn.test_x.mean(0).abs().max() > 1e-3


def test_noisy_metrics_agree_with_a_loop_over_examples():
    members = members_of([0, 1], ["breast_cancer 0%", "breast_cancer 20%"], [1e-3])
    task = noisy.NoisyLabelsTask(members, steps=1)
    params = task.initial()
    found = task.metrics(params)
    for m, member in enumerate(members):
        drawn = noisy.draw(member.condition, member.seed)
        w = {name: p[m].double() for name, p in params.items()}

        def logits(x, w=w):
            hidden = (x.double() @ w["0.weight"].T + w["0.bias"]).clamp_min(0)
            return hidden @ w["2.weight"].T + w["2.bias"]

        hits = (logits(drawn.x).argmax(1) == drawn.y).double()
        out = logits(drawn.test_x)
        log_p = out - out.exp().sum(1, keepdim=True).log()
        expected = {
            "fitted_wrong": hits[drawn.wrong].mean() if drawn.wrong.any() else 0.0,
            "fitted_clean": hits[~drawn.wrong].mean(),
            "accuracy": (out.argmax(1) == drawn.test_y).double().mean(),
            "loss": -log_p[torch.arange(len(out)), drawn.test_y].mean(),
        }
        for name, value in expected.items():
            assert found[name][m].item() == pytest.approx(float(value), abs=1e-5), name


def test_training_fits_the_clean_labels():
    task = noisy.NoisyLabelsTask(members_of([0], ["breast_cancer 20%"], [3e-3]), steps=120)
    trace = train(task, ARMS["AdamW"])
    assert trace["eval_step"].tolist() == [0, 25, 50, 100, 120]
    assert trace["fitted_clean"][-1, 0] > 0.95
    assert trace["accuracy"].max() > 0.93


# sparse_signal


def test_rotations_are_orthogonal_and_have_no_preferred_sign():
    found = [sparse.rotation(6, torch.Generator().manual_seed(s)).double() for s in range(400)]
    torch.testing.assert_close(found[0] @ found[0].T, torch.eye(6).double(), atol=1e-5, rtol=0)
    traces = [one.trace().item() for one in found]
    # Haar: the trace has mean 0 and variance 1; the QR of LAPACK alone has a mean well below 0
    assert abs(np.mean(traces)) < 0.2
    assert np.var(traces) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("name", sparse.MODELS)
def test_rotated_data_are_the_sparse_data_turned(name):
    straight, rotated = (sparse.draw(f"{name} {kind}", 4) for kind in ("sparse", "rotated"))
    torch.testing.assert_close(rotated.x @ rotated.basis, straight.x, atol=2e-5, rtol=0)
    torch.testing.assert_close(rotated.test_x @ rotated.basis, straight.test_x, atol=2e-5, rtol=0)
    assert torch.equal(rotated.y, straight.y)
    assert torch.equal(rotated.test_y, straight.test_y)
    assert int(straight.relevant.sum()) == sparse.MODELS[name].relevant
    assert torch.equal(straight.basis, torch.eye(straight.x.shape[1]))


@pytest.mark.parametrize("kind", ["sparse", "rotated", "dense"])
def test_linear_targets_follow_from_the_weights_and_metrics_from_both(kind):
    drawn = sparse.draw(f"linear {kind}", 3)
    expected = drawn.test_x.double() @ drawn.weight.double()
    torch.testing.assert_close(drawn.test_y[:, 0].double(), expected, atol=1e-4, rtol=0)
    assert drawn.weight.norm().item() == pytest.approx(1, abs=1e-5)
    noise = drawn.y - (drawn.x @ drawn.weight)[:, None]
    assert noise.std().item() == pytest.approx(0.7, abs=0.15)
    task = sparse.SparseSignalTask(members_of([3], [f"linear {kind}"], [1e-3]), steps=1)
    assert task.metrics(task.initial())["excess"].item() == pytest.approx(1, abs=1e-5)
    generator = torch.Generator().manual_seed(9)
    weight = 0.1 * torch.randn(1, 1, 200, generator=generator)
    found = task.metrics({"weight": weight})
    x = torch.randn(40_000, 200, generator=generator, dtype=torch.float64)
    error = (x @ (weight[0, 0] - drawn.weight).double()).square().mean().item()
    assert found["excess"].item() == pytest.approx(error, rel=0.05)
    in_z = drawn.basis.double().T @ weight[0, 0].double()
    for name, part in (("on", drawn.relevant), ("off", ~drawn.relevant)):
        assert found[name].item() == pytest.approx(in_z[part].norm().item(), rel=1e-4)


def test_net_targets_depend_on_the_relevant_inputs_alone():
    drawn = sparse.draw("net sparse", 1)
    assert drawn.test_y.var().item() == pytest.approx(1, abs=0.25)

    def explained(x):  # by least squares on all products of two inputs
        pairs = torch.stack([x[:, i] * x[:, j] for i in range(3) for j in range(i, 3)], 1)
        design = torch.cat([torch.ones(len(x), 1), x, pairs, x.relu()], 1).double()
        fit = design @ torch.linalg.lstsq(design, drawn.test_y.double()).solution
        return 1 - (drawn.test_y - fit).var() / drawn.test_y.double().var()

    assert explained(drawn.test_x[:, drawn.relevant]) > 0.6
    assert explained(drawn.test_x[:, ~drawn.relevant][:, :3]) < 0.05


# small_lm


def language_task(seeds=(0, 1), lrs=(1e-3, 1e-2), size="tiny", **options):
    members = members_of(seeds, [""], lrs, [0.1])
    return small_lm.LanguageTask(members, small_lm.SIZES[size], **options)


def test_the_encoding_is_learned_from_the_training_part_alone(monkeypatch):
    text, held_out = small_lm.split_text()
    assert len(held_out) / len(text + held_out) == pytest.approx(0.1, abs=1e-5)
    train_ids, _ = small_lm.token_ids(300)
    monkeypatch.setattr(small_lm, "split_text", lambda: (text, "zq" * 50_000))
    again, other = small_lm.token_ids.__wrapped__(300)  # not from the cache
    assert torch.equal(again, train_ids)
    assert len(other) == 100_000  # a pair that the training part does not have is not merged


def test_windows_predict_each_token_once_and_held_out_ones_are_not_trained_on():
    found = small_lm.windows(torch.arange(12), 3)
    assert found.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    task = language_task()
    parts = [small_lm.windows(ids, 16).tolist() for ids in small_lm.token_ids(300)]
    of_train, of_held_out = ({tuple(row) for row in part} for part in parts)
    assert {tuple(row) for row in task.train.tolist()} <= of_train
    assert {tuple(row) for row in task.measured["held_out_loss"].tolist()} <= of_held_out


def test_language_losses_are_those_of_the_model_itself():
    task = language_task()
    params = task.initial()
    losses = task.losses(params, 0)
    rows = {seed: order[:4] for seed, order in task.order.items()}
    for place, member in enumerate(task.members):
        model = task.module(99)  # other weights, all of which must be replaced
        model.load_state_dict({name: p[place] for name, p in params.items()}, strict=False)
        model.tie_weights()
        x = task.train[rows[member.seed]]
        expected = model(input_ids=x, labels=x).loss  # shifts by one by itself
        torch.testing.assert_close(losses[place], expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "parameters"), [("400k", 381_600), ("1m", 1_012_320), ("10m", None)]
)
def test_sizes_are_whole_epochs_and_batches_with_the_parameters_of_the_readme(size, parameters):
    task = language_task([0], [1e-3], size)
    wanted = task.size
    assert wanted.steps * wanted.batch_size / wanted.rows in (3, 4)
    assert all(len(rows) % wanted.batch_size == 0 for rows in task.measured.values())
    count = sum(p.numel() for p in task.model.parameters())
    assert count == parameters or (parameters is None and 9.5e6 <= count <= 1.1e7)


def test_an_epoch_shows_each_window_once_and_the_seed_alone_orders_them():
    task, other = language_task(), language_task([1], [3e-3])
    per_epoch = len(task.train) // 4
    seen = [Counter(), Counter()]
    for step in range(2 * per_epoch):
        rows, same = task.batch(step), other.batch(step)
        assert torch.equal(rows[1], same[1])
        assert not torch.equal(rows[0], rows[1])
        seen[step // per_epoch].update(map(tuple, rows[0].tolist()))
    assert seen == [Counter(map(tuple, task.train.tolist()))] * 2


def test_a_language_run_is_that_of_torch_adamw():
    task = language_task()
    schedule = small_lm.warm_up(task.steps)
    trace = train(task, ARMS["AdamW"], schedule=schedule)
    alone = language_task([1], [1e-2])  # the last member
    model = alone.module(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(alone.steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule(step / alone.steps)
        x = alone.batch(step)[1]
        optimizer.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    x = alone.measured["held_out_loss"]
    with torch.no_grad():
        found = float(model(input_ids=x, labels=x).loss)
    assert trace["held_out_loss"][-1, 3] == pytest.approx(found, rel=2e-4)
    assert found < 5  # of 5.7 before
    factor = small_lm.warm_up(100)
    assert [factor(step / 100) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


# where_it_hurts


def test_halting_labels_follow_one_cycle():
    x, y, test_x, test_y = toys.halting_data(3)
    node, hard = test_x[:, 64:].argmax(1), test_y[:, 1].bool()
    after = {int(n): int(v) for n, v in zip(node[~hard], test_y[~hard, 0], strict=True)}
    path = [0]
    while (following := after[path[-1]]) not in path:
        path.append(following)
    assert sorted(path) == list(range(8))
    assert following == 0
    assert [after[after[int(n)]] for n in node[hard]] == test_y[hard, 0].tolist()
    wrong = [
        int(v) != (after[after[int(n)]] if h else after[int(n)])
        for n, (v, h) in zip(x[:, 64:].argmax(1), y, strict=True)
    ]
    assert np.mean(wrong) == pytest.approx(0.2 * 7 / 8, abs=0.02)


def test_halting_net_against_numpy():
    torch.manual_seed(0)
    net = toys.HaltingNet().double()
    x = toys.halting_data(0)[0][:5].double()
    out = net(x).detach().numpy()
    table = np.exp(net.table.detach().numpy())
    move = table / table.sum(1, keepdims=True)
    weight, bias = (p.detach().numpy() for p in (net.router.weight, net.router.bias))
    for row, given in zip(out, x.numpy(), strict=True):
        cues, node = given[:64], given[64:].argmax()
        h = 1 / (1 + math.exp(-(weight[0] @ cues + bias[0])))
        belief = h * move[node] + (1 - h) * (move @ move)[node]
        np.testing.assert_allclose(row, [*np.log(belief), h], rtol=1e-10)


def test_each_kind_of_input_has_a_linear_rule_and_no_rule_serves_all():
    x, y, test_x, test_y = toys.experts_data(1)
    z, signs = test_x[:, 32:].double(), 2.0 * test_y[:, 0].double() - 1
    for kind in range(4):
        mine = test_y[:, 1] == kind
        rule = torch.linalg.lstsq(z[mine], signs[mine, None]).solution[:, 0]
        assert (((z[mine] @ rule) > 0) == (signs[mine] > 0)).double().mean() > 0.85
    rule = torch.linalg.lstsq(x[:, 32:].double(), 2.0 * y[:, :1].double() - 1).solution[:, 0]
    assert (((z @ rule) > 0) == (signs > 0)).double().mean() < 0.56


def test_routing_information():
    kind = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    y = torch.stack([torch.zeros_like(kind), kind], 1)
    # own experts, all alike, all to one, and kinds 0 and 1 to one expert, 2 and 3 to another
    mixes = (
        torch.eye(4)[kind],
        torch.full((8, 4), 0.25),
        torch.eye(4)[0 * kind],
        torch.eye(4)[kind // 2],
    )
    found = [
        float(toys.routing_information(torch.cat([torch.zeros(8, 2), m], 1), y)) for m in mixes
    ]
    assert found == pytest.approx([1.0, 0.0, 0.0, 0.5], abs=1e-6)


def test_word_labels_by_counting_and_rare_words_are_rare():
    _, _, x, y = toys.words_data(2)
    topic = torch.randint(4, (500,), generator=torch.Generator().manual_seed(1002)).tolist()
    for bag, (label, rare) in zip(x[:200].tolist(), y[:200].tolist(), strict=True):
        votes = [0.0] * 4
        for word in bag:
            votes[topic[word]] += math.log(word + 2)
        assert votes[label] == pytest.approx(max(votes))
        assert rare == any(word >= 100 for word in bag)
    in_bag = 1 - (1 - float(toys.word_frequencies()[100])) ** 5
    assert in_bag < 0.008
    assert 1 - (1 - in_bag) ** 32 == pytest.approx(0.2, abs=0.02)


def one_member(toy, steps, lr=1e-2):
    """Task of one member and its parameters, for an optimizer of torch."""
    task = toy.build([Member(seed=0, lr=lr)], steps)
    return task, {name: nn.Parameter(p.clone()) for name, p in task.initial().items()}


def descend(task, params, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        task.losses(params, step).sum().backward()
        optimizer.step()


def test_fine_tuning_starts_from_a_good_network_on_blurred_images():
    image = np.random.default_rng(0).random((8, 8))
    padded = np.pad(image, 1)
    mean = [[padded[i : i + 3, j : j + 3].mean() for j in range(8)] for i in range(8)]
    found = toys.blurred(torch.tensor(image).reshape(1, 64)).reshape(8, 8)
    np.testing.assert_allclose(found.numpy(), mean, rtol=1e-12)
    task, params = one_member(TOYS["finetune"], 10)
    start = task.metrics({n: p.detach() for n, p in params.items()})
    assert float(start["probe"]) > 0.94  # sharp digits
    assert 0.4 < float(start["accuracy"]) < 0.85  # blurred ones
    old, new, test = toys.split_digits(0)
    assert len({*old.tolist(), *new.tolist(), *test.tolist()}) == 900 + 200 + 600


def test_remedies_by_name():
    toy = TOYS["finetune"]
    assert toy.tensors == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert hurts.arm_named("no_gate(soft-5)", toy).exempt == (0, 1)
    only = hurts.arm_named("only(paper)", toy)
    assert (only.exempt, only.alpha, only.noise_mean) == ((2, 3), 1.0, "raw")
    assert hurts.arm_named("blend(hard-5)", toy).gate_blend == 0.5
    assert hurts.arm_named("warmup(hard-5)", toy).gate_warmup == 100
    assert hurts.arm_named("norm(hard-32)", toy).needs == "hard-32"
    for wrong in ("no_gate(nothing)", "twice(soft-5)"):
        with pytest.raises(ValueError, match="Invalid arm"):
            hurts.arm_named(wrong, toy)


def test_closed_coordinates_are_counted_as_the_optimizer_counts_them():
    toy, lr, steps = TOYS["words"], 1e-2, 40
    task, params = one_member(toy, steps, lr)
    descend(task, params, hurts.watched(toy, params, lr, "AdamW"), steps)
    task, usual = one_member(toy, steps, lr)
    descend(task, usual, torch.optim.AdamW(usual.values(), lr, weight_decay=0.0), steps)
    for name, p in params.items():
        torch.testing.assert_close(p, usual[name], rtol=1e-5, atol=1e-6)
    task, params = one_member(toy, steps, lr)
    optimizer = hurts.watched(toy, params, lr, "soft-5")
    descend(task, params, optimizer, steps)
    stats = optimizer.gate_stats()
    rows = hurts.closed_rows(toy, lr, steps, steps)
    (row,) = [r for r in rows if (r["path"], r["group"]) == ("soft-5", "affected")]
    for mine, theirs in (("open", "open_fraction"), ("closed_zero_grad", "closed_zero_grad")):
        assert float(row[mine]) == pytest.approx(float(stats[f"group0/{theirs}"]), abs=2e-3)


# stop_digits, noise_rate_coverage


def test_both_parts_of_the_noisy_digits_have_their_share_of_wrong_labels():
    x, wrong, clean = stop_digits.load(0.2, 0)
    changed = (wrong != clean).numpy()
    assert (changed[:800].sum(), changed[800:].sum(), len(x)) == (160, 100, 1300)


@pytest.mark.parametrize("family", margins.FAMILIES)
def test_margins_have_the_signal_that_was_asked_for(family):
    random = np.random.default_rng(3)
    clean = random.permutation(margins.draw(family, 0.8, 40_000, 0.0, random))
    assert np.mean(clean[::2] > -clean[1::2]) == pytest.approx(0.8, abs=0.01)
    noisy_share = np.mean(margins.draw(family, 0.95, 40_000, 0.4, np.random.default_rng(4)) < 0)
    assert noisy_share > np.mean(margins.draw(family, 0.95, 40_000, 0.0, random) < 0) + 0.2
