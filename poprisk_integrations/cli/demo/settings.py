"""Every number of the demo in one place."""

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "DemoSettings"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """Sizes, learning rates and budgets of one demo.

    The default learning rate of DPO, 1e-4, was fixed before any run of the gate: a twentieth of
    the peak rate of supervised fine-tuning, as DPO recipes use a tenth to a fiftieth of theirs.
    The sweep goes to three times and to a third of it.

    Args:
        vocab_size: Tokens of the BPE vocabulary.
        hidden_size: Width of the model.
        intermediate_size: Width of its feed-forward layers.
        layers: Decoder layers.
        heads: Attention heads.
        block_tokens: The text is dealt out to fine-tuning, training pairs and held-out pairs in
            blocks of this many consecutive tokens.
        prompt_tokens: Tokens of a prompt, at least.
        continuation_tokens: Tokens of a continuation, at most.
        sft_steps: Optimizer steps of supervised fine-tuning.
        sft_batch_size: Windows per step.
        sft_learning_rate: Peak learning rate (linear warm-up over a tenth, then constant).
        train_pairs: Preference pairs to train on.
        heldout_pairs: Preference pairs that are never trained on and never swapped.
        swapped_share: Share of the training pairs whose label is swapped.
        fit_sample: Swapped and, as many again, clean training pairs that are scored.
        beta: Of DPO.
        learning_rate: The default learning rate of DPO.
        learning_rate_factors: The sweep, as multiples of `learning_rate`.
        epochs: Passes over the training pairs.
        batch_size: Pairs per step.
        evaluations: Points per run beside the start, evenly spaced; the stop adds one.
    """

    vocab_size: int = 1024
    hidden_size: int = 160
    intermediate_size: int = 640
    layers: int = 2
    heads: int = 4
    block_tokens: int = 512
    prompt_tokens: int = 12
    continuation_tokens: int = 32
    sft_steps: int = 300
    sft_batch_size: int = 32
    sft_learning_rate: float = 2e-3
    train_pairs: int = 640
    heldout_pairs: int = 400
    swapped_share: float = 0.3
    fit_sample: int = 120
    beta: float = 0.1
    learning_rate: float = 1e-4
    learning_rate_factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    epochs: int = 5
    batch_size: int = 32
    evaluations: int = 5

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The sweep, ascending, to three significant digits."""
        return tuple(
            sorted(float(f"{self.learning_rate * f:.3g}") for f in self.learning_rate_factors)
        )


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
    evaluations=3,
)
