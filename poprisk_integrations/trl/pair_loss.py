"""The loss of each pair under a noise mode."""

from dataclasses import dataclass

from torch import Tensor

from poprisk_integrations.core.preference_losses import (
    conservative_dpo_loss,
    dpo_loss,
    holder_dpo_loss,
    posterior_dpo_loss,
    robust_dpo_loss,
)

__all__ = ["AUTO_MODE", "MODES", "PairLoss"]

MODES = ("off", "cdpo", "rdpo", "holder", "weights", "auto")
# What "auto" trains with: chosen by recipes/benchmarks/noisy_dpo on its selection seeds. Beside the
# gate and the stop no other loss was better than TRL's own.
AUTO_MODE = "off"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLoss:
    """A mode with its numbers.

    Args:
        mode: "off", "cdpo", "rdpo", "holder" or "weights".
        noise_rate: e of cdpo and rdpo, in [0, 0.5).
        max_margin: Where rdpo's push ends, reward units; None for the unbounded loss.
        gamma: Of holder, > 0.
    """

    mode: str = "off"
    noise_rate: float = 0.0
    max_margin: float | None = None
    gamma: float = 2.0

    def __call__(
        self, margins: Tensor, weights: Tensor | None = None, p_correct: Tensor | None = None
    ) -> Tensor:
        """Loss per pair, shape of `margins`.

        Args:
            margins: h = beta * (log-ratio of chosen - log-ratio of rejected), shape (B,).
            weights: Factors of the losses, shape (B,); every mode takes them.
            p_correct: For "weights": probability that each label is right, shape (B,). Without
                it the labels are taken as right.
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
