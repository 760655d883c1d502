"""Which data, models and directories are usable; the words of refusals are among the goldens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from poprisk_integrations.trl.pair_scan import PairScan, scan_pairs
from poprisk_integrations.trl.validation import (
    check_output_dir,
    check_preferences,
    check_vocabulary,
)
from tests.helpers.tiny_dpo import pairs


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


CONVERSATION = {
    "prompt": [[{"role": "user", "content": "hi"}]],
    "chosen": [message("a")],
    "rejected": [message("b")],
}
USABLE: dict[str, Dataset] = {
    "explicit prompt": pairs(8),
    "implicit prompt": pairs(8).remove_columns("prompt"),
    "empty prompt text": Dataset.from_list([{**pairs(1)[0], "prompt": ""}]),
    "formatted": pairs(8).with_format("numpy"),
    "conversations": Dataset.from_dict(CONVERSATION),
    "tokenized": Dataset.from_dict(
        {"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]}
    ),
    "made on the fly": pairs(2).select_columns("prompt").with_transform(lambda batch: batch),
}


@pytest.mark.parametrize("data", USABLE)
def test_usable_data_pass(data: str) -> None:
    scan = check_preferences(USABLE[data])
    assert (scan.empty, scan.identical) == ([], [])


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
        {"prompt": "x", "chosen": one, "rejected": message("")},  # nor here
    ]
    expected = PairScan(empty=[7], identical=[6], repeated=2, both_ways=1)
    assert scan_pairs(Dataset.from_list(rows)) == expected


def test_what_trl_trains_on_is_only_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = {"chosen": ["a", "", "c"], "rejected": ["a", "b", "d"]}
    scan = check_preferences(Dataset.from_dict(data), "my_data", strict=False)
    assert (scan.empty, scan.identical) == ([1], [0])
    assert "my_data has 1 row (first: row 1) with an empty" in caplog.text
    assert "my_data has 1 row (first: row 0) whose chosen and rejected are the same" in caplog.text


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
    for path, needed in ((tmp_path / "run", False), (tmp_path, True)):  # Trainer makes the first
        with pytest.raises(PermissionError, match="no permission to write"):
            check_output_dir(path, needed=needed)
    check_output_dir(tmp_path, needed=False)


def model(size: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(vocab_size=size))


def test_vocabularies(caplog: pytest.LogCaptureFixture) -> None:
    check_vocabulary(model(10), None)
    check_vocabulary(model(10), model(10))
    check_vocabulary(SimpleNamespace(), model(10))  # nothing to compare
    assert not caplog.text
    words = "its vocabulary has 12 tokens, that of the model 10"
    with pytest.raises(ValueError, match=words):
        check_vocabulary(model(10), model(12))
    check_vocabulary(model(10), model(12), strict=False)  # they may only be padded
    assert words in caplog.text
