"""Which labels are wrong, from margins of models that did not see them, and from features."""

import numpy as np
import torch
from benchmarks.cleaned_pairs.pairs import Task
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import logsigmoid

from poprisk_integrations.core.noise_rate import (
    LARGEST_RATE,
    NoiseRateEstimate,
    UntrainedMargins,
    estimate_noise_rate,
    flip_probability,
)

__all__ = ["doubt_by_reasons", "estimate", "probability_wrong", "told", "weighed"]


def probability_wrong(margins: Tensor) -> Tensor:
    """Shape (M, n): as the flip report has it."""
    found = []
    for own in margins:
        rate = estimate(own)
        found.append(flip_probability(own, rate.reference_rate, rate.slope))
    return torch.stack(found)


def estimate(margins: Tensor) -> NoiseRateEstimate:
    """Of one member."""
    record = UntrainedMargins(len(margins))
    record.record(torch.arange(len(margins)), margins, step=1)
    return estimate_noise_rate(record)


def told(margins: Tensor, task: Task) -> list[dict]:
    """How well the margins tell wrong labels, for each member."""
    found = []
    for own, wrong, p in zip(margins, task.flipped, probability_wrong(margins), strict=True):
        suspect, rate = p >= 0.5, estimate(own)
        is_mixed = bool(wrong.any()) and not bool(wrong.all())
        hits = float((suspect & wrong).sum())
        found.append(
            {
                "auc": f"{roc_auc_score(wrong, -own):.4f}" if is_mixed else "",
                "precision": f"{hits / int(suspect.sum()):.4f}" if suspect.any() else "",
                "suspects": f"{suspect.float().mean():.4f}",
                "rate": "" if rate.rate is None else f"{rate.rate:.4f}",
                "low": f"{rate.low:.4f}",
                "high": f"{rate.high:.4f}",
            }
        )
    return found


def weighed(features: Tensor, fold: Tensor) -> Tensor:
    """Logistic regression of the labels on features, weights of a fold from the other folds.

    Args:
        features: Shape (n, F), chosen minus rejected: they change their sign with the label.
        fold: Shape (n,).

    Returns:
        Shape (n,), the log-odds of the label as it is.
    """
    x = (features / features.square().mean(0).sqrt()).numpy()
    found = torch.zeros(len(x), dtype=torch.float64)
    for one in fold.unique():
        others = x[(fold != one).numpy()]
        # Both orders of a pair: without a constant the labels alone would have one class.
        both, label = np.concatenate([others, -others]), np.repeat([1, 0], len(others))
        model = LogisticRegression(fit_intercept=False).fit(both, label)
        found[fold == one] = torch.from_numpy(model.decision_function(x[(fold == one).numpy()]))
    return found


def doubt_by_reasons(margin: Tensor, turning: Tensor, fixed: Tensor, fold: Tensor) -> Tensor:
    """Log-odds that a label is right where the rate of wrong labels depends on features.

        P(label) = s(k h) (1 - e(-z, u)) + s(-k h) e(z, u),   e(z, u) = 0.49 s(a + b z + c u)

    The second term is that of a wrong label: of the pairs whose other order is right, those that an
    annotator u mistakes, more often if what is chosen is the longer one (z > 0, b > 0). Greatest
    likelihood with a prior N(0, 1) of b and c, of a fold from the other folds.

    Args:
        margin: Shape (n,).
        turning: z, shape (n, F), changes its sign with the label.
        fixed: u, shape (n, G), does not.
        fold: Shape (n,).
    """
    h = margin / margin.square().mean().sqrt()
    z, u = turning / turning.square().mean(0).sqrt(), fixed
    found = torch.zeros_like(h)

    def terms(at: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        slope, constant = weights[0].exp(), weights[1]
        b, c = weights[2:].split([z.shape[1], u.shape[1]])
        own, other = (
            LARGEST_RATE * torch.sigmoid(constant + sign * z[at] @ b + u[at] @ c)
            for sign in (1, -1)
        )
        right = logsigmoid(slope * h[at]) + (1 - other).log()
        return right, logsigmoid(-slope * h[at]) + own.log()

    for one in fold.unique():
        others, own = torch.nonzero(fold != one)[:, 0], torch.nonzero(fold == one)[:, 0]
        weights = torch.zeros(2 + z.shape[1] + u.shape[1], dtype=h.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss(at: Tensor = others, weights: Tensor = weights) -> Tensor:
            weights.grad = None
            right, wrong = terms(at, weights)
            value = -torch.logaddexp(right, wrong).sum() + weights[2:].square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            right, wrong = terms(own, weights)
            found[own] = right - wrong
    return found
