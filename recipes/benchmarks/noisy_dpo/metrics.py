"""What is measured after an epoch, for all members at once."""

import numpy as np
import torch
from language import reward
from model import Params, completion_logits, mask_of, sample
from pairs import Task, log_probs_of
from torch import Tensor

from poprisk_integrations.core.preference_losses import dpo_loss

__all__ = ["Evaluator"]

FIT_ROWS = 128  # of flipped and of clean pairs


class Evaluator:
    """Metrics of shape (E, M).

        accuracy        share of clean held-out pairs that are ranked as the true reward does
        reward          of own samples, minus the reference's on the same draws, in its sd
        kl              to the reference on own samples, nats per completion, exact at each token
        entropy         nats per token of own samples
        flipped_fitted  share of wrong labels with h > 0; NaN without wrong labels
        clean_fitted    share of right labels with h > 0
        chosen_drift    log-ratio of the better held-out completion, nats
        drift           mean |beta log-ratio| of held-out completions
        length          of own samples
        held_loss       DPO loss on the pairs held out of training, with their noise

    Args:
        task: Data and reference.
        beta: Of the margins.
        kept: Training pairs that are trained on, the first ones.
    """

    def __init__(self, task: Task, beta: float, kept: int) -> None:
        self.task, self.beta, self.kept = task, beta, kept
        order = (~task.flipped[:, :kept]).int().argsort(dim=1, stable=True)
        self.fit_rows = torch.cat([order[:, :FIT_ROWS], order[:, -FIT_ROWS:]], 1)
        self.rows: dict[str, list[np.ndarray]] = {}
        self.first_reward: Tensor | None = None

    @torch.no_grad()
    def __call__(self, params: Params, epoch: int) -> None:
        """Evaluate; the first call must be before training."""
        params = {name: p.detach() for name, p in params.items()}
        found = {
            "epoch": torch.tensor(float(epoch)),
            **self._held(params),
            **self._fit(params),
            **self._samples(params),
        }
        for name, value in found.items():
            self.rows.setdefault(name, []).append(value.cpu().numpy())

    def _held(self, params: Params) -> dict[str, Tensor]:
        task = self.task
        both = [
            log_probs_of(params, task.held_prompts, y) for y in (task.held_better, task.held_worse)
        ]
        ratios = torch.stack(both, -1) - task.held_reference
        margin = ratios[..., 0] - ratios[..., 1]
        hit = (margin > 0).float() + 0.5 * (margin == 0).float()
        return {
            "accuracy": hit.mean(1),
            "chosen_drift": ratios[..., 0].mean(1),
            "drift": (self.beta * ratios).abs().mean((1, 2)),
        }

    def _fit(self, params: Params) -> dict[str, Tensor]:
        flipped = self.task.flipped.gather(1, self.fit_rows)
        fitted = (self._training_margins(params, self.fit_rows) > 0).float()
        found = {
            "flipped_fitted": (fitted * flipped).sum(1) / flipped.sum(1),
            "clean_fitted": (fitted * ~flipped).sum(1) / (~flipped).sum(1),
        }
        n = flipped.shape[0], self.task.flipped.shape[1]
        if self.kept < n[1]:
            rows = torch.arange(self.kept, n[1]).expand(n[0], -1)
            h = self.beta * self._training_margins(params, rows)
            found["held_loss"] = dpo_loss(h).mean(1)
        return found

    def _training_margins(self, params: Params, rows: Tensor) -> Tensor:
        task = self.task
        member = torch.arange(rows.shape[0])[:, None]
        prompts = task.prompts[member, rows]
        both = [
            log_probs_of(params, prompts, y[member, rows]) for y in (task.chosen, task.rejected)
        ]
        return both[0] - both[1] - task.reference_margin[member, rows]

    def _samples(self, params: Params) -> dict[str, Tensor]:
        task = self.task
        completions = sample(params, task.query, task.draws)
        mask = mask_of(completions)
        own = completion_logits(params, task.query, completions).log_softmax(-1)
        base = completion_logits(task.reference, task.query, completions).log_softmax(-1)
        chances = own.exp()
        kl = ((chances * (own - base)).sum(-1) * mask).sum(-1)
        entropy = (-(chances * own).sum(-1) * mask).sum((1, 2)) / mask.sum((1, 2))
        found = reward(task.query, completions).mean(1) / task.reward_sd
        if self.first_reward is None:
            self.first_reward = found
        return {
            "reward": found - self.first_reward,
            "kl": kl.mean(1),
            "entropy": entropy,
            "length": mask.sum(-1).float().mean(1),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.stack(v).astype(np.float32) for name, v in self.rows.items()}
