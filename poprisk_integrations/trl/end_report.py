"""One line about how a DPO run on noisy labels ended."""

from poprisk_integrations.core import Diagnosis
from poprisk_integrations.trl.label_noise import LARGEST_USED_RATE, LabelNoise

__all__ = ["describe_end"]


def describe_end(
    noise: LabelNoise,
    *,
    flips_fitted: float | None = None,
    diagnosis: Diagnosis | None = None,
    kept_step: int | None = None,
) -> str:
    """What happened, for people: noise rate, suspects fitted, whether it memorises, what was kept.

    Args:
        noise: After training.
        flips_fitted: Share of the suspect pairs that are ranked as labelled; None if unknown.
        diagnosis: What the stop's windows say, in the words of `core.diagnose`; None without one.
        kept_step: Step of the checkpoint that was kept as the best; None if none was.

    Example:
        >>> from poprisk_integrations.core import diagnose
        >>> from poprisk_integrations.trl.pair_loss import PairLoss
        >>> noise = LabelNoise(10, loss=PairLoss())
        >>> describe_end(noise, diagnosis=diagnose([]), kept_step=290)
        'noise rate not estimated; cannot tell whether it memorises; kept step 290'
    """
    parts = ["noise rate not estimated" if noise.estimate is None else str(noise.estimate)]
    if noise.rate is not None:
        suspects = int(noise.suspects().sum()) if int(noise.margins.seen.sum()) else 0
        if suspects:
            fitted = "" if flips_fitted is None else f", {100 * flips_fitted:.0f} % of them fitted"
            parts.append(f"{suspects} suspect pairs{fitted}")
    lacking = noise.lacks_rate
    if lacking is not None:
        without = "labels are taken as right" if lacking == "weights" else "the loss is DPO's"
        parts.append(f"no noise rate for noise={lacking!r}: {without}")
    if noise.loss.mode != "off":
        rate = "" if noise.loss.mode == "holder" else f" at noise rate {noise.loss.noise_rate:.2f}"
        if noise.rate == LARGEST_USED_RATE and noise.estimate is not None:
            rate += ", the largest that is used"
        parts.append(f"loss {noise.loss.mode}{rate}")
    if diagnosis is not None:
        parts.append(diagnosis.short)
    if kept_step is not None:
        parts.append(f"kept step {kept_step}")
    return "; ".join(parts)
