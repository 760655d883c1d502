"""What a policy of the demo has learned: held-out pairs ranked, labels fitted, drift."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from poprisk_integrations.cli.demo.corpus import PreferencePair
from poprisk_integrations.cli.demo.settings import DemoSettings

__all__ = ["DPOTask", "PairScorer", "Point", "ranking_scores"]

_BATCH = 64  # pairs scored at a time


@dataclass(frozen=True, slots=True)
class Point:
    """The metrics after `step` optimizer steps."""

    step: int
    accuracy: float  # share of held-out pairs with the human continuation ranked first
    swapped_fitted: float  # share of (a sample of) the swapped pairs ranked as their wrong label
    clean_fitted: float  # share of (a sample of) the other training pairs ranked as labelled
    drift: float  # mean over held-out continuations of |beta * log(policy / reference)|


def ranking_scores(log_ratios: Tensor) -> Tensor:
    """1 where the policy's implicit reward ranks the first of two above the second, 0.5 on ties.

    The reward of a continuation is beta * log(policy / reference), so beta does not matter here,
    and at the start of training every pair is a tie.

    Example:
        >>> ranking_scores(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])).tolist()
        [1.0, 0.0, 0.5]
    """
    return 0.5 * ((log_ratios[:, 0] - log_ratios[:, 1]).sign() + 1.0)


class PairScorer:
    """Log-ratios policy / reference of fixed pairs; the reference is scored once.

    Tokens are those that TRL trains on: prompt, continuation and end-of-sequence token, of which
    the last two count.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        pairs: Sequence[PreferencePair],
        reference: nn.Module,
    ) -> None:
        self._tokenizer = tokenizer
        self._batches = [self._collate(pairs[i : i + _BATCH]) for i in range(0, len(pairs), _BATCH)]
        self._reference = self._log_probs(reference)

    def log_ratios(self, policy: nn.Module) -> Tensor:
        """Differences log policy - log reference, shape (n, 2): human continuation, sample."""
        return self._log_probs(policy) - self._reference

    def _collate(self, pairs: Sequence[PreferencePair]) -> Any:
        """Human continuations, then samples; a label is -100 where the token does not count."""
        texts = [(p.prompt, p.human) for p in pairs] + [(p.prompt, p.sample) for p in pairs]
        tokenize = self._tokenizer
        rows = [[*tokenize(a + b)["input_ids"], tokenize.eos_token_id] for a, b in texts]
        batch = tokenize.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        starts = torch.tensor([[len(tokenize(prompt)["input_ids"])] for prompt, _ in texts])
        mask = batch["attention_mask"]
        left_out = (mask == 0) | (torch.arange(mask.shape[1]) < starts)
        return {**batch, "labels": batch["input_ids"].masked_fill(left_out, -100)}

    @torch.no_grad()
    def _log_probs(self, model: nn.Module) -> Tensor:
        """Summed log-probabilities in nats, in the shape of `log_ratios`."""
        was_training = model.training
        model.eval()
        scores = []
        for batch in self._batches:
            tokens, mask = batch["input_ids"], batch["attention_mask"]
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            scores.append(torch.stack((-nats.view_as(labels).sum(1)).chunk(2), 1))
        model.train(was_training)
        return torch.cat(scores)


class DPOTask:
    """What all runs share; the fine-tuned `reference` is start and reference of every run."""

    def __init__(
        self,
        reference: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        train: Sequence[PreferencePair],
        heldout: Sequence[PreferencePair],
        settings: DemoSettings,
    ) -> None:
        swapped = [pair for pair in train if pair.swapped][: settings.fit_sample]
        clean = [pair for pair in train if not pair.swapped][: settings.fit_sample]
        self.reference = reference
        self.tokenizer = tokenizer
        self.settings = settings
        self.pairs = list(train)
        self.rows = [pair.row() for pair in train]
        self.heldout = PairScorer(tokenizer, heldout, reference)
        self.swapped = PairScorer(tokenizer, swapped, reference)
        self.clean = PairScorer(tokenizer, clean, reference)

    def measure(self, policy: nn.Module, step: int) -> tuple[Point, Tensor]:
        """The metrics of a policy, and the ranking scores of the held-out pairs."""
        heldout = self.heldout.log_ratios(policy)
        scores = ranking_scores(heldout)
        # A swapped label is fitted where the sample, the second of the two, is ranked first.
        swapped = ranking_scores(self.swapped.log_ratios(policy).flip(1))
        clean = ranking_scores(self.clean.log_ratios(policy))
        point = Point(
            step=step,
            accuracy=float(scores.double().mean()),
            swapped_fitted=float(swapped.double().mean()),
            clean_fitted=float(clean.double().mean()),
            drift=float((self.settings.beta * heldout.double()).abs().mean()),
        )
        return point, scores
