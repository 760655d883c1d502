"""A small decoder, M of them in stacked tensors: every parameter has the members as first axis.

Two pre-norm blocks without biases, width 48, two heads, 61,000 parameters. Shapes: M members,
B sequences of each, T tokens, D width, V vocabulary.
"""

import math

import torch
from benchmarks.cleaned_pairs.language import EOS, LONGEST, PAD, PROMPT, VOCABULARY, lengths
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "completion_log_probs", "completion_logits", "initial", "mask_of", "sample", "scores", "size"
]  # fmt: skip

WIDTH, HEADS, LAYERS, HIDDEN = 48, 2, 2, 192
WORDS = 4  # that make a score of the size of one state's
LENGTH = PROMPT + LONGEST - 1  # the last token is never an input

Params = dict[str, Tensor]


def initial(seeds: list[int]) -> Params:
    """Random parameters, one member for each seed."""
    members = [_one(seed) for seed in seeds]
    return {name: torch.stack([m[name] for m in members]) for name in members[0]}


def _one(seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    small, out = 1 / math.sqrt(WIDTH), 1 / math.sqrt(2 * LAYERS)
    params = {
        "embed": normal(VOCABULARY, WIDTH, scale=0.3),
        "place": normal(LENGTH, WIDTH, scale=0.3),
        "head": normal(WIDTH, VOCABULARY, scale=0.1 * small),
    }
    for i in range(LAYERS):
        params[f"{i}.qkv"] = normal(WIDTH, 3 * WIDTH, scale=small)
        params[f"{i}.out"] = normal(WIDTH, WIDTH, scale=small * out)
        params[f"{i}.up"] = normal(WIDTH, HIDDEN, scale=small)
        params[f"{i}.down"] = normal(HIDDEN, WIDTH, scale=out / math.sqrt(HIDDEN))
    return params


def size(params: Params) -> int:
    """Parameters of one member."""
    return sum(p[0].numel() for p in params.values())


def completion_logits(params: Params, prompts: Tensor, completions: Tensor) -> Tensor:
    """Logits of each completion token given those before it, shape (M, B, 11, V).

    Args:
        params: Stacked parameters.
        prompts: Shape (M, B, 6).
        completions: Shape (M, B, 11).
    """
    members, rows, _ = completions.shape
    states = _completion_states(params, prompts, completions)
    return torch.bmm(states, params["head"]).view(members, rows, LONGEST, VOCABULARY)


def scores(params: Params, prompts: Tensor, completions: Tensor) -> Tensor:
    """Of a reward model, shape (M, B): its vector `score` on the states after all words, summed.

    Of the last word alone it learns next to nothing here.
    """
    members, rows, _ = completions.shape
    states = _completion_states(params, prompts, completions).view(members, rows, LONGEST, WIDTH)
    place = torch.arange(LONGEST, device=completions.device)
    is_after_word = (place >= 1) & (place <= lengths(completions)[..., None])
    summed = (states * is_after_word[..., None]).sum(2) / WORDS
    return torch.bmm(summed, params["score"][..., None]).squeeze(2)


def _completion_states(params: Params, prompts: Tensor, completions: Tensor) -> Tensor:
    """Before each completion token, normalised, shape (M, B * 11, D)."""
    tokens = torch.cat([prompts, completions[..., :-1]], -1)
    members, rows, length = tokens.shape
    h = _embed(params, tokens, 0)
    for i in range(LAYERS):
        q, k, v = _heads(torch.bmm(_norm(h), params[f"{i}.qkv"]), members * rows)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(members, rows, length, WIDTH)
        h = h.view(members, rows, length, WIDTH)
        if i == LAYERS - 1:  # nothing is predicted inside the prompt
            mixed, h = mixed[:, :, PROMPT - 1 :], h[:, :, PROMPT - 1 :]
        h = _block_end(params, i, h.flatten(1, 2), mixed.flatten(1, 2))
    return _norm(h)


def mask_of(completions: Tensor) -> Tensor:
    """Which positions count: tokens up to and with the end."""
    return completions != PAD


def completion_log_probs(params: Params, prompts: Tensor, completions: Tensor) -> Tensor:
    """Sum of log-probabilities of the completion tokens, shape (M, B)."""
    logits = completion_logits(params, prompts, completions)
    nats = F.cross_entropy(
        logits.flatten(0, -2), completions.flatten(), reduction="none", ignore_index=PAD
    )
    return -nats.view(completions.shape).sum(-1)


@torch.no_grad()
def sample(params: Params, prompts: Tensor, uniform: Tensor) -> Tensor:
    """Completions at temperature 1, shape (M, B, 11).

    Args:
        params: Stacked parameters.
        prompts: Shape (M, B, 6).
        uniform: Shape (M, B, 11), in [0, 1): the draws. Equal draws for two models that differ
            little give mostly equal completions, which takes noise out of their comparison.
    """
    members, rows, _ = prompts.shape
    out = torch.full((members, rows, LONGEST), PAD, device=prompts.device)
    ended = torch.zeros(members, rows, dtype=torch.bool, device=prompts.device)
    cache: list[tuple[Tensor, Tensor]] = []
    tokens, at = prompts, 0
    for place in range(LONGEST):
        logits = _extend(params, tokens, at, cache)
        at += tokens.shape[-1]
        chances = logits.softmax(-1)
        chances[..., PAD] = 0.0  # padding is no word
        edges = chances.cumsum(-1)
        drawn = torch.searchsorted(edges, (uniform[..., place] * edges[..., -1])[..., None])
        token = drawn.squeeze(-1).clamp(max=VOCABULARY - 1)
        token = torch.where(ended, PAD, token)
        out[..., place] = token
        ended |= token == EOS
        tokens = token[..., None]
        if bool(ended.all()):
            break
    return out


def _extend(params: Params, tokens: Tensor, at: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits after the last of some further tokens; their keys and values join the cache."""
    members, rows, length = tokens.shape
    h = _embed(params, tokens, at)
    for i in range(LAYERS):
        q, k, v = _heads(torch.bmm(_norm(h), params[f"{i}.qkv"]), members * rows)
        if at == 0:
            cache.append((k, v))
        else:
            k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
            cache[i] = (k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=at == 0)
        mixed = mixed.transpose(1, 2).reshape(members, rows * length, WIDTH)
        h = _block_end(params, i, h, mixed)
    last = h.view(members, rows, length, WIDTH)[:, :, -1]
    return torch.bmm(_norm(last), params["head"])


def _embed(params: Params, tokens: Tensor, at: int) -> Tensor:
    """Shape (M, B * T, D)."""
    members, _, length = tokens.shape
    offset = torch.arange(members, device=tokens.device).view(-1, 1, 1) * VOCABULARY
    h = F.embedding(tokens + offset, params["embed"].flatten(0, 1))
    return (h + params["place"][:, None, at : at + length]).flatten(1, 2)


def _heads(qkv: Tensor, sequences: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each of shape (M * B, heads, T, D / heads)."""
    q, k, v = qkv.view(sequences, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
    return q, k, v


def _norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, (WIDTH,))


def _block_end(params: Params, i: int, h: Tensor, mixed: Tensor) -> Tensor:
    h = torch.baddbmm(h, mixed, params[f"{i}.out"])
    return torch.baddbmm(h, F.relu(torch.bmm(_norm(h), params[f"{i}.up"])), params[f"{i}.down"])
