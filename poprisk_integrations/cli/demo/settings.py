"""Every number of the demo in one place."""

from dataclasses import dataclass
from typing import Any

__all__ = ["FULL", "QUICK", "QUIET_RUN", "DemoSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Sizes, learning rate and budgets of one demo."""

    vocab_size: int = 1024  # tokens of the BPE vocabulary
    hidden_size: int = 160  # of the Llama
    intermediate_size: int = 640
    layers: int = 2
    heads: int = 4
    # The text is dealt out to fine-tuning, training pairs and held-out pairs in blocks of so many
    # consecutive tokens.
    block_tokens: int = 512
    prompt_tokens: int = 12  # at least
    continuation_tokens: int = 32  # at most
    sft_steps: int = 300
    sft_batch_size: int = 32
    sft_learning_rate: float = 2e-3  # peak: linear warm-up over a tenth, then constant
    train_pairs: int = 640
    heldout_pairs: int = 400  # never trained on and never swapped
    swapped_share: float = 0.3  # of the training pairs
    fit_sample: int = 120  # swapped and, as many again, clean training pairs that are scored
    beta: float = 0.1  # of DPO
    # Constant, and a twentieth of the peak rate of fine-tuning, as is usual: a tenth to a fiftieth.
    # It was fixed before any of these models was made.
    learning_rate: float = 1e-4
    epochs: int = 5
    batch_size: int = 32
    folds: int = 4


FULL = DemoSettings()

# The same job in well under a minute: it shows that everything runs, its numbers mean little.
QUICK = DemoSettings(
    sft_steps=40,
    train_pairs=96,
    heldout_pairs=96,
    fit_sample=32,
    prompt_tokens=8,
    continuation_tokens=16,
    epochs=2,
    batch_size=16,
    folds=2,
)

# Of the TrainingArguments of every training.
QUIET_RUN: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}
