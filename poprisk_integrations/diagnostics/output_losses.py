"""Losses per example from what a transformers model returns, where no loss function was seen."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["output_losses"]

_IGNORED = -100  # the label of what does not count, everywhere in transformers


def output_losses(
    model: Any, inputs: Mapping[str, Any], outputs: Any, rows: int
) -> dict[str, Tensor] | str:
    """What each example of a batch lost, by the model's own kind of head.

    For compiled models, whose loss is inside the graph, and for TRL's language models, which give
    the log-probabilities of the labels instead of logits. The loss is the plain one of the head
    (`loss_type` and `problem_type` of transformers): class weights, smoothing and auxiliary losses
    of a model of its own are not in it.

    `inputs` have `labels`, `outputs` have `logits`, or `log_probs`, `label_mask` and `is_top1`. The
    result has "loss" and, for classes, "accuracy", float32 of length `rows`, detached; or it is a
    sentence that says why they cannot be had.
    """
    logits, labels = _entry(outputs, "logits"), inputs.get("labels")
    if not isinstance(labels, Tensor):
        return "the batch has no labels"
    log_probs = _entry(outputs, "log_probs")
    found = log_probs if isinstance(log_probs, Tensor) else logits
    if not isinstance(found, Tensor):
        return "the model returns no logits (a fused loss?)"
    if len(found) != rows or len(labels) != rows:
        return (
            f"{len(labels)} rows of labels and {len(found)} of predictions are not one for each "
            "example (data without padding do not show whose a token is)"
        )
    if found is log_probs:
        return _of_log_probs(found, _entry(outputs, "label_mask"), _entry(outputs, "is_top1"))
    logits = found
    model = _unwrapped(model)
    kind = str(getattr(model, "loss_type", None) or type(model).__name__)
    head = next((head for name, head in _HEADS.items() if name in kind), None)
    if head is None:
        return f"the loss of a {type(model).__name__} is not known"
    with torch.no_grad():
        return head(model, logits.detach(), labels)


def _unwrapped(model: Any) -> Any:
    """The transformers model in wrappers of torch, accelerate and peft."""
    for _ in range(8):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner
    return model


def _entry(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _of_log_probs(log_probs: Tensor, counts: Tensor, hits: Tensor) -> dict[str, Tensor]:
    """Of (B, T) tokens, zero where nothing counts."""
    number = counts.sum(1)
    return {
        "loss": -log_probs.detach().float().sum(1) / number,
        "accuracy": (hits & counts).sum(1).float() / number,
    }


def _next_tokens(model: Any, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return _of_classes(logits[:, :-1], labels[:, 1:])


def _tokens(model: Any, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return _of_classes(logits, labels)


def _generation(model: Any, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Decoders that are fed with the labels before them, and language models with other inputs."""
    is_shifted = getattr(model.config, "is_encoder_decoder", False)
    return (_tokens if is_shifted else _next_tokens)(model, logits, labels)


def _sequences(model: Any, logits: Tensor, labels: Tensor) -> dict[str, Tensor] | str:
    """As transformers chooses between regression, classes and several labels."""
    kind = getattr(model.config, "problem_type", None)
    if kind is None and logits.shape[-1] == 1:
        kind = "regression"
    elif kind is None and labels.is_floating_point():
        kind = "multi_label_classification"
    if kind == "regression":
        each = F.mse_loss(logits.float().reshape(labels.shape), labels.float(), reduction="none")
        return {"loss": each.reshape(len(each), -1).mean(1)}
    if kind == "multi_label_classification":
        each = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none")
        hits = (logits > 0) == (labels > 0.5)
        return {"loss": each.mean(1), "accuracy": hits.float().mean(1)}
    return _of_classes(logits[:, None], labels.reshape(-1, 1))


def _of_classes(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Means over what counts of (B, T, C) and (B, T), a row at a time: vocabularies are large."""
    losses, hits = [], []
    for scores, own in zip(logits, labels, strict=True):
        counts = own != _IGNORED
        each = F.cross_entropy(scores.float(), own, reduction="none", ignore_index=_IGNORED)
        losses.append(each.sum() / counts.sum())
        hits.append(((scores.argmax(-1) == own) & counts).sum() / counts.sum())
    return {"loss": torch.stack(losses), "accuracy": torch.stack(hits).float()}


_Head = Callable[[Any, Tensor, Tensor], dict[str, Tensor] | str]
_HEADS: dict[str, _Head] = {
    "ForCausalLM": _next_tokens,
    "LMHeadModel": _next_tokens,
    "ForMaskedLM": _tokens,
    "ForConditionalGeneration": _generation,
    "ForTokenClassification": _tokens,
    "ForSequenceClassification": _sequences,
    "ForImageClassification": _sequences,
}
