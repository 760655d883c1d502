"""A model and texts that need no download: made-up reviews, good or bad."""

import random
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

MODEL, REVIEWS = "bundled:tiny-bert", "bundled:reviews"

# fmt: off
BAD = (
    "awful", "boring", "broken", "cold", "cramped", "dirty", "dreadful", "dull", "empty", "harsh",
    "noisy", "poor", "rude", "sad", "slow", "sour", "stale", "ugly", "weak", "worn",
)
GOOD = (
    "bright", "charming", "clean", "clever", "cosy", "crisp", "fine", "fresh", "friendly", "funny",
    "great", "kind", "lovely", "neat", "quick", "rich", "smooth", "superb", "tasty", "warm",
)
THINGS = (
    "bread", "bus", "chair", "coffee", "film", "garden", "hotel", "house", "lamp", "meal", "novel",
    "phone", "play", "room", "shop", "show", "soup", "staff", "street", "train",
)
STARTS = (
    "all in all", "at first", "honestly", "in the end", "i hear", "they say", "this time", "well",
)
# fmt: on
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def reviews() -> DatasetDict:
    """384 sentences to train on and 128 to test with: two of their words tell the label."""
    draw = random.Random(0)
    rows = [_review(draw) for _ in range(512)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    train, test = (Dataset.from_list(part, features) for part in (rows[:384], rows[384:]))
    return DatasetDict(train=train, test=test)


def _review(draw: random.Random) -> dict[str, str | int]:
    label = draw.randrange(2)
    one, two = draw.sample((BAD, GOOD)[label], 2)
    start, thing, other = draw.choice(STARTS), *draw.sample(THINGS, 2)
    return {"text": f"{start} the {thing} was {one} and the {other} {two}", "label": label}


def tiny_bert(
    texts: Sequence[str], names: Sequence[str]
) -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    """A random BERT of two layers, and a tokenizer of whole words trained on the texts."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=1000, special_tokens=list(SPECIAL), show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True)),
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return BertForSequenceClassification(config), tokenizer
