"""Losses from logits and labels equal those that the model's own loss function sees."""

import pytest
import torch

from poprisk_integrations.diagnostics.example_losses import ExampleLosses
from poprisk_integrations.diagnostics.output_losses import output_losses

transformers = pytest.importorskip("transformers")

B, T, V = 4, 6, 11
SMALL = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16}  # fmt: skip
T5 = {"vocab_size": V, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2,
      "decoder_start_token_id": 0}  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 8, "n_layer": 1, "n_head": 2}


def _tokens():
    labels = _ids()
    labels[0, 2:], labels[1, :3] = -100, -100
    return labels


def _ids():
    return torch.randint(1, V, (B, T), generator=torch.Generator().manual_seed(1))


HEADS = {
    "llama": ("LlamaForCausalLM", SMALL, _tokens),
    "gpt2": ("GPT2LMHeadModel", GPT2, _tokens),
    "masked": ("BertForMaskedLM", SMALL, _tokens),
    "t5": ("T5ForConditionalGeneration", T5, _tokens),
    "tokens": ("BertForTokenClassification", {**SMALL, "num_labels": 3}, lambda: _tokens() % 3),
    "classes": (
        "BertForSequenceClassification", {**SMALL, "num_labels": 3},
        lambda: torch.tensor([0, 1, 2, 0]),
    ),
    "regression": (
        "BertForSequenceClassification", {**SMALL, "num_labels": 1},
        lambda: torch.tensor([0.1, -1.0, 0.3, 2.0]),
    ),
    "labels": (
        "BertForSequenceClassification", {**SMALL, "num_labels": 3},
        lambda: torch.eye(4, 3),
    ),
}  # fmt: skip


def _forward(name):
    kind, config, labels = HEADS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).eval()
    inputs = {"input_ids": _ids(), "labels": labels()}
    tap = ExampleLosses()
    tap.start(B)
    outputs = model(**inputs)
    return model, inputs, outputs, tap.stop(outputs.loss), tap.reason


@pytest.mark.parametrize("name", list(HEADS))
def test_they_are_those_of_the_loss_function(name):
    model, inputs, outputs, tapped, reason = _forward(name)
    assert reason == ""
    found = output_losses(model, inputs, outputs, B)
    assert found.keys() == tapped.keys()
    for key in found:
        torch.testing.assert_close(found[key], tapped[key], equal_nan=True)
    assert len(found["loss"].unique()) == B


def test_a_compiled_model_is_one_of_these():
    model, inputs, outputs, tapped, _ = _forward("llama")
    compiled = torch.compile(model, backend="eager")
    found = output_losses(compiled, inputs, outputs, B)
    torch.testing.assert_close(found["loss"], tapped["loss"], equal_nan=True)


def test_log_probabilities_of_a_fused_head():
    model, inputs, outputs, tapped, _ = _forward("llama")
    labels = inputs["labels"][:, 1:]
    scores = outputs.logits[:, :-1].log_softmax(-1)
    counts = labels != -100
    chosen = scores.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    fused = {
        "log_probs": chosen * counts,
        "label_mask": counts,
        "is_top1": (scores.argmax(-1) == labels) & counts,
    }
    found = output_losses(model, inputs, fused, B)
    for key in ("loss", "accuracy"):
        torch.testing.assert_close(found[key], tapped[key], equal_nan=True)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"inputs": {"input_ids": _ids()}}, "no labels"),
        ({"outputs": {"loss": torch.zeros(())}}, "no logits"),
        ({"rows": 3}, "4 rows of labels and 4 of predictions are not one for each example"),
        ({"model": torch.nn.Linear(1, 1)}, "the loss of a Linear is not known"),
    ],
)
def test_it_says_why_not(change, why):
    model, inputs, outputs, _, _ = _forward("llama")
    arguments = {"model": model, "inputs": inputs, "outputs": outputs, "rows": B}
    assert why in output_losses(**{**arguments, **change})
