"""Log-ratios policy / reference of both continuations of a pair."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from poprisk_integrations.cli.demo.preference_pairs import PreferencePair

__all__ = ["PairScorer"]

_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Batch:
    input_ids: Tensor  # (2 B, L): B human continuations, then B samples
    attention_mask: Tensor  # same shape
    completion_mask: Tensor  # same shape; 1 on continuation and end-of-sequence tokens


class PairScorer:
    """Scores fixed pairs under a changing policy; the reference is scored once.

    Tokens are those that TRL trains on: prompt, continuation and end-of-sequence token, of which
    the last two count.

    Args:
        tokenizer: Tokenizer of both models.
        pairs: Pairs to score.
        reference: The reference model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pairs: Sequence[PreferencePair],
        reference: nn.Module,
    ) -> None:
        self._batches = [
            _collate(tokenizer, pairs[first : first + _BATCH])
            for first in range(0, len(pairs), _BATCH)
        ]
        self.reference_log_probs = self.log_probs(reference)

    def log_probs(self, model: nn.Module) -> Tensor:
        """Summed log-probabilities (nats), shape (n, 2): human continuation, sample."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            scores = [torch.stack(_log_probs(model, batch).chunk(2), 1) for batch in self._batches]
        model.train(was_training)
        return torch.cat(scores) if scores else torch.empty(0, 2)

    def log_ratios(self, policy: nn.Module) -> Tensor:
        """Differences log policy - log reference, shape (n, 2): human continuation, sample."""
        return self.log_probs(policy) - self.reference_log_probs


def _collate(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[PreferencePair]) -> _Batch:
    rows: list[tuple[int, list[int]]] = []
    for text in [pair.human for pair in pairs] + [pair.sample for pair in pairs]:
        pair = pairs[len(rows) % len(pairs)]
        prompt = tokenizer(pair.prompt)["input_ids"]
        both = tokenizer(pair.prompt + text)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((len(prompt), both))
    length = max(len(tokens) for _, tokens in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    completion_mask = torch.zeros_like(input_ids)
    for index, (prompt_length, tokens) in enumerate(rows):
        input_ids[index, : len(tokens)] = torch.tensor(tokens)
        attention_mask[index, : len(tokens)] = 1
        completion_mask[index, prompt_length : len(tokens)] = 1
    return _Batch(input_ids, attention_mask, completion_mask)


def _log_probs(model: nn.Module, batch: _Batch) -> Tensor:
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits[:, :-1]
    tokens = batch.input_ids[:, 1:]
    nats = -F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
    return (nats.view_as(tokens) * batch.completion_mask[:, 1:]).sum(1)
