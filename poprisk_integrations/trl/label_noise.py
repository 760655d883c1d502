"""What a run knows about its labels, and the loss that follows from it."""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core.noise_rate import (
    NoiseRateEstimate,
    UntrainedMargins,
    estimate_noise_rate,
    fitted_slope,
    flip_probability,
)
from poprisk_integrations.core.preference_losses import (
    conservative_dpo_loss,
    dpo_loss,
    holder_dpo_loss,
    posterior_dpo_loss,
    robust_dpo_loss,
)
from poprisk_integrations.trl.flip_report import DROP_AT

__all__ = ["AUTO_MODE", "LARGEST_USED_RATE", "MODES", "LabelNoise", "PairLoss"]

MODES = ("off", "cdpo", "rdpo", "holder", "weights", "auto")
# What "auto" trains with: chosen by recipes/benchmarks/noisy_dpo on its selection seeds. Beside the
# gate and the stop no other loss was better than TRL's own.
AUTO_MODE = "off"
# Over-stating the rate is worse than under-stating it: rdpo's push grows like 1 / (1 - 2 e).
LARGEST_USED_RATE = 0.35


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLoss:
    """A mode of `noise` with its numbers: e, the margin where rdpo's push ends, g of holder."""

    mode: str = "off"
    noise_rate: float = 0.0
    max_margin: float | None = None
    gamma: float = 2.0

    def __call__(
        self, margins: Tensor, weights: Tensor | None = None, p_correct: Tensor | None = None
    ) -> Tensor:
        """Loss per pair, shape (B,) of `margins`; every mode takes `weights` as factors.

        `p_correct` is for "weights": without it the labels are taken as right.
        """
        if self.mode == "cdpo":
            loss = conservative_dpo_loss(margins, self.noise_rate)
        elif self.mode == "rdpo":
            loss = robust_dpo_loss(margins, self.noise_rate, self.max_margin)
        elif self.mode == "holder":
            loss = holder_dpo_loss(margins, self.gamma)
        elif self.mode == "weights" and p_correct is not None:
            loss = posterior_dpo_loss(margins, p_correct)
        else:
            loss = dpo_loss(margins)
        return loss if weights is None else weights * loss


class LabelNoise:
    """Margins from before training, the noise rate they give, and the loss in force.

    Until the rate is known, by `noise_rate` or by `update_estimate`, the loss is DPO's.

    Example:
        >>> noise = LabelNoise(4, loss=PairLoss(mode="rdpo"), noise_rate=0.2)
        >>> noise.loss.noise_rate
        0.2
    """

    def __init__(self, num_pairs: int, *, loss: PairLoss, noise_rate: float | None = None) -> None:
        self.margins = UntrainedMargins(num_pairs)  # what everything is estimated from
        self.estimate: NoiseRateEstimate | None = None  # None before there is one
        self.estimate_step: int | None = None  # optimizer step at which it was made
        self._asked = loss
        self._given = noise_rate
        self._p_correct: Tensor | None = None

    @property
    def rate(self) -> float | None:
        """The rate in use: the user's, else the estimate up to 0.35.

        None before there is an estimate, and where the margins tell nothing.
        """
        if self._given is not None:
            return self._given
        if self.estimate is None or self.estimate.rate is None:
            return None
        return min(self.estimate.rate, LARGEST_USED_RATE)

    @property
    def rate_of_report(self) -> float | None:
        """The rate behind the probabilities: the user's, else the estimate as it is.

        Where the margins do not tell, its `reference_rate`: see `calibrated`.
        """
        if self._given is not None:
            return self._given
        return None if self.estimate is None else self.estimate.reference_rate

    @property
    def calibrated(self) -> bool:
        """Whether probabilities of wrong labels are such, or a ranking alone."""
        return self.rate is not None

    @property
    def loss(self) -> PairLoss:
        """The loss in force; "auto" is resolved."""
        mode, rate = self._asked.mode, self.rate
        if mode == "auto":
            mode = AUTO_MODE
        if mode in ("off", "holder"):
            return replace(self._asked, mode=mode)
        if rate is None:
            return replace(self._asked, mode="off")
        return replace(self._asked, mode=mode, noise_rate=rate)

    @property
    def lacks_rate(self) -> str | None:
        """The mode that was asked for, if it needs a rate and there is none; else None."""
        needs = self._asked.mode in ("cdpo", "rdpo", "weights")
        return self._asked.mode if needs and self.rate is None else None

    @property
    def slope(self) -> float:
        """Log-odds per unit of margin: the best fit, 1 (Bradley-Terry's own) before an estimate."""
        if self.estimate is None:
            return 1.0
        if self._given is not None:
            return fitted_slope(self.margins, self._given)
        return self.estimate.slope

    def losses(self, margins: Tensor, rows: Tensor | None, weights: Tensor | None) -> Tensor:
        """The losses in force, shape (B,) of `margins`; rows are -1 or None where not known."""
        loss, p_correct = self.loss, None
        if loss.mode == "weights" and weights is None:
            rows = torch.full_like(margins, -1, dtype=torch.int64) if rows is None else rows
            p_correct = self.p_correct(rows, margins)
        return loss(margins, weights, p_correct)

    def p_correct(self, rows: Tensor, margins: Tensor) -> Tensor | None:
        """Probability that the labels of a batch are right, shape (B,); None without a rate.

        It is that of the margin from before the pair was trained on. The present margin counts for
        rows that have no earlier one: they have not been trained on either.
        """
        rate = self.rate
        if rate is None:
            return None
        present = 1 - flip_probability(margins.detach(), rate, self.slope)
        if self._p_correct is None:
            return present
        if self._p_correct.device != rows.device:
            self._p_correct = self._p_correct.to(rows.device)
        known = self._p_correct[rows].to(present)
        return torch.where(known.isnan(), present, known)

    def update_estimate(self, step: int) -> NoiseRateEstimate:
        """Estimate from the margins recorded so far; ValueError if these are too few."""
        self.estimate = estimate = estimate_noise_rate(self.margins)
        self.estimate_step = step
        self._keep_p_correct()
        return estimate

    def probability_wrong(self) -> Tensor:
        """Shape (num_pairs,), fp64: posterior of a wrong label; NaN where no margin tells.

        That is where there is none, and where it is from before the model had moved.
        """
        rate = self.rate_of_report
        if rate is None:
            raise ValueError("The noise rate is not known yet.")
        wrong = flip_probability(self.margins.margin, rate, self.slope)
        return wrong.masked_fill(~self.margins.judged, torch.nan)

    def suspects(self) -> Tensor:
        """Boolean, shape (num_pairs,): labels that are more probably wrong than right.

        None of them where the probabilities are not calibrated.
        """
        suspect = self.probability_wrong() >= DROP_AT
        return suspect if self.calibrated else torch.zeros_like(suspect)

    def _keep_p_correct(self) -> None:
        """For `p_correct`. A pair that was seen but not judged has been trained on: prior."""
        correct = 1 - self.probability_wrong()
        if self.rate_of_report is not None:
            correct[self.margins.seen & correct.isnan()] = 1 - self.rate_of_report
        self._p_correct = correct.to(torch.float32)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors, and text for the metadata of the file that holds them."""
        estimate = None if self.estimate is None else self.estimate.to_json()
        text = {"estimate": json.dumps(estimate), "step": json.dumps(self.estimate_step)}
        return self.margins.state_dict(), text

    def load_state_dict(self, tensors: dict[str, Tensor], text: dict[str, Any]) -> None:
        """Continue from what was saved; ValueError if it is of a data set of another size."""
        self.margins.load_state_dict(tensors)
        saved = json.loads(text["estimate"])
        self.estimate = None
        if saved is not None:
            same = saved.keys() == set(NoiseRateEstimate.__slots__)
            # An older version's estimate had other numbers: it is made anew, of the same margins.
            self.estimate = (
                NoiseRateEstimate(**saved) if same else estimate_noise_rate(self.margins)
            )
        self.estimate_step = json.loads(text["step"])
        self._p_correct = None
        if self.estimate is not None:
            self._keep_p_correct()
