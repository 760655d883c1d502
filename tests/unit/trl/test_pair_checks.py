"""Ids, weights and vocabularies that cannot be are refused, with the row that is wrong."""

import math
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset

from poprisk_integrations.trl.pair_checks import check_vocabulary, check_weights, pair_ids
from poprisk_integrations.trl.pair_columns import drop_rows


def data(**columns: Any) -> Dataset:
    return Dataset.from_dict(columns)


def test_ids_of_a_column_keep_their_type() -> None:
    assert pair_ids(data(id=["b", "a"]), "id") == ["b", "a"]
    assert pair_ids(data(id=[7, 3]), "id") == [7, 3]
    assert pair_ids(data(id=["b", "a"]), None) == [0, 1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "Rows 0 and 2 have the same id 'a'"),
        (["a", None], "Row 1 has no id"),
        (["", "b"], "Row 0 has no id"),
        ([0.5, 1.0], r"Row 0 has 0.5; ids must be text or integers"),
        ([True, False], r"Row 0 has True"),
    ],
)
def test_ids_that_are_none(ids: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid pair_id_column: 'id'. {message}"):
        pair_ids(data(id=ids), "id")


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets has no columns of mixed type")
@pytest.mark.parametrize("ids", [["a", "b", 3], [1, 2, "c"]])
def test_ids_are_all_text_or_all_integers(ids: list[Any]) -> None:
    mixed = Dataset.from_dict({"id": ids}, features=datasets.Features(id=datasets.Json()))
    message = f"Row 0 has {ids[0]!r} and row 2 has {ids[2]!r}; ids must be all text or all integers"
    with pytest.raises(ValueError, match=f"Invalid pair_id_column: 'id'. {message}"):
        pair_ids(mixed, "id")


def test_ids_that_no_report_can_hold() -> None:
    large = data(id=np.array([1, 2**63], dtype=np.uint64))
    with pytest.raises(
        ValueError, match="Row 1 has 9223372036854775808; integers must fit 64 bits"
    ):
        pair_ids(large, "id")
    assert pair_ids(data(id=[-(2**63), 2**63 - 1]), "id") == [-(2**63), 2**63 - 1]


def test_rows_are_counted_before_any_was_dropped() -> None:
    kept = drop_rows(data(id=["a", "b", "c", None], w=[1.0, 0.5, -1.0, 1.0]), {0})
    assert pair_ids(kept, None) == [1, 2, 3]
    with pytest.raises(ValueError, match="Row 3 has no id"):
        pair_ids(kept, "id")
    with pytest.raises(ValueError, match=r"Row 2 has -1.0"):
        check_weights(kept, "w")
    joined = datasets.concatenate_datasets([kept, kept])  # of two files: no row number is one
    assert pair_ids(joined, None) == list(range(6))


@pytest.mark.parametrize("check", [pair_ids, check_weights])
def test_missing_columns(check: Any) -> None:
    with pytest.raises(ValueError, match=r"'w'. train_dataset has no such column; found \['x'\]"):
        check(data(x=[1]), "w")


def test_weights_may_be_zero_for_some() -> None:
    assert check_weights(data(w=[0, 2]), "w") == [0.0, 2.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -0.5], "Row 1 has -0.5"),
        ([math.nan, 1.0], "Row 0 has nan"),
        ([1.0, math.inf], "Row 1 has inf"),
        ([1.0, None], "Row 1 has None"),
        (["1", "2"], "Row 0 has '1'"),
        ([0.0, 0.0], "All weights are zero"),
    ],
)
def test_weights_that_are_none(weights: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid pair_weight_column: 'w'. {message}"):
        check_weights(data(w=weights), "w")


def model(size: int | None) -> Any:
    return SimpleNamespace(config=SimpleNamespace(vocab_size=size))


def test_vocabularies() -> None:
    check_vocabulary(model(10), None)
    check_vocabulary(model(10), model(10))
    check_vocabulary(SimpleNamespace(), model(10))  # nothing to compare
    with pytest.raises(ValueError, match="its vocabulary has 12 tokens, that of the model 10"):
        check_vocabulary(model(10), model(12))


def test_vocabularies_that_may_only_be_padded(caplog: pytest.LogCaptureFixture) -> None:
    check_vocabulary(model(10), model(12), strict=False)
    assert "its vocabulary has 12 tokens, that of the model 10" in caplog.text
