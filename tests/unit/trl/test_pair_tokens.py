"""What a tokenizer and `max_length` do to pairs, beside what TRL's trainer does to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from poprisk_integrations.trl.pair_checks import Finding, check_pairs
from tests.helpers.tiny_dpo import config_options, tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def letters(**options: Any) -> PreTrainedTokenizerFast:
    """Tokens are letters, but "ab" is one token; capitals are unknown."""
    vocabulary = {token: n for n, token in enumerate(["<unk>", "<eos>", *"abcduxyz", "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**tokens, **options})


def findings(
    rows: list[tuple[str, str, str]], tokenizer: Any = None, **options: Any
) -> dict[str, Finding]:
    data = Dataset.from_list(
        [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    )
    found = check_pairs(data, tokenizer=tokenizer or letters(), **options).findings
    return {finding.name: finding for finding in found if finding.name != "length"}


def test_texts_that_a_tokenizer_destroys() -> None:
    rows = [
        ("xy", "c", "d"),
        ("xy", "C", "D"),  # the same tokens, all unknown
        ("xy", "c d", "cd"),  # spaces are lost
        ("xy", "C", "d"),  # nothing known of one
        ("xy", "cC", "d"),  # something known of both
        ("Xy", "c", "d"),  # the prompt
    ]
    found = findings(rows)
    assert {name: (f.level, f.rows) for name, f in found.items()} == {
        "destroyed": ("fix", (1, 2, 3)),
        "unknown": ("warn", (4, 5)),
    }


def test_a_special_token_in_the_place_of_unknown_ones_is_none() -> None:
    """GPT-2 names its only special token as the unknown one, and knows all texts."""
    assert findings([("xy", "c", "d")] * 2, letters(unk_token="<eos>")).keys() == {"copies"}


def test_prompt_and_answer_that_merge() -> None:
    found = findings([("xa", "b", "c"), ("xa", "c", "d"), ("x", "ab", "c")])
    assert {name: (f.level, f.rows) for name, f in found.items()} == {"boundary": ("warn", (0,))}


LONG = [
    ("xyz", "c", "d"),  # 5 tokens with the end
    ("xxxxxx", "c", "d"),
    ("xyz", "ccccx", "ccccy"),
    ("xyz", "cccc", "ddddd"),
    ("x", "ccccccc", "ddddddd"),
    ("x", "xccccccc", "yccccccc"),
]
LIMITS = {
    "keep_start": {"emptied": (1,), "made_equal": (2,), "cut": (3, 4, 5)},
    "keep_end": {"made_equal": (5,), "without_prompt": (2, 3, 4), "cut": (1,)},
}


@pytest.mark.parametrize("mode", LIMITS)
def test_what_max_length_leaves(mode: str) -> None:
    found = findings(LONG, max_length=6, truncation_mode=mode)
    assert {name: finding.rows for name, finding in found.items()} == LIMITS[mode]
    fixed = {name for name, finding in found.items() if finding.level == "fix"}
    assert fixed == LIMITS[mode].keys() & {"emptied", "made_equal"}
    assert findings(LONG, max_length=10, truncation_mode=mode) == {}


def conversations(rows: list[tuple[str, str, str]]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for prompt, chosen, rejected in rows
        ]
    )


def test_conversations_need_a_chat_template() -> None:
    data = conversations([("xy", "c", "d"), ("xy", "bc", "d"), ("xy", "C", "D")])
    check = check_pairs(data, tokenizer=letters(chat_template=TEMPLATE))
    found = {finding.name: finding.rows for finding in check.findings if finding.name != "length"}
    assert found == {"destroyed": (2,), "boundary": (1,)}
    assert check.longest == 5
    with pytest.raises(ValueError, match="the tokenizer has no chat_template"):
        check_pairs(data, tokenizer=letters())


def test_text_and_messages_do_not_mix() -> None:
    data = conversations([("xy", "c", "d")]).remove_columns("prompt").add_column("prompt", ["xy"])
    with pytest.raises(ValueError, match="must be all text or all messages"):
        check_pairs(data, tokenizer=letters(chat_template=TEMPLATE))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize("kind", ["text", "common start", "conversations"])
@pytest.mark.parametrize("mode", LIMITS)
def test_trl_does_the_same(kind: str, mode: str, tmp_path: Path) -> None:
    """The rows it drops, and those whose answers are the same to the model."""
    rows = [*LONG, ("xa", "b", "c"), ("xa", "bcccccc", "bccccdd"), ("xyz", "C", "D")]
    data = conversations(rows)
    if kind != "conversations":
        data = Dataset.from_list([dict(zip(data.column_names, row, strict=True)) for row in rows])
    if kind == "common start":
        joined = [{side: x["prompt"] + x[side] for side in ("chosen", "rejected")} for x in data]
        data = Dataset.from_list(joined)
    tokenizer = letters(chat_template=TEMPLATE)
    check = check_pairs(data, tokenizer=tokenizer, max_length=6, truncation_mode=mode)
    found = {finding.name: set(finding.rows) for finding in check.findings}
    trainer = DPOTrainer(
        tiny_model(),
        tiny_model(1),
        DPOConfig(**config_options(tmp_path, max_length=6, truncation_mode=mode)),
        train_dataset=data.add_column("number", range(len(data))),
        processing_class=tokenizer,
    )
    prepared: Any = trainer.train_dataset
    assert set(prepared["number"]) == set(range(len(rows))) - found.get("emptied", set())
    same = set()
    for example in prepared:
        batch = trainer.data_collator([example])
        if torch.equal(*batch["input_ids"]):
            same.add(example["number"])
        ends = [batch["completion_mask"][side].sum() for side in (0, 1)]
        assert min(ends) > 0
    assert same == found.get("made_equal", set()) | found["destroyed"]
