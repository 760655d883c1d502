"""A byte-pair tokenizer trained on the demo's text."""

# transformers leaves some of its functions untyped.
# mypy: disable-error-code="no-untyped-call"

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["starts_word", "train_tokenizer"]

_SPACE = "\u0120"  # how byte-level BPE writes a leading space


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE with `<pad>` and `<eos>`; the same texts give the same tokenizer.

    Args:
        texts: ASCII texts.
        vocab_size: Tokens, special ones included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def starts_word(tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    """By token id, whether the token starts with a space.

    BPE never merges across such a start: text cut there keeps its tokens on either side.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [token.startswith(_SPACE) for token in tokens]
