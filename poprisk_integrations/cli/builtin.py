"""Built-in model and data: a config that names them runs as it is, offline, in seconds."""

# transformers leaves some of its functions untyped.
# mypy: disable-error-code="no-untyped-call"

import random
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from poprisk_integrations._files import write_whole
from poprisk_integrations.cli.errors import UsageError

__all__ = ["check_names", "is_builtin", "load_pairs", "local_model"]

_PREFIX = "builtin:"
_MODEL = f"{_PREFIX}tiny-llama"
_PAIRS = f"{_PREFIX}tiny-pairs"

_SPECIAL = ("<unk>", "<pad>", "<eos>")
# fmt: off
_WORDS = (
    "ash", "bay", "cat", "dew", "elm", "fog", "gum", "hay", "ice", "jay", "kin", "lot", "map",
    "net", "oak", "pea", "rye", "sea", "tin", "urn", "vow", "wax", "yam", "zoo", "arc", "bud",
    "cup", "den",
)
# fmt: on
_TRAIN_PAIRS, _TEST_PAIRS = 96, 32


def is_builtin(name: str | None) -> bool:
    """Whether a name is of the form `builtin:...`, known or not."""
    return bool(name) and str(name).startswith(_PREFIX)


def check_names(model: str | None, dataset: str | None) -> None:
    """Refuse a `builtin:` name that does not exist, with the known ones."""
    for kind, key, name, known in (
        ("model", "model_name_or_path", model, _MODEL),
        ("data set", "dataset_name", dataset, _PAIRS),
    ):
        if is_builtin(name) and name != known:
            raise UsageError(f"{key}: no built-in {kind} {name!r}; known: {known}")


def local_model(name: str, directory: Path) -> str:
    """What to load a model from: of a built-in one the directory below `directory` that has it.

    `builtin:tiny-llama` is a random Llama of 23 thousand parameters with a word-level tokenizer,
    the same on every machine. Every process may call this at once: the directory appears whole,
    from whoever is first, and is kept from then on (an adapter's config refers to it).
    """
    check_names(name, None)
    if not is_builtin(name):
        return name
    target = directory / name.replace(":", "-")
    if not target.is_dir():
        try:
            with write_whole(target) as temporary:
                _tokenizer().save_pretrained(temporary)
                model = _tiny_llama()
                model.config.save_pretrained(temporary)
                # Not model.save_pretrained, which on some ranks of a sharded run writes nothing.
                save_file(model.state_dict(), temporary / "model.safetensors", {"format": "pt"})
        except OSError:
            if not target.is_dir():  # or else another process was first
                raise
    return str(target)


def load_pairs(name: str) -> DatasetDict:
    """Preference pairs: the chosen completion starts with the prompt's last word.

    `builtin:tiny-pairs` has 96 pairs in "train" and 32 in "test", with the columns `pair_id`,
    `prompt`, `chosen` and `rejected`, the same on every machine.
    """
    check_names(None, name)
    return DatasetDict(
        {
            split: Dataset.from_list([_pair(rng, f"{split}-{row}") for row in range(count)])
            for split, count, rng in (
                ("train", _TRAIN_PAIRS, random.Random(0)),
                ("test", _TEST_PAIRS, random.Random(1)),
            )
        }
    )


def _pair(rng: random.Random, pair_id: str) -> dict[str, str]:
    prompt = rng.choices(_WORDS, k=4)
    other = rng.choice([word for word in _WORDS if word != prompt[-1]])
    tails = [rng.choices(_WORDS, k=rng.randint(1, 4)) for _ in range(2)]
    return {
        "pair_id": pair_id,
        "prompt": " ".join(prompt),
        "chosen": " " + " ".join([prompt[-1], *tails[0]]),
        "rejected": " " + " ".join([other, *tails[1]]),
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, pad, eos = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, pad_token=pad, eos_token=eos
    )


def _tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(_SPECIAL) + len(_WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,  # larger than usual: a few steps must move the outputs
        pad_token_id=_SPECIAL.index("<pad>"),
        eos_token_id=_SPECIAL.index("<eos>"),
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)
