"""Thinning keeps what a chart is looked at for; names of logged numbers are understood."""

import math
import random

import pytest

from poprisk_integrations.cli.report.chart import Chart, Line, describe, table_of
from poprisk_integrations.cli.report.curve import Curve, thinned
from poprisk_integrations.cli.report.key_names import parse_key
from poprisk_integrations.cli.report.palette import DARK, LIGHT
from poprisk_integrations.cli.report.plain_text import number, plain, short


@pytest.mark.parametrize("seed", range(5))
def test_minima_and_maxima_stay(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(801, 20000)
    values = [rng.gauss(0, 1) for _ in range(count)]
    values[rng.randrange(count)] = 50.0
    values[rng.randrange(count)] = -50.0
    kept = thinned(Curve(range(count), values), most=800)
    assert kept == sorted(set(kept))
    assert len(kept) <= 800
    assert {0, count - 1} <= set(kept)
    assert max(values[i] for i in kept) == max(values)
    assert min(values[i] for i in kept) == min(values)
    step = count / 100  # a hundredth of the run keeps its own extremes
    for start in range(99):
        part = range(int(start * step), int((start + 2) * step))
        shown = [values[i] for i in kept if i in part]
        assert max(shown) >= max(values[i] for i in list(part)[len(part) // 4 : -len(part) // 4])


def test_a_gap_stays_a_gap() -> None:
    values = [1.0] * 5000
    values[777] = math.nan
    kept = thinned(Curve(range(5000), values), most=100)
    assert 777 in kept
    assert len(kept) <= 100


def test_short_curves_stay_whole() -> None:
    assert thinned(Curve(range(800), [0.0] * 800)) == list(range(800))
    assert thinned(Curve((), ())) == []


@pytest.mark.parametrize(
    ("name", "base", "split", "group", "kind"),
    [
        ("loss", "loss", "train", "", ""),
        ("eval_loss", "loss", "eval", "", ""),
        ("val_loss_epoch", "loss", "eval", "", "epoch"),
        ("train/loss_step", "loss", "train", "", "step"),
        ("test_acc", "acc", "test", "", ""),
        ("eval_other_set_loss", "other_set_loss", "eval", "", ""),
        ("poprisk/onset_step", "poprisk/onset_step", "train", "", ""),
        ("poprisk/2/signal_ratio", "poprisk/signal_ratio", "train", "2", ""),
        ("poprisk/layers/0/mean_gate", "poprisk/mean_gate", "train", "layers/0", ""),
        ("evaluation", "evaluation", "train", "", ""),
        ("", "", "train", "", ""),
        ("a\nb", "a\nb", "train", "", ""),
    ],
)
def test_names(name: str, base: str, split: str, group: str, kind: str) -> None:
    key = parse_key(name)
    assert (key.base, key.split, key.group, key.kind) == (base, split, group, kind)


def test_text_of_files_is_made_harmless() -> None:
    assert plain("a\x00b\ud800\u202ec") == "a\ufffdb\ufffd\ufffdc"
    assert plain("<b>") == "<b>"  # escaping is the page's business
    assert plain("two\nlines") == "two lines"
    assert short("x" * 40, 9) == "xxxx…xxxx"
    assert number(10**400) is None
    assert number("1") is None


def test_a_chart_in_words_and_numbers() -> None:
    train = Line(what="train", curve=Curve((1, 2, 3, 4), (3.0, 5.0, math.nan, 1.0)))
    bad = Line(what="eval", curve=Curve((2,), (math.inf,)), style=1)
    chart = Chart(title="Loss", lines=[train, bad], level=(1.0, "threshold"))
    words = describe(chart)
    assert "train: 3 points, from 3 at step 1 to 1 at step 4, highest 5 at step 2" in words
    assert "1 not finite" in words
    assert "eval: no finite value" in words
    assert "threshold at 1" in words
    columns, rows, is_thinned = table_of(chart)
    assert columns == ["step", "train", "eval"]
    assert rows[1] == ["2", "5", "inf"]
    assert rows[3] == ["4", "1", "-"]
    assert not is_thinned


def _contrast(one: str, two: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    drawn = [name for name in theme if name not in ("page", "card", "line")]
    assert len(drawn) == 9
    for name in drawn:
        for ground in ("page", "card"):
            assert _contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
    assert len(set(theme.values())) == len(theme)
