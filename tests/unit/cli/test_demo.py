"""The demo: text and pairs that leak nothing, metrics by hand, and sentences that say the numbers.

Its options are in tests/goldens/cli/main.txt; a whole quick run is in `test_demo_run`.
"""

import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn, tensor

from poprisk_integrations.cli.demo.corpus import (
    PreferencePair,
    TextWindow,
    cut_windows,
    make_pairs,
    reference_texts,
    split_corpus,
    starts_word,
    train_tokenizer,
)
from poprisk_integrations.cli.demo.findings import Arm, Comparison, Evidence, findings
from poprisk_integrations.cli.demo.job import paired
from poprisk_integrations.cli.demo.runs import DPOTask, ranking_scores
from poprisk_integrations.cli.demo.settings import QUICK
from poprisk_integrations.cli.demo.show import print_results
from poprisk_integrations.cli.main import main

GOLDEN = Path(__file__).parents[2] / "goldens" / "cli" / "demo_quick.json"

# Token 0 goes on with a word, token i > 0 starts one; so documents can count positions.
WORDS = [False] + [True] * 999


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return reference_texts()


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Any:
    return train_tokenizer(texts[:8], 512)


def test_reference_texts_are_plain_lines(texts: list[str]) -> None:
    assert len(texts) > 50
    assert sum(map(len, texts)) > 300_000
    assert all(text.isascii() and text == " ".join(text.split()) for text in texts)
    assert not any(set(word) <= set("*=-~^#") for text in texts for word in text.split())


def test_windows_tile_the_text_and_keep_words_whole() -> None:
    windows = cut_windows(list(range(1, 31)), WORDS, 4, 8)
    assert [window.prompt for window in windows][:2] == [(1, 2, 3, 4), (9, 10, 11, 12)]
    assert windows[0].continuation == tuple(range(5, 13))
    for before, after in pairwise(windows):
        assert before.continuation[-1] + 1 == after.continuation[0]
    tokens = [1, 0, 2, 0, 3, 0, 0, 0, 4, 0, 5, 0, 6]
    for window in cut_windows(tokens, WORDS, 2, 5):
        assert 0 not in (window.prompt[0], window.continuation[0])
        assert len(window.prompt) >= 2
        assert 2.5 <= len(window.continuation) <= 5
    # 3 0 0 0 fits into 5 tokens, 3 0 0 0 4 would break the word 4 0.
    assert cut_windows(tokens, WORDS, 4, 5)[0].continuation == (3, 0, 0, 0)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [0] * 8])
def test_no_window_in_too_short_a_text(tokens: list[int]) -> None:
    assert cut_windows(tokens, WORDS, 4, 8) == []


def test_a_split_shares_no_token_and_follows_the_seed() -> None:
    def split(counts: tuple[int, int] = (5, 6), seed: int = 0) -> list[list[TextWindow]]:
        sizes = replace(QUICK, block_tokens=40, prompt_tokens=4, continuation_tokens=8)
        documents = [list(range(1, 200)), list(range(200, 400))]
        return split_corpus(documents, WORDS, sizes, counts, seed)

    parts = split()
    assert [len(part) for part in parts[:2]] == [5, 6]
    tokens = [{token for w in part for token in w.prompt + w.continuation} for part in parts]
    assert all(tokens)
    assert len(set.union(*tokens)) == sum(map(len, tokens))
    assert split(seed=3) == split(seed=3) != split(seed=4)
    with pytest.raises(ValueError, match="too few windows for 5 and 500"):
        split((5, 500))


def test_tokens_survive_decoding(texts: list[str], tokenizer: Any) -> None:
    """TRL sees text: cut at words, it must give back the tokens of the window."""
    assert train_tokenizer(texts[:8], 512).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == 512
    windows = cut_windows(tokenizer(texts[0])["input_ids"], starts_word(tokenizer), 8, 16)
    assert len(windows) > 10
    for window in windows:
        prompt, human = (tokenizer.decode(part) for part in (window.prompt, window.continuation))
        assert tokenizer(prompt)["input_ids"] == list(window.prompt)
        assert tokenizer(prompt + human)["input_ids"] == [*window.prompt, *window.continuation]


def test_rows_say_what_the_labels_say() -> None:
    pair = PreferencePair(" p", " h", " s")
    assert pair.row() == {"prompt": " p", "chosen": " h", "rejected": " s"}
    swapped = replace(pair, swapped=True)
    assert swapped.row() == {"prompt": " p", "chosen": " s", "rejected": " h"}


def test_a_sample_equal_to_the_human_text_makes_no_pair(tokenizer: Any) -> None:
    tokens = tokenizer(" the value of an object")["input_ids"]
    window = TextWindow(tuple(tokens[:2]), tuple(tokens[2:]))
    other = tokenizer(" a name")["input_ids"]
    (pair,) = make_pairs(tokenizer, [window, window], [tokens[2:], other])
    assert pair.sample == " a name"
    assert pair.prompt + pair.human == " the value of an object"


class Constant(nn.Module):
    """The same next-token distribution everywhere."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        assert not use_cache
        assert attention_mask.shape == input_ids.shape

        class Output:
            logits = self.logits.expand(*input_ids.shape, -1)

        return Output


def test_a_measurement_by_hand(tokenizer: Any) -> None:
    """A uniform reference, and a policy that triples the odds of one word's tokens.

    The continuation and its end count: log ratio = tokens * gain + hits * log 3 + log 2.
    """
    size = len(tokenizer)
    pairs = [
        PreferencePair(" the", " value value", " name"),
        PreferencePair(" an", " of", " value of a", swapped=True),
        PreferencePair(" an", " name", " name"),
    ]
    value, end = tokenizer(" value")["input_ids"], tokenizer.eos_token_id
    boosted = torch.zeros(size)
    boosted[end] = math.log(2.0)
    boosted[value] = math.log(3.0)
    settings = replace(QUICK, beta=0.5)
    reference: Any = Constant(torch.zeros(size)).train()
    task = DPOTask(reference, tokenizer, pairs, pairs, settings)
    assert reference.training
    point, scores = task.measure(Constant(boosted), 7)
    gain = math.log(size) - float(boosted.exp().sum().log())  # of any token that is not boosted
    ratios = []
    for pair in pairs:
        for text in (pair.human, pair.sample):
            ids = tokenizer(text)["input_ids"]
            hits = sum(token in value for token in ids)
            ratios.append((len(ids) + 1) * gain + hits * math.log(3.0) + math.log(2.0))
    assert task.heldout.log_ratios(Constant(boosted)).flatten().tolist() == pytest.approx(
        ratios, abs=1e-4
    )
    assert scores.tolist() == [1.0, 0.0, 0.5]
    assert (point.step, point.accuracy) == (7, 0.5)
    assert (point.swapped_fitted, point.clean_fitted) == (1.0, 0.75)
    assert point.drift == pytest.approx(0.5 * sum(map(abs, ratios)) / 6, rel=1e-4)


def test_ranking_scores_and_paired_differences() -> None:
    ratios = tensor([[0.5, -0.5], [-1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    assert ranking_scores(ratios).tolist() == [1.0, 0.0, 0.5, 1.0]
    # differences 1 0 0 -1 1: mean 0.2, variance 0.7
    first, second = tensor([1.0, 1.0, 0.0, 0.0, 1.0]), tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    found = paired(first, second)
    assert found.difference == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(math.sqrt(0.7 / 5))
    assert paired(first, first) == Comparison(0.0, 0.0)


@pytest.mark.parametrize(
    ("difference", "error", "verdict"),
    [(0.041, 0.02, "ahead"), (0.04, 0.02, "level"), (0.0, 0.0, "level"), (-0.04, 0.02, "level"),
     (-0.041, 0.02, "behind")],
)  # fmt: skip
def test_verdict_at_two_standard_errors(difference: float, error: float, verdict: str) -> None:
    assert Comparison(difference, error).verdict == verdict


# What the sentences say of what the numbers say, losses included.

RATES = (3e-5, 1e-4, 3e-4)
WON, LOST, LEVEL = Comparison(0.08, 0.02), Comparison(-0.08, 0.02), Comparison(0.01, 0.02)


def arm(optimizer: str, rate: float, accuracy: float, **changes: object) -> Arm:
    values: dict[str, object] = {
        "stop": False,
        "steps": 100,
        "stopped": False,
        "accuracy_se": 0.015,
        "swapped_fitted": 0.99,
        "clean_fitted": 1.0,
        "drift": 0.4,
        "peak_accuracy": 0.90,
        "peak_step": 20,
    }
    return Arm(optimizer, learning_rate=rate, accuracy=accuracy, **{**values, **changes})


def evidence(
    gate: tuple[float, ...] = (0.88, 0.88, 0.88),
    adamw: tuple[float, ...] = (0.87, 0.80, 0.75),
    at: tuple[Comparison, ...] = (LEVEL, WON, WON),
    best: Comparison = LEVEL,
    stops: Mapping[tuple[str, float], Comparison] | None = None,
    gate_changes: Mapping[str, object] | None = None,
    quick: bool = False,
    not_armed: int = 0,
) -> Evidence:
    arms = []
    for index, rate in enumerate(RATES):
        arms.append(arm("AdamW", rate, adamw[index], drift=0.1 * (index + 1)))
        changes = {"swapped_fitted": 0.4, "drift": 0.12, **(gate_changes or {})}
        arms.append(arm("PopRiskAdamW", rate, gate[index], **changes))
    ends = {(arm.optimizer, arm.learning_rate): arm.accuracy for arm in arms}
    for optimizer, rate in stops or {}:
        said = "probably memorising: the rest (F = 0.9 +- 0.08)"
        changed = {"stop": True, "stopped": True, "steps": 60, "finding": said}
        arms.append(arm(optimizer, rate, ends[optimizer, rate], **changed))

    def compare(first: Arm, second: Arm) -> Comparison:
        if first.stop:
            return (stops or {})[first.optimizer, first.learning_rate]
        same = first.learning_rate == second.learning_rate
        return at[RATES.index(first.learning_rate)] if same else best

    return Evidence(arms, 1e-4, compare, not_armed, quick)


GATE_LOSES = {
    "gate": (0.70, 0.72, 0.79),
    "adamw": (0.85, 0.88, 0.80),
    "at": (LOST, LOST, LEVEL),
    "best": LOST,
}
TIE = {"gate": (0.8, 0.8, 0.8), "adamw": (0.8, 0.81, 0.8), "at": (LEVEL, LEVEL, LEVEL)}
# What is special about the numbers, which paragraph, what it says and what nobody may say.
SAID: list[tuple[dict[str, Any], int, list[str], str]] = [
    ({}, 0, ["PopRiskAdamW 88.0 % of the clean held-out pairs, AdamW 80.0 %",
             "PopRiskAdamW is ahead by 8.0 points (standard error 2.0 points)"], "behind"),
    ({}, 1, ["AdamW 87.0 % (3e-05)", "That is level",
             "varies by 0.0 points for PopRiskAdamW and by 12.0 points for AdamW",
             "the gain is robustness to the learning rate, not a better optimum"], "tuned"),
    ({"at": (WON, WON, WON)}, 1, ["ahead even of AdamW at its best rate"], "not a better optimum"),
    (GATE_LOSES, 0, ["PopRiskAdamW is behind by 8.0 points"], "robustness"),
    (GATE_LOSES, 1, ["with a tuned learning rate AdamW is the better choice here"], "only"),
    ({"at": (LOST, WON, WON)}, 1,
     ["better choice here; PopRiskAdamW only spares some of the tuning"], "#"),
    (TIE, 0, ["That is level: the difference of 1.0 points"], "robustness"),
    (TIE, 1, ["this run shows no advantage of PopRiskAdamW in accuracy"], "robustness"),
    ({"gate_changes": {"peak_accuracy": 0.90}}, 2, ["AdamW needs no gate"], "higher"),
    ({"gate_changes": {"peak_accuracy": 0.95}}, 2, ["PopRiskAdamW's is higher"], "needs no gate"),
    ({"gate_changes": {"peak_accuracy": 0.85}}, 2, ["better without the gate"], "needs no gate"),
    # AdamW at 3e-5 has drift 0.1, next to the gate's 0.12.
    ({}, 3, ["leaves wrong labels unfitted while it fits the right ones",
             "AdamW at 3e-05: drift 0.10 against 0.12", "AdamW has 87.0 % against 88.0 %"], "#"),
    ({"gate_changes": {"clean_fitted": 0.8}}, 3, ["fits less of both"], "unfitted"),
    ({"gate_changes": {"swapped_fitted": 0.97}}, 3, ["does not keep the wrong"], "less"),
    ({}, 4, ["ended none of the 6 runs", "too short"], "armed"),
    ({"not_armed": 6}, 4, ["In 6 of them the gradients never agreed"], "too short"),
    ({"stops": {("AdamW", 3e-4): WON}}, 4,
     ["ended 1 of the 6 runs: AdamW 0.0003 at step 60 of 100", "It helped in 1 and hurt in 0",
      "AdamW 0.0003 was probably memorising: the rest (F = 0.9 +- 0.08).",
      "the best moment had passed"], "by more than noise"),  # 0.90 against 0.75
    ({"stops": {("PopRiskAdamW", 3e-4): LOST}}, 4, ["It helped in 0 and hurt in 1"],
     "the best moment had passed"),  # 0.90 against 0.88
    ({"stops": {("AdamW", 3e-4): LEVEL}}, 4, ["changed no accuracy by more than noise"], "helped"),
    ({}, 5, ["one seed of one very small model", "standard error of 1.5 points"], "mean little"),
    ({"quick": True}, 5, ["numbers mean little"], "#"),
]  # fmt: skip


@pytest.mark.parametrize(("numbers", "place", "said", "unsaid"), SAID)
def test_sentences(numbers: dict[str, Any], place: int, said: list[str], unsaid: str) -> None:
    text = findings(evidence(**numbers))[place]
    assert all(words in text for words in said)
    assert unsaid not in text


def test_best_arm_ignores_the_stop_and_prefers_less_drift() -> None:
    found = evidence(adamw=(0.8, 0.8, 0.7))  # drift 0.1, 0.2, 0.3
    found = replace(found, arms=[*found.arms, arm("AdamW", 3e-4, 0.9, stop=True)])
    assert found.best("AdamW") == arm("AdamW", 3e-5, 0.8, drift=0.1)


def test_table_fits_eighty_columns() -> None:
    case = evidence(stops={("AdamW", 3e-4): WON})
    console = Console(width=80, file=io.StringIO())
    print_results(console, "title", case.arms, 1e-4, ["first finding", "second finding"])
    text = console.file.getvalue()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "\u2026" not in text  # nothing cut
    assert "0.0001*" in text
    assert text.count("PopRiskAdamW") == 3
    assert "ended it" in text
    assert "second finding" in text


def shape(value: Any) -> Any:
    """Keys, and the types of what is not counted: figures of a run differ between machines."""
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shape(entry) for entry in value]
    return type(value).__name__ if isinstance(value, (str, float)) else value


@pytest.mark.slow
def test_demo_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it was when the golden was written: all keys, counts and settings, and near figures."""
    out = tmp_path / "new" / "demo"
    assert main(["demo", "--quick", "--json", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    record, expected = json.loads(captured.out), json.loads(GOLDEN.read_text())
    assert "[ 37 %] DPO, all runs" in captured.err
    assert record.pop("seconds").keys() == expected.pop("seconds").keys()
    for one in (record, expected):
        del one["environment"], one["findings"], one["comparisons"]
    assert record["settings"] == expected["settings"]
    assert record["data"]["example"] == expected["data"]["example"]
    assert shape(record) == shape(expected)
    for arm, before in zip(record["arms"], expected["arms"], strict=True):
        assert arm["accuracy"] == pytest.approx(before["accuracy"], abs=0.1)
    assert json.loads((out / "results.json").read_text())["runs"] == record["runs"]
    assert sorted(path.name for path in out.iterdir()) == ["report.png", "results.json"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
