"""What a tokenizer and `max_length` make of preference pairs, by the steps of TRL's DPOTrainer."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import itertools
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import extract_prompt

__all__ = ["TRUNCATION_MODES", "TokenScan", "scan_tokens"]

TRUNCATION_MODES = ("keep_start", "keep_end")
_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
_BATCH = 256


@dataclass(kw_only=True, slots=True)
class TokenScan:
    """Places of pairs, by what happens to their tokens."""

    destroyed: list[int] = field(default_factory=list)  # the same tokens, or only unknown ones
    unknown: list[int] = field(default_factory=list)  # some unknown tokens
    boundary: list[int] = field(default_factory=list)  # the prompt's tokens are no start of both
    emptied: list[int] = field(default_factory=list)  # the prompt alone fills max_length
    made_equal: list[int] = field(default_factory=list)  # what max_length leaves is the same
    cut: list[int] = field(default_factory=list)  # longer than max_length, but none of the above
    without_prompt: list[int] = field(default_factory=list)  # nothing of the prompt is left
    looked_at: int = 0
    longest: int = 0  # tokens of the longest prompt and answer


def scan_tokens(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    without: Collection[int] = (),
    progress: Callable[[int], Any] | None = None,
) -> TokenScan:
    """Tokenize pairs as TRL does, and look at what is left of each.

    Args:
        dataset: Pairs in one of TRL's formats, text or conversations.
        tokenizer: A tokenizer of transformers, of conversations with a chat template.
        max_length: Tokens of prompt and answer that TRL keeps; None for all.
        truncation_mode: "keep_start" or "keep_end".
        without: Places that are left out: pairs with a missing text, for instance.
        progress: Is told how many pairs are done.

    Raises:
        ValueError: If the data are conversations and the tokenizer has no chat template.
    """
    scan = TokenScan()
    wanted = [place for place in range(len(dataset)) if place not in without]
    columns = [column for column in _COLUMNS if column in dataset.column_names]
    chosen = dataset.with_format(None).select_columns(columns).select(wanted)
    judge = _Judge(tokenizer, max_length, truncation_mode, scan)
    done = 0
    for batch in chosen.iter(batch_size=_BATCH):
        rows = [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
        judge.look(rows, wanted[done : done + len(rows)])
        done += len(rows)
        if progress is not None:
            progress(done)
    return scan


class _Judge:
    """Sorts pairs into the lists of a scan."""

    def __init__(
        self, tokenizer: Any, max_length: int | None, truncation_mode: str, scan: TokenScan
    ) -> None:
        self.tokenizer, self.max_length, self.scan = tokenizer, max_length, scan
        self.keeps_start = truncation_mode == "keep_start"
        special = set(tokenizer.all_special_ids)
        self.unknown = tokenizer.unk_token_id
        others = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        if self.unknown in others:  # GPT-2's: it knows all texts, and names its only special token
            self.unknown = None
        self.special = special - {self.unknown}

    def look(self, rows: list[dict[str, Any]], places: Sequence[int]) -> None:
        rows = [row if "prompt" in row else {**row, **extract_prompt(row)} for row in rows]
        texts = list(itertools.chain.from_iterable(map(self._texts, rows)))
        # A chat template writes the special tokens itself.
        is_chat = bool(rows) and isinstance(rows[0]["chosen"], list)
        ids = self.tokenizer(
            texts, add_special_tokens=not is_chat, return_attention_mask=False, verbose=False
        )["input_ids"]
        for place, *three in zip(places, ids[::3], ids[1::3], ids[2::3], strict=True):
            self._judge(place, *three)

    def _texts(self, row: dict[str, Any]) -> tuple[str, str, str]:
        """The prompt, and the prompt with each answer."""
        prompt, answers = row["prompt"], (row["chosen"], row["rejected"])
        if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
            end = self.tokenizer.eos_token or ""
            first, second = (a if a.endswith(end) else a + end for a in answers)
            return prompt, prompt + first, prompt + second
        if isinstance(prompt, str) or not all(isinstance(answer, list) for answer in answers):
            raise ValueError("prompt, chosen and rejected must be all text or all messages.")
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the data are conversations, and the tokenizer has no chat_template.")
        tools = row.get("tools")
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
            "tokenize": False,
        }
        render = self.tokenizer.apply_chat_template
        first, second = (render(prompt + answer, **options) for answer in answers)
        return render(prompt, add_generation_prompt=True, **options), first, second

    def _judge(self, place: int, prompt: list[int], first: list[int], second: list[int]) -> None:
        scan, limit = self.scan, self.max_length
        scan.looked_at += 1
        longest = max(len(first), len(second))
        scan.longest = max(scan.longest, longest)
        start = min(_common_start(prompt, first), _common_start(prompt, second))
        if start < len(prompt):
            scan.boundary.append(place)
        if first == second or any(self._says_nothing(ids[start:]) for ids in (first, second)):
            scan.destroyed.append(place)
            return
        if self.unknown is not None and (self.unknown in first or self.unknown in second):
            scan.unknown.append(place)
        if limit is None or longest <= limit:
            return
        if self.keeps_start and start >= limit:
            scan.emptied.append(place)
            return
        kept = slice(None, limit) if self.keeps_start else slice(-limit, None)
        if first[kept] == second[kept]:
            scan.made_equal.append(place)
        elif not self.keeps_start and longest - start >= limit:
            scan.without_prompt.append(place)
        else:
            scan.cut.append(place)

    def _says_nothing(self, answer: list[int]) -> bool:
        content = [token for token in answer if token not in self.special]
        return all(token == self.unknown for token in content)


def _common_start(ids: list[int], others: list[int]) -> int:
    if others[: len(ids)] == ids:
        return len(ids)
    return next(n for n, (a, b) in enumerate(itertools.zip_longest(ids, others)) if a != b)
