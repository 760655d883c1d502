"""Each kind of unusable data gives one line that counts the rows and names the first."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from poprisk_integrations.trl.validation import (
    PairScan,
    check_output_dir,
    check_preferences,
    scan_pairs,
)
from tests.helpers.tiny_dpo import pairs


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def changed(index: int, **columns: Any) -> Dataset:
    """The helper's pairs with some values of one row replaced."""
    rows = list(pairs(8))
    rows[index] = {**rows[index], **columns}
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "dataset",
    [
        pytest.param(pairs(8), id="explicit prompt"),
        pytest.param(pairs(8).remove_columns("prompt"), id="implicit prompt"),
        pytest.param(changed(2, prompt=""), id="empty prompt text"),
        pytest.param(pairs(8).with_format("numpy"), id="formatted"),
        pytest.param(
            Dataset.from_dict(
                {
                    "prompt": [[{"role": "user", "content": "hi"}]],
                    "chosen": [message("a")],
                    "rejected": [message("b")],
                }
            ),
            id="conversations",
        ),
        pytest.param(
            Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]}),
            id="tokenized",
        ),
    ],
)
def test_usable_data_pass(dataset: Dataset) -> None:
    check_preferences(dataset)


def test_missing_columns() -> None:
    with pytest.raises(
        ValueError, match=r"train_dataset has no column 'rejected'.*found.*'chosen'"
    ):
        check_preferences(pairs(8).remove_columns("rejected"))
    with pytest.raises(ValueError, match="no column 'chosen' and no column 'rejected'"):
        check_preferences(pairs(8).select_columns("prompt"))


@pytest.mark.parametrize(
    "columns",
    [{"chosen": ""}, {"rejected": "  \n"}, {"chosen": None}, {"prompt": None}],
)
def test_empty_rows(columns: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"my_data has 1 row \(first: row 5\) with an empty"):
        check_preferences(changed(5, **columns), "my_data")


@pytest.mark.parametrize("empty", [[], message("")])
def test_empty_conversations(empty: list[dict[str, str]]) -> None:
    data = {"chosen": [message("a"), message("a")], "rejected": [message("b"), empty]}
    with pytest.raises(ValueError, match=r"1 row \(first: row 1\) with an empty"):
        check_preferences(Dataset.from_dict(data))


def test_completions_that_are_not_text() -> None:
    data = {"chosen": [1, 2], "rejected": ["a", "b"]}
    with pytest.raises(ValueError, match=r"row 0: chosen and rejected must be text or .* not int"):
        check_preferences(Dataset.from_dict(data))


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (["a"], "chosen and rejected must be text or lists of messages, not lists of str"),
        (
            [{"from": "gpt", "value": "a"}],
            r"needs 'role' and 'content', and has \['from', 'value'\]",
        ),
    ],
)
def test_lists_that_are_no_conversations(completion: list[Any], message: str) -> None:
    data = Dataset.from_dict({"chosen": [completion], "rejected": [completion]})
    with pytest.raises(ValueError, match=f"my_data row 0: .*{message}"):
        check_preferences(data, "my_data", strict=False)


def test_copies_and_contradictions_are_counted() -> None:
    one, other = message("a"), message("b")
    rows = [
        {"prompt": "x", "chosen": one, "rejected": other},
        {"prompt": "x", "chosen": one, "rejected": other},  # a copy
        {"prompt": "y", "chosen": other, "rejected": one},  # of another prompt
        {"prompt": "x", "chosen": other, "rejected": one},  # contradicts the first two
        {"prompt": "x", "chosen": other, "rejected": one},  # a copy
        {"prompt": "x", "chosen": one, "rejected": message("c")},
        {"prompt": "x", "chosen": one, "rejected": one},  # no preference at all
    ]
    scan = scan_pairs(Dataset.from_list(rows))
    assert (scan.repeated, scan.both_ways, scan.identical) == (2, 1, [6])


def test_what_trl_trains_on_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = {"chosen": ["a", "", "c"], "rejected": ["a", "b", "d"]}
    scan = check_preferences(Dataset.from_dict(data), strict=False)
    assert (scan.empty, scan.identical) == ([1], [0])
    assert "1 row (first: row 1) with an empty" in caplog.text
    assert "1 row (first: row 0) whose chosen and rejected are the same" in caplog.text


def test_data_made_on_the_fly_are_not_looked_at() -> None:
    made = pairs(2).select_columns("prompt").with_transform(lambda batch: batch)
    assert scan_pairs(made) == PairScan()


def test_identical_completions_are_counted() -> None:
    data = {"chosen": ["a", "b", "c", "d"], "rejected": ["x", "b", "y", "d"]}
    with pytest.raises(ValueError, match=r"2 rows \(first: row 1\) whose chosen and rejected"):
        check_preferences(Dataset.from_dict(data))


def test_identical_conversations() -> None:
    data = {"chosen": [message("a")], "rejected": [message("a")]}
    with pytest.raises(ValueError, match="are the same"):
        check_preferences(Dataset.from_dict(data))


def test_output_dir(tmp_path: Path) -> None:
    check_output_dir(tmp_path)
    check_output_dir(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "run"):
        with pytest.raises(NotADirectoryError, match=r"output_dir '.*file' is not a directory"):
            check_output_dir(path)


def test_output_dir_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="no permission to write"):
        check_output_dir(tmp_path / "run", needed=False)  # Trainer makes it in any case
    with pytest.raises(PermissionError, match="no permission to write"):
        check_output_dir(tmp_path)
    check_output_dir(tmp_path, needed=False)
