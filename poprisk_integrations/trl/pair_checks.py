"""What is wrong with preference pairs, before any training: findings, each with its first rows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
from datasets import Dataset

from poprisk_integrations.core.calibration import wilson_interval
from poprisk_integrations.trl.annotators import (
    Annotator,
    RepeatedLabels,
    compare_annotators,
    repeated_labels,
)
from poprisk_integrations.trl.pair_scan import PairScan, is_scannable, scan_pairs
from poprisk_integrations.trl.pair_tokens import TRUNCATION_MODES, TokenScan, scan_tokens
from poprisk_integrations.trl.pairs import source_rows

__all__ = ["Finding", "LengthBias", "PairCheck", "check_pairs", "label_findings", "token_findings"]

Level = Literal["fix", "warn", "note"]

SHOWN_ROWS = 5
_DESTROYED = "to the tokenizer both answers are the same, or one is unknown"
# A share of longer chosen answers that is surely above it, of so many pairs, is worth a warning.
_LENGTH_BIAS, _FEWEST_LENGTHS = 0.6, 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: A word to look for in the JSON.
        level: "fix" (nothing can be learned from these pairs), "warn", or "note".
        text: What these pairs are.
        count: How many pairs.
        total: Of how many that were looked at.
        rows: The first few of them, numbered from 0 as in the data that were read.
        advice: What to do about it.
    """

    name: str
    level: Level
    text: str
    count: int
    total: int
    rows: tuple[int, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        """One line for people."""
        line = f"{self.count:,} of {self.total:,} pairs: {self.text}"
        return f"{line} ({self.shown_rows})" if self.rows else line

    @property
    def shown_rows(self) -> str:
        """The rows as text."""
        more = ", ..." if self.count > len(self.rows) else ""
        noun = "row" if len(self.rows) == 1 and not more else "rows"
        return f"{noun} {', '.join(map(str, self.rows))}{more}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthBias:
    """How often the chosen answer is the longer one.

    Attributes:
        share: Of the pairs whose answers differ in length (characters); copies count once.
        low: Lower end of its 95 % interval.
        high: Upper end.
        num_pairs: How many these are.
    """

    share: float
    low: float
    high: float
    num_pairs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCheck:
    """All that `check_pairs` found.

    Attributes:
        num_pairs: Rows of the data.
        findings: Those to fix first, then warnings, then notes.
        length: None if no two answers differ in length.
        repeated: None if no pair is labelled twice.
        annotator_column: The column that tells the annotators; None if there is none.
        annotators: Those who stand out first.
        max_length: With which the tokens were looked at; None without tokenizer, or for no limit.
        longest: Tokens of the longest prompt with its answer; None without tokenizer.
    """

    num_pairs: int
    findings: tuple[Finding, ...]
    length: LengthBias | None
    repeated: RepeatedLabels | None
    annotator_column: str | None
    annotators: tuple[Annotator, ...]
    max_length: int | None = None
    longest: int | None = None

    @property
    def must_fix(self) -> bool:
        """Whether there are pairs from which nothing can be learned."""
        return any(finding.level == "fix" for finding in self.findings)

    @property
    def advice(self) -> str:
        """What to do next, in one sentence: about the most severe finding."""
        for finding in self.findings:
            if finding.advice and finding.level != "note":
                return finding.advice
        return "nothing to fix; train: poprisk dpo --config CONFIG.yaml"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "must_fix": self.must_fix, "advice": self.advice}

    def __str__(self) -> str:
        """One line for each finding."""
        lines = [f"{finding.level}: {finding}" for finding in self.findings]
        return "\n".join(lines or [f"{self.num_pairs:,} pairs, nothing found"])


def check_pairs(
    dataset: Dataset,
    *,
    annotator_column: str | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    progress: Callable[[int], Any] | None = None,
) -> PairCheck:
    """Look at preference pairs before any training.

    One pass over the texts, of which hashes are kept; with a tokenizer a second one.

    Args:
        dataset: Map-style pairs in one of TRL's formats: text or conversations, with a prompt or
            with it as the common start of both answers.
        annotator_column: Who labelled each pair; None to look for a column of a usual name.
        tokenizer: A tokenizer of transformers, to see what it makes of the texts.
        max_length: Tokens of prompt and answer that TRL is to keep; None for all.
        truncation_mode: TRL's: "keep_start" or "keep_end".
        progress: Is told how many pairs are done, in each pass anew.

    Raises:
        ValueError: If the data are streamed, hold tokens instead of texts, or have no such columns;
            if an argument is not one of those above.

    Example:
        >>> rows = {"prompt": ["1 + 1?"] * 3, "chosen": ["2", "2", ""], "rejected": ["3", "3", "4"]}
        >>> check = check_pairs(Dataset.from_dict(rows))
        >>> [(finding.name, finding.rows) for finding in check.findings]
        [('empty', (2,)), ('copies', (1,))]
        >>> check.must_fix
        True
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Invalid dataset: {type(dataset).__name__}. It must be a datasets.Dataset: streamed "
            "pairs cannot be compared with one another."
        )
    if not is_scannable(dataset):
        raise ValueError(
            "Invalid dataset: it holds tokens, or makes its rows on the fly (set_transform). It "
            "must have the texts, as columns 'chosen' and 'rejected'."
        )
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(
            f"Invalid truncation_mode: {truncation_mode!r}. Must be one of {TRUNCATION_MODES}."
        )
    if max_length is not None and (max_length < 1 or tokenizer is None):
        needed = "Must be >= 1" if max_length < 1 else "It counts tokens: give a tokenizer"
        raise ValueError(f"Invalid max_length: {max_length}. {needed}.")
    scan = scan_pairs(dataset, "dataset", annotator_column=annotator_column, progress=progress)
    rows = source_rows(dataset)
    findings = _unusable_findings(scan, rows) + label_findings(scan, len(dataset))
    tokens = None
    if tokenizer is not None:
        tokens = scan_tokens(
            dataset,
            tokenizer,
            max_length=max_length,
            truncation_mode=truncation_mode,
            without={*scan.empty, *scan.identical},
            progress=progress,
        )
        findings += token_findings(tokens, rows, max_length)
    return PairCheck(
        num_pairs=len(dataset),
        findings=tuple(sorted(findings, key=lambda f: ("fix", "warn", "note").index(f.level))),
        length=_length_bias(scan.labels),
        repeated=repeated_labels(scan.labels),
        annotator_column=scan.annotator_column,
        annotators=tuple(compare_annotators(scan.labels)),
        max_length=max_length,
        longest=None if tokens is None else tokens.longest,
    )


def _unusable_findings(scan: PairScan, rows: Sequence[int]) -> list[Finding]:
    empty = sorted(scan.empty + scan.unanswered)
    advice = "leave these rows out (in a config of `poprisk dpo`: drop_unusable_pairs: true)"
    return [
        _finding(name, "fix", text, places, rows, len(rows), advice)
        for name, text, places in (
            ("empty", "prompt, chosen or rejected is empty", empty),
            ("identical", "chosen and rejected are the same", scan.identical),
        )
        if places
    ]


def label_findings(scan: PairScan, total: int) -> list[Finding]:
    """What the labels of a scan of `total` pairs show: warnings and notes."""
    labels, found = scan.labels, []
    by_whom = ["annotator"] if scan.annotator_column else []
    copies = labels["row"][labels.duplicated(["key", "direction", *by_whom])].tolist()
    if copies:
        advice = (
            "leave copies out: they count double, and a copy of a pair that is held out or sits "
            "out makes its loss look too good"
        )
        text = "the same pair and label as an earlier row"
        found.append(_finding("copies", "warn", text, copies, None, total, advice))
    distinct = labels.drop_duplicates(["key", "direction"])
    contrary = distinct["row"][distinct.duplicated("key")].tolist()
    if contrary:
        advice = "look at the pairs that are labelled both ways: one of the two labels is wrong"
        text = "labelled the other way in an earlier row"
        found.append(_finding("both_ways", "warn", text, contrary, None, total, advice))
    repeated = repeated_labels(labels)
    if repeated is not None and (contrary or repeated.by_annotators):
        text = f"labelled more than once; {_rate_text(repeated)}"
        level: Level = "warn" if contrary else "note"
        found.append(_finding("repeated_labels", level, text, repeated.num_pairs, None, total))
    for annotator in compare_annotators(labels):
        if annotator.stands_out:
            rows = labels["row"][labels["annotator"] == annotator.name].tolist()
            advice = (
                f"look at the labels of {scan.annotator_column} {annotator.name!r}, and leave them "
                "out or have them labelled again if they are wrong"
            )
            text = f"of {scan.annotator_column} {annotator.name!r}, who {_habit(annotator)}"
            found.append(_finding("annotator", "warn", text, rows, None, total, advice))
    length = _length_bias(labels)
    if length is not None:
        is_sure = length.low > _LENGTH_BIAS or length.high < 1 - _LENGTH_BIAS
        other = "shorter" if length.share > 0.5 else "longer"
        advice = (
            f"look at some pairs, those whose {other} answer is chosen first: a model learns the "
            "length where it tells the label"
        )
        share, low, high = map(_percent, (length.share, length.low, length.high))
        text = (
            f"different lengths; the chosen answer is the longer one in {share} (95 % interval "
            f"{low} to {high})"
        )
        level = "warn" if is_sure and length.num_pairs >= _FEWEST_LENGTHS else "note"
        found.append(_finding("length", level, text, length.num_pairs, None, total, advice))
    return found


def token_findings(
    scan: TokenScan, rows: Sequence[int], max_length: int | None = None
) -> list[Finding]:
    """What a tokenizer and `max_length` do to pairs; `rows` are the numbers of all places."""
    longer = f"raise max_length (the longest pair has {scan.longest:,} tokens), or leave these out"
    other = "use a tokenizer that knows these texts; Unicode or a language may be new to it"
    limit = f"max_length {max_length}"
    kinds: tuple[tuple[str, Level, str, str], ...] = (
        ("destroyed", "fix", _DESTROYED, other),
        ("emptied", "fix", f"the prompt alone fills {limit}: no token of an answer", longer),
        ("made_equal", "fix", f"what {limit} leaves of both answers is the same", longer),
        ("unknown", "warn", "some text is unknown to the tokenizer", other),
        (
            "boundary",
            "warn",
            "the prompt's last token changes once an answer follows it",
            "end prompts where a token ends (a space belongs to the answer), or use a chat "
            "template that writes the prompt the same way with and without answer",
        ),
        ("without_prompt", "warn", f"nothing of the prompt is left within {limit}", longer),
        ("cut", "note", f"an answer is cut at {limit}", ""),
    )
    return [
        _finding(name, level, text, getattr(scan, name), rows, scan.looked_at, advice)
        for name, level, text, advice in kinds
        if getattr(scan, name)
    ]


def _finding(
    name: str,
    level: Level,
    text: str,
    places: Sequence[int] | int,
    numbers: Sequence[int] | None,
    total: int,
    advice: str = "",
) -> Finding:
    """`places` are looked up in `numbers`, or are row numbers themselves, or a mere count."""
    first: Sequence[int] = () if isinstance(places, int) else places[:SHOWN_ROWS]
    return Finding(
        name=name,
        level=level,
        text=text,
        count=places if isinstance(places, int) else len(places),
        total=total,
        rows=tuple(first if numbers is None else (numbers[place] for place in first)),
        advice=advice,
    )


def _rate_text(repeated: RepeatedLabels) -> str:
    if repeated.rate is None:
        return f"two labels differ in {_percent(repeated.disagreement)}, which tells no noise rate"
    condition = "" if repeated.by_annotators else "if no label is a copy of another, "
    return (
        f"{condition}{_percent(repeated.rate, 1)} of single labels are wrong (95 % interval "
        f"{_percent(repeated.low, 1)} to {_percent(repeated.high, 1)})"
    )


def _percent(share: float | None, digits: int = 0) -> str:
    return f"{100 * (share or 0.0):.{digits}f} %"


def _habit(annotator: Annotator) -> str:
    differs = _percent(annotator.disagreement)
    others = _percent(annotator.disagreement_without)
    longer = f"prefers the longer answer in {_percent(annotator.prefers_longer)}"
    habits = {
        "disagrees": f"differs from the others in {differs}, they among themselves in {others}",
        "prefers longer": longer,
        "prefers shorter": f"{longer} only",
    }
    return " and ".join(habits[habit] for habit in annotator.stands_out)


def _length_bias(labels: pd.DataFrame) -> LengthBias | None:
    distinct = labels.drop_duplicates(["key", "direction"])
    unequal = distinct["longer"][distinct["longer"] != 0]
    if not len(unequal):
        return None
    longer, count = int((unequal > 0).sum()), len(unequal)
    low, high = wilson_interval(longer / count, count)
    return LengthBias(share=longer / count, low=low, high=high, num_pairs=count)
