"""The estimated test loss of transformers' own models, however they are trained."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import poprisk_integrations.huggingface as hf
from tests.helpers.tiny_classifier import arguments, train

EXAMPLES, LENGTH = 96, 12


def llama(cls=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        **options,
    )
    return cls(config)


def texts():
    generator, rows = torch.Generator().manual_seed(1), []
    for _ in range(EXAMPLES):
        ids = torch.randint(1, 24, (LENGTH,), generator=generator)
        length = int(torch.randint(4, LENGTH, (), generator=generator))
        labels = ids.clone()
        labels[length:] = -100
        mask = (torch.arange(LENGTH) < length).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return rows


def classes():
    return [{**row, "labels": row["input_ids"][0] % 3} for row in texts()]


def with_adapters():
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(), config)


def estimated(tmp_path, model, data, **changes):
    """Rows of the history of a run of three epochs."""
    stop = hf.PopRiskEarlyStoppingCallback(criterion="risk", sit_out=0.25, action="monitor")
    train(arguments(tmp_path, **changes), stop, model=model, train_dataset=data)
    assert [row["step"] for row in stop.history][-1] > 0
    assert all(row["estimated_test_loss"] > 0 for row in stop.history)
    return stop.history


def near(rows, others, tolerance=1e-4):
    for row, other in zip(rows, others, strict=True):
        for name in ("train_loss", "estimated_test_loss"):
            assert row[name] == pytest.approx(other[name], rel=tolerance)


def test_a_language_model_has_the_mean_over_its_tokens(tmp_path):
    """By hand: with a rate of 0 all losses are those of the model at its start."""
    model, data = llama(), texts()
    (first, *_) = estimated(tmp_path, model, data, learning_rate=0.0)
    joined = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        logits = model(
            input_ids=joined["input_ids"], attention_mask=joined["attention_mask"]
        ).logits
    logs = torch.log_softmax(logits[:, :-1].double(), -1)
    targets = joined["labels"][:, 1:]
    counts = targets != -100
    losses = -logs.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2) * counts
    means = losses.sum(1) / counts.sum(1)
    assert first["train_loss"] == pytest.approx(float(means.mean()), abs=4 * float(means.std()) / 9)
    assert first["train_accuracy"] < 0.3


SETTINGS = {
    "accumulated": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, 2e-2),
    "checkpointed": ({"gradient_checkpointing": True}, 1e-4),
    "reentrant": (
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        1e-4,
    ),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-3),
    "bf16": ({"bf16": True}, 2e-2),
    "neftune": ({"neftune_noise_alpha": 0.01}, 2e-2),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return estimated(tmp_path_factory.mktemp("plain"), llama(), texts())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name",
    # The compiled one traces for long; a compiled model is in test_example_losses too.
    [pytest.param(n, marks=[pytest.mark.slow] if n == "compiled" else []) for n in SETTINGS],
)
def test_training_options_change_the_estimate_little(tmp_path, plain, name):
    changes, tolerance = SETTINGS[name]
    near(estimated(tmp_path, llama(), texts(), **changes), plain, tolerance)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_adapters_and_batches_of_like_length(tmp_path):
    by_length = {"train_sampling_strategy": "group_by_length"}
    rows = estimated(tmp_path, with_adapters(), texts(), **by_length)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert len(rows) == 3


def test_smoothed_labels_are_told_as_the_loss_without(tmp_path):
    """Trainer's label smoother is no loss function of torch: the loss comes from the logits."""
    changes = {"learning_rate": 0.0, "num_train_epochs": 1}
    rows = [
        estimated(
            tmp_path / str(factor), llama(), texts(), label_smoothing_factor=factor, **changes
        )
        for factor in (0.0, 0.1)
    ]
    near(*rows)


def test_a_classifier_has_an_accuracy(tmp_path):
    model = llama(LlamaForSequenceClassification, num_labels=3)
    rows = estimated(tmp_path, model, classes())
    assert all(0 <= row["estimated_test_accuracy"] <= 1 for row in rows)
