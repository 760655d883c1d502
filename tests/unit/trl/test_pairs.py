"""Ids, rows, weights and texts of pairs, and the collator that carries them to the loss."""

import logging
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset

from poprisk_integrations.trl.pairs import (
    EXCERPT,
    LabelledPairs,
    PairCollator,
    drop_rows,
    excerpts,
    take_pair_columns,
)


def data(**columns: Any) -> Dataset:
    return Dataset.from_dict(columns)


def ids(dataset: Dataset, column: str | None = "id") -> list[Any]:
    return LabelledPairs(dataset, column).ids


def test_ids_of_a_column_keep_their_type() -> None:
    for values in (["b", "a"], [7, 3], [-(2**63), 2**63 - 1]):
        assert ids(data(id=values)) == values
    assert ids(data(id=["b", "a"]), None) == [0, 1]
    with pytest.raises(ValueError, match="Row 1 has 9223372036854775808; integers must fit 64"):
        ids(data(id=np.array([1, 2**63], dtype=np.uint64)))


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets has no columns of mixed type")
@pytest.mark.parametrize("values", [["a", "b", 3], [1, 2, "c"]])
def test_ids_are_all_text_or_all_integers(values: list[Any]) -> None:
    mixed = Dataset.from_dict({"id": values}, features=datasets.Features(id=datasets.Json()))
    message = f"Row 0 has {values[0]!r} and row 2 has {values[2]!r}; ids must be all text or all in"
    with pytest.raises(ValueError, match=f"Invalid pair_id_column: 'id'. {message}"):
        ids(mixed)


def test_rows_are_counted_before_any_was_dropped() -> None:
    kept = drop_rows(data(id=["a", "b", "c", None], w=[1.0, 0.5, -1.0, 1.0]), {0})
    assert ids(kept, None) == [1, 2, 3]
    assert ids(drop_rows(kept, {1}), None) == [1, 3]
    with pytest.raises(ValueError, match="Row 3 has no id"):
        ids(kept)
    with pytest.raises(ValueError, match=r"Row 2 has -1.0"):
        LabelledPairs(kept, weight_column="w")
    joined = datasets.concatenate_datasets([kept, kept])  # of two files: no row number is one
    assert ids(joined, None) == list(range(6))


def test_what_the_data_get_and_what_was_dropped(caplog: pytest.LogCaptureFixture) -> None:
    raw = data(chosen=["a", "b", "c"], w=[0, 2, 1])
    pairs = LabelledPairs(raw, weight_column="w")
    assert pairs.dataset["poprisk_weight"][:] == [0.0, 2.0, 1.0]
    part = LabelledPairs(pairs.dataset.select([2, 0]))  # used again: numbered anew, no weights
    assert part.dataset["poprisk_row"][:] == [0, 1]
    assert "poprisk_weight" not in part.dataset.column_names
    with caplog.at_level(logging.WARNING):
        pairs.note_dropped(pairs.dataset, "too long")
        assert not caplog.text
        pairs.note_dropped(pairs.dataset.select([0, 2]), "too long")
    assert pairs.dropped == {1}
    assert "1 of 3 training pairs were dropped" in caplog.text
    stream = raw.to_iterable_dataset()
    assert len(LabelledPairs(stream)) == 0
    assert LabelledPairs(stream).dataset is stream


def test_our_columns_never_reach_the_model_or_another_collator() -> None:
    seen = []

    def collate(examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        seen.extend(examples)
        return {"x": torch.tensor([example["x"] for example in examples])}

    numbers = [{"poprisk_row": 7, "poprisk_weight": 0.5}, {"poprisk_row": 3, "poprisk_weight": 2}]
    batch = PairCollator(collate)([{"x": x} | own for x, own in enumerate(numbers)])
    assert seen == [{"x": 0}, {"x": 1}]
    rest, rows, weights = take_pair_columns(batch)
    assert list(rest) == ["x"]
    torch.testing.assert_close(rows, torch.tensor([7, 3]))
    torch.testing.assert_close(weights, torch.tensor([0.5, 2.0]))
    assert take_pair_columns({"x": 1}) == ({"x": 1}, None, None)


def test_short_texts_are_shown_whole() -> None:
    pair = {"prompt": "a\nb", "chosen": "yes\x1b[1m", "rejected": "no"}
    assert excerpts(pair) == ("a b", "yes [1m", "no")


def test_long_answers_are_shown_where_they_differ() -> None:
    start = "same words " * 30
    chosen, rejected = f"{start}north" + " x" * 99, f"{start}south"
    found = excerpts({"prompt": "q" * 200 + " why?", "chosen": chosen, "rejected": rejected})
    assert all(len(text) <= EXCERPT for text in found)
    assert [text[0] for text in found] == ["…"] * 3
    assert found[0].endswith("why?")  # the question is at the end
    assert "north" in found[1]
    assert found[1].endswith("…")
    assert "south" in found[2]


def test_conversations_and_answers_that_are_equal_so_far() -> None:
    user = {"role": "user", "content": "Red or blue?"}
    chosen, rejected = ([user, {"role": "assistant", "content": t}] for t in ("r" * 300, "r" * 90))
    found = excerpts({"chosen": chosen, "rejected": rejected})
    assert found[0] == "Red or blue?"
    assert all(0 < len(text) <= EXCERPT for text in found)
