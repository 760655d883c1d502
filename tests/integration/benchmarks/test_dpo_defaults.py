"""The model that the real trainers get is the stacked decoder of the other studies."""

import torch
from benchmarks.cleaned_pairs.language import PAD, PROMPT, all_prompts, grammar
from benchmarks.cleaned_pairs.model import completion_log_probs, initial
from benchmarks.dpo_defaults.real import pairs_of, policy, stacked
from numpy.random import default_rng


def test_the_policy_computes_what_the_decoder_computes() -> None:
    params, prompts = initial([3]), all_prompts()[::97]
    x, y = torch.tensor(prompts), torch.tensor(grammar(prompts, default_rng(0)))
    model = policy(params).eval()
    logits = model(torch.cat([x, y], 1)).logits[:, PROMPT - 1 : -1]
    own = logits.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
    found = (own * (y != PAD)).sum(1)
    torch.testing.assert_close(found, completion_log_probs(params, x[None], y[None])[0])
    found.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any(name.endswith("bias") or ".ln_" in name for name in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p -= 0.1 * p.grad
    again = completion_log_probs(stacked(model), x[None], y[None])[0]
    after = model(torch.cat([x, y], 1)).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    after = (after.gather(-1, y[..., None]).squeeze(-1) * (y != PAD)).sum(1)
    torch.testing.assert_close(after.detach(), again, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(again, found.detach(), atol=0.1)


def test_pairs_are_tokens_without_padding() -> None:
    rows = torch.tensor([[5, 6, 1, PAD]])
    data = pairs_of(rows, rows[:, :3], rows[:, 1:])
    assert data[0] == {"prompt_ids": [5, 6, 1], "chosen_ids": [5, 6, 1], "rejected_ids": [6, 1]}
