"""The harness of the noisy-preference benchmark measures what it says."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from poprisk_integrations.core import StoppingConfig, StoppingRule
from poprisk_integrations.diagnostics import GradientWindow
from tests.integration.noisy_dpo.conftest import SEEDS


def logits_alone(params, tokens):
    """Of every next token; `params` of one member, tokens a list."""
    width = params["embed"].shape[1]
    h = params["embed"][tokens] + params["place"][: len(tokens)]
    layers = sum(name.endswith(".qkv") for name in params)
    for i in range(layers):
        q, k, v = (nn.functional.layer_norm(h, (width,)) @ params[f"{i}.qkv"]).chunk(3, 1)
        mixed = []
        for head in range(2):
            part = slice(head * width // 2, (head + 1) * width // 2)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width // 2)
            later = torch.ones(len(tokens), len(tokens)).triu(1).bool()
            mixed.append(scores.masked_fill(later, -math.inf).softmax(1) @ v[:, part])
        h = h + torch.cat(mixed, 1) @ params[f"{i}.out"]
        up = nn.functional.layer_norm(h, (width,)) @ params[f"{i}.up"]
        h = h + torch.relu(up) @ params[f"{i}.down"]
    return nn.functional.layer_norm(h, (width,)) @ params["head"]


def words(recipe, completion):
    """Tokens up to and with the end."""
    return [token for token in completion.tolist() if token != recipe.language.PAD]


def log_prob_alone(recipe, params, prompt, completion):
    tokens, said = prompt.tolist(), words(recipe, completion)
    logits = logits_alone(params, tokens + said[:-1])[len(tokens) - 1 :]
    return sum(row.log_softmax(0)[token] for row, token in zip(logits, said, strict=True))


def member(params, place, dtype=torch.float64):
    return {name: p[place].detach().to(dtype).clone() for name, p in params.items()}


def other_params(task):
    """Policies near their references."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: p + 0.1 * p.std() * torch.randn(p.shape, generator=generator)
        for name, p in task.reference.items()
    }


def reward_alone(recipe, prompt, completion):
    language = recipe.language
    topic, first, second, style, kind, _ = prompt
    said = [t for t in completion if t not in (language.PAD, language.EOS)]
    sign = 1 if style == language.STYLE else -1
    word = language.WORD + language.WORDS * (topic - language.TOPIC)
    total = float(first in said) + sign * float(second in said)
    total -= sum(pair == (word, word + 1) for pair in pairwise(said))
    depth, good = 0, True
    for token in said:
        depth += (token == language.OPEN) - (token == language.CLOSE)
        good = good and depth >= 0
    total += 0.5 * sign * (good and depth == 0 and language.OPEN in said)
    return total - 0.1 * abs(len(said) - language.TARGETS[kind - language.CLASS])


def test_reward_is_that_of_plain_python(recipe):
    language, random = recipe.language, np.random.default_rng(0)
    prompts = language.all_prompts()[random.integers(0, 2304, 600)]
    texts = language.grammar(prompts, random)
    # Half of them are noise made of what the reward looks at.
    for row, prompt in zip(texts[::2], prompts[::2], strict=True):
        word = language.WORD + language.WORDS * (prompt[0] - language.TOPIC)
        alphabet = [language.OPEN, language.CLOSE, prompt[1], prompt[2], word, word + 1]
        end = random.integers(0, language.LONGEST)
        row[:] = language.PAD
        row[:end] = random.choice(alphabet, end)
        row[end] = language.EOS
    found = language.reward(torch.tensor(prompts), torch.tensor(texts))
    both = zip(prompts.tolist(), texts.tolist(), strict=True)
    expected = [reward_alone(recipe, prompt, text) for prompt, text in both]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(set(np.round(expected, 1))) > 20


def test_labels_are_flipped_exactly_and_nested(recipe, task):
    flipped = task.flipped
    n = flipped.shape[1]
    assert flipped.sum(1).tolist() == [0, 0, round(0.3 * n), round(0.3 * n)]
    rewards = [recipe.language.reward(task.prompts, y) for y in (task.chosen, task.rejected)]
    assert torch.equal(rewards[0] < rewards[1], flipped)
    assert bool(((rewards[0] - rewards[1]).abs() >= recipe.pairs.GAP).all())
    held = [
        recipe.language.reward(task.held_prompts, y) for y in (task.held_better, task.held_worse)
    ]
    assert bool((held[0] > held[1]).all())
    reference = {name: p[:2] for name, p in task.reference.items()}
    sizes = recipe.pairs.Sizes(train=384, held=60, sampled=20, candidates=1.3)
    fewer = recipe.pairs.build(["flips 10"], SEEDS, reference, sizes)
    assert fewer.flipped.sum(1).tolist() == [round(0.1 * n)] * 2
    assert not bool((fewer.flipped & ~flipped[2:]).any())


def test_stacked_model_is_a_plain_decoder(recipe, task):
    params = other_params(task)
    found = recipe.model.completion_log_probs(params, task.prompts[:, :5], task.chosen[:, :5])
    for place in range(4):
        alone = member(params, place)
        for row in range(5):
            expected = log_prob_alone(
                recipe, alone, task.prompts[place, row], task.chosen[place, row]
            )
            assert float(found[place, row]) == pytest.approx(float(expected), rel=1e-5)


def test_samples_and_their_metrics_are_those_of_one_at_a_time(recipe, task):
    params = other_params(task)
    evaluate = recipe.metrics.Evaluator(task, 0.1, 384)
    evaluate(dict(task.reference), 0)
    evaluate(params, 1)
    found = evaluate.arrays()
    assert np.abs(found["reward"][0]).max() == 0
    np.testing.assert_allclose(found["kl"][0], 0, atol=1e-5)
    place, language = 2, recipe.language
    rewards, kls, entropies, count = [[], []], [], 0.0, 0
    for which, source in enumerate((task.reference, params)):
        alone, base = member(source, place), member(task.reference, place)
        for prompt, draws in zip(task.query[place], task.draws[place], strict=True):
            tokens, said, kl = prompt.tolist(), [], 0.0
            while len(said) < language.LONGEST and language.EOS not in said:
                logits = logits_alone(alone, tokens + said)[-1]
                chances, log = logits.softmax(0), logits.log_softmax(0)
                other = logits_alone(base, tokens + said)[-1].log_softmax(0)
                kl += float((chances * (log - other)).sum())
                if which:
                    entropies -= float((chances * log).sum())
                    count += 1
                chances[language.PAD] = 0
                edge = float(draws[len(said)]) * float(chances.sum())
                so_far = np.cumsum(chances.tolist())
                said.append(int(np.flatnonzero(so_far >= edge)[0]))
            rewards[which].append(reward_alone(recipe, prompt.tolist(), said))
            if which:
                kls.append(kl)
    gain = (np.mean(rewards[1]) - np.mean(rewards[0])) / float(task.reward_sd[place])
    assert found["reward"][1, place] == pytest.approx(gain, abs=1e-4)
    assert found["kl"][1, place] == pytest.approx(np.mean(kls), rel=1e-3)
    assert found["entropy"][1, place] == pytest.approx(entropies / count, rel=1e-3)
    assert np.mean(kls) > 0.01


def test_held_out_pairs_and_fitted_labels_are_counted(recipe, task):
    params = other_params(task)
    evaluate = recipe.metrics.Evaluator(task, 0.1, 384)
    evaluate(params, 1)
    found, place = evaluate.arrays(), 3
    policy, base = member(params, place), member(task.reference, place)

    def ratio(prompt, completion):
        ours, theirs = (log_prob_alone(recipe, p, prompt, completion) for p in (policy, base))
        return float(ours - theirs)

    held = [
        (ratio(x, y), ratio(x, z))
        for x, y, z in zip(
            task.held_prompts[place], task.held_better[place], task.held_worse[place], strict=True
        )
    ]
    assert found["accuracy"][0, place] == pytest.approx(np.mean([y > z for y, z in held]))
    assert found["chosen_drift"][0, place] == pytest.approx(np.mean([y for y, _ in held]), abs=1e-4)
    drift = 0.1 * np.abs(held).mean()
    assert found["drift"][0, place] == pytest.approx(drift, rel=1e-3)
    wrong = torch.nonzero(task.flipped[place]).flatten()
    assert len(wrong) < recipe.metrics.FIT_ROWS  # so that all of them are looked at
    fitted = [
        ratio(task.prompts[place, i], task.chosen[place, i])
        > ratio(task.prompts[place, i], task.rejected[place, i])
        for i in wrong
    ]
    assert found["flipped_fitted"][0, place] == pytest.approx(np.mean(fitted))
    assert math.isnan(found["flipped_fitted"][0, 0])


def test_a_member_trains_and_measures_as_alone(recipe, task, trace):
    """The last member by itself, with the package's windows beside it."""
    steps, place = 384 // 32, 3
    params = member(task.reference, place, torch.float32)
    params = {name: p.requires_grad_() for name, p in params.items()}
    values = list(params.values())
    optimizer = torch.optim.AdamW(values, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    generator = torch.Generator().manual_seed(40_000 + task.seeds[place])
    windows = [GradientWindow(w, accumulator="exact", epoch_steps=steps) for w in (4, 12)]
    found, ledger, norms = ([], []), torch.full((384,), torch.nan), []
    stacked = {name: p[None] for name, p in params.items()}
    log_probs = recipe.model.completion_log_probs
    for _ in range(2):
        order = torch.randperm(384, generator=generator)
        for i in range(steps):
            rows = order[i * 32 : (i + 1) * 32]
            x, y, z = task.prompts[place], task.chosen[place], task.rejected[place]
            ratio = log_probs(stacked, x[None, rows], y[None, rows])
            ratio = ratio - log_probs(stacked, x[None, rows], z[None, rows])
            h = 0.1 * (ratio[0] - task.reference_margin[place, rows])
            ledger[rows] = torch.where(ledger[rows].isnan(), h.detach(), ledger[rows])
            optimizer.zero_grad()
            torch.log(1 + torch.exp(-h)).mean().backward()
            for window, closed in zip(windows, found, strict=True):
                window.add(values)
                if (i + 1) % window.steps == 0:
                    closed.append(window.close())
            before = [v.detach().clone() for v in values]
            optimizer.step()
            moves = [v.detach() - b for v, b in zip(values, before, strict=True)]
            norms.append(math.sqrt(sum(float(move.square().sum()) for move in moves)))
    np.testing.assert_allclose(trace["update_norm"][:, place], norms, rtol=1e-3)
    np.testing.assert_allclose(trace["ledger"][place], ledger, atol=1e-4)
    held = [
        log_probs(stacked, task.held_prompts[place][None], y[place][None])[0].detach()
        for y in (task.held_better, task.held_worse)
    ]
    base = task.held_reference[place]
    margin = held[0] - held[1] - (base[:, 0] - base[:, 1])
    assert trace["accuracy"][-1, place] == pytest.approx(float((margin > 0).float().mean()))
    for name, closed in zip(("third", "epoch"), found, strict=True):
        ratios, errors = [w.ratio for w in closed], [w.ratio_se for w in closed]
        noises = [float(w.noise.sum()) for w in closed]
        np.testing.assert_allclose(trace[f"{name}_noise"][:, place], noises, rtol=2e-3)
        # Rounding has been through Adam's division, and these are of four steps.
        np.testing.assert_allclose(trace[f"{name}_ratio"][:, place], ratios, rtol=2e-2)
        np.testing.assert_allclose(trace[f"{name}_error"][:, place], errors, rtol=2e-2)
    assert trace["third_end"].tolist() == [4, 8, 12, 16, 20, 24]


def test_windows_are_the_packages_on_the_same_gradients(recipe):
    generator = torch.Generator().manual_seed(0)
    values = [torch.zeros(3, *shape) for shape in ((6, 5), (40,), (7,))]
    recorder = recipe.windows.WindowRecorder(values, epoch_steps=13)  # thirds of 4, 5 and 4
    alone = [[torch.zeros(v.shape[1:], requires_grad=True) for v in values] for _ in range(3)]
    found = {"third": [[], [], []], "epoch": [[], [], []]}
    for epoch in range(2):
        epochs = [GradientWindow(13, accumulator="exact", epoch_steps=13) for _ in alone]
        for count in (4, 5, 4):
            thirds = [GradientWindow(count, accumulator="exact", epoch_steps=13) for _ in alone]
            for _ in range(count):
                for value in values:
                    value.grad = torch.randn(value.shape, generator=generator) + 0.3 * epoch
                values[1].grad[:, :9] = 0  # coordinates that no example touches
                values[2].grad[1] = 0.5  # one whose gradient never changes
                recorder.add()
                for member, params in enumerate(alone):
                    for param, value in zip(params, values, strict=True):
                        param.grad = value.grad[member].clone()
                    thirds[member].add(params)
                    epochs[member].add(params)
            for member, window in enumerate(thirds):
                found["third"][member].append(window.close())
        for member, window in enumerate(epochs):
            found["epoch"][member].append(window.close())
    arrays = recorder.arrays()
    for name, closed in found.items():
        for member in range(3):
            windows = closed[member]
            ratio = [w.ratio for w in windows]
            np.testing.assert_allclose(arrays[f"{name}_ratio"][:, member], ratio, rtol=1e-4)
            noise = [float(w.noise.sum()) for w in windows]
            np.testing.assert_allclose(arrays[f"{name}_noise"][:, member], noise, rtol=1e-4)
            if member != 1:
                error = [w.ratio_se for w in windows]
                np.testing.assert_allclose(arrays[f"{name}_error"][:, member], error, rtol=1e-4)


def test_controls_do_what_they_are_named_for(recipe, task, trace):
    arms, train = recipe.arms.ARMS, recipe.training.train
    gated = train(task, arms["A9"], 1e-3, epochs=(1,))
    assert (gated["update_norm"][1:] < trace["update_norm"][1:12]).all()  # first all are open
    assert (gated["moved_share"][2:] < 0.9 * trace["moved_share"][2:12]).all()
    rescaled = train(task, arms["C1"], 1e-3, epochs=(1,), recorded=gated)
    np.testing.assert_allclose(rescaled["update_norm"], gated["update_norm"], rtol=1e-3)
    masked = train(task, arms["C2"], 1e-3, epochs=(1,), recorded=gated)
    np.testing.assert_allclose(masked["moved_share"], gated["moved_share"], atol=0.02)
    oracle = recipe.training._orders(task, arms["A15"], 384, 12 * 32)
    assert not bool(task.flipped.gather(1, oracle).any())
    held_out = train(task, arms["A14"], 1e-3, epochs=(1,))
    assert np.isnan(held_out["ledger"][:, round(0.9 * 384) :]).all()
    assert held_out["held_loss"].shape == (2, 4)


def test_gate_without_a_state_of_its_own(recipe):
    """C3: open where m_hat^2 > a / (1 + a) v_hat, from AdamW's state."""
    generator = torch.Generator().manual_seed(0)
    value = torch.zeros(1, 500, requires_grad=True)
    optimizer = torch.optim.AdamW([value], lr=0.1, weight_decay=0.0)
    m = v = torch.zeros(500, dtype=torch.float64)
    for _ in range(5):
        grad = torch.randn(1, 500, generator=generator) + 0.3
        value.grad = grad.clone()
        before = value.detach().clone()
        optimizer.step()
        move = value.detach() - before
        m = 0.9 * m + 0.1 * grad[0].double()
        v = 0.999 * v + 0.001 * grad[0].double().square()
    (found,) = recipe.updates.ratio([move], optimizer=optimizer, params=[value], alpha=0.192)
    m, v = m / (1 - 0.9**5), v / (1 - 0.999**5)
    gate = (1 - 0.192 * (v - m * m) / (m * m)).clamp(min=0)
    assert torch.equal(gate > 0, m * m > 0.192 / 1.192 * v)
    np.testing.assert_allclose(found[0], gate * move[0], atol=1e-5)


def test_the_stop_is_the_packages(recipe):
    """F falls below 1 in the fourth window: the stop is at twice the crossing."""
    ratios = np.array([2.0, 1.8, 1.4, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], dtype=np.float32)[:, None]
    ends = np.arange(10, 110, 10)
    plain = StoppingConfig(stretch=1.0)
    trace = {
        "third_end": ends,
        "third_ratio": np.hstack([ratios, np.full_like(ratios, 2.0)]),
        "third_error": np.full((10, 2), 0.1),
        "third_noise": np.ones((10, 2)),
        "seed": np.array([0, 1]),
        "update_norm": np.ones((100, 2)),
        "epoch_steps": np.array(10),
        "epoch": np.array([0.0, 5.0, 10.0]),
        "accuracy": np.array([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]),
    }
    rule = StoppingRule(plain)
    for place, end in enumerate(ends[:4]):
        rule.update(
            step=int(end),
            lr=10.0,
            ratio=float(ratios[place, 0]),
            ratio_se=0.1,
            noise=1.0,
            reused=place > 0,
        )
    onset = rule.state.onset_lr_sum
    assert 25 < onset < 35  # between the middles of windows 3 and 4
    found = recipe.stops.stop_epochs(trace, "third", plain)
    assert found.tolist() == [math.ceil(2 * onset) / 10, 10.0]
    at = recipe.stops.at_epoch(trace, "accuracy", found)
    np.testing.assert_allclose(at, [1 - (found[0] - 5) / 5, 1.0])
