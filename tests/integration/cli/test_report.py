"""`poprisk report`: what it prints and writes, and that bad input leaves nothing behind."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from poprisk_integrations.cli.main import main
from tests.browser.made_up_run import write_dpo_run, write_lightning_run, write_stop


def names(directory: Path, *suffixes: str) -> list[str]:
    """Files with one of these endings, one of which may stand before the last."""
    return sorted(p.name for p in directory.rglob("*") if set(p.suffixes) & set(suffixes))


def test_line_picture_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_dpo_run(tmp_path / "run", 200, 2)
    assert main(["report", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = "stopped at step 200: made up (F = 0.9 < 1); very probably memorising: "
    assert lines[0].startswith(said)
    assert lines[1:] == [
        str(run / "poprisk_stop.png"),
        str(run / "poprisk_report.png"),
        str(run / "poprisk_report.html"),
    ]
    assert all(Path(line).stat().st_size > 20_000 for line in lines[1:])
    assert (run / "poprisk_report.png").read_bytes().startswith(b"\x89PNG")
    assert not names(tmp_path, ".tmp")


def test_a_run_without_a_stop_has_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(write_lightning_run(tmp_path))]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "The log ends at step 39."
    assert names(tmp_path, ".png", ".html") == ["poprisk_report.html", "poprisk_report.png"]
    assert main(["report", str(tmp_path)]) == 0  # its own files are no logs


def test_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_lightning_run(tmp_path / "run")
    write_stop(run)
    before = names(run, ".png", ".html")
    (tmp_path / "out").mkdir()
    assert main(["report", str(run), "--out", str(tmp_path / "out" / "x.html")]) == 0
    assert names(tmp_path / "out", ".png", ".html") == ["x.html", "x.png", "x_stop.png"]
    assert main(["report", str(run), "--out", str(tmp_path / "y.png")]) == 0
    assert names(run, ".png", ".html") == before == []
    assert (tmp_path / "y.png").stat().st_size > 20_000
    capsys.readouterr()
    for out in ("no/x.html", "x.pdf", "out"):
        assert main(["report", str(run), "--out", str(tmp_path / out)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first one's name would be mathematics, and bad mathematics, to matplotlib."""
    one, two = (write_lightning_run(tmp_path / name) for name in ("$x^{$ \U0001f600", "b"))
    write_stop(one)
    write_stop(two)
    assert main(["report", str(one), str(two)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == [one.name, "b"]
    assert names(one, ".html") == ["poprisk_comparison.html"]
    assert names(two, ".html") == []
    assert names(two, ".png") == ["poprisk_stop.png"]
    for runs, said in (([one, one], "given twice"), ([tmp_path] * 9, "9 of them")):
        assert main(["report", *map(str, runs)]) == 2
        assert said in capsys.readouterr().err


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write_lightning_run(tmp_path / name) for name in "ab")
    report = write_stop(one)
    report["history"][0]["noise"] = float("nan")
    (one / "poprisk_stop.json").write_text(json.dumps(report))
    assert main(["report", str(one), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    report["history"][0]["noise"] = None
    assert found.items() >= report.items()  # as before there was a page
    assert found["page"] == str(one / "poprisk_report.html")
    assert found["figures"]["stop"] == "39"
    assert main(["report", str(one), str(two), "--json"]) == 0
    both = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [run["headline"][:7] for run in both["runs"]] == ["Stopped", "The log"]


@pytest.mark.parametrize("content", ["", "{half", '{"log_history": 3}'])
def test_bad_input_is_one_line_and_leaves_nothing(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_lightning_run(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "trainer_state.json").write_text(content)
    for runs in (["bad"], ["good", "bad"], ["none"], ["bad/trainer_state.json"]):
        assert main(["report", *(str(tmp_path / run) for run in runs)]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert err.startswith("poprisk: Invalid run_dir")
    assert names(tmp_path, ".png", ".html", ".tmp") == []
    assert names(good, ".csv") == ["metrics.csv"]


def test_odd_numbers_in_a_report(tmp_path: Path) -> None:
    rows = [{"step": 4, "signal_ratio": "2", "agreement": [1]}, {"step": 8, "signal_ratio": 1.5}]
    report = {"reason": ["x"], "history": rows, "onset_step": "4", "settings": [1]}
    (tmp_path / "poprisk_stop.json").write_text(json.dumps(report))
    assert main(["report", str(tmp_path)]) == 0


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_lightning_run(tmp_path)
    (run / "poprisk_report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(os, "replace", full)
    assert main(["report", str(run)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert (run / "poprisk_report.html").read_text() == "old"
    assert names(run, ".png", ".tmp") == []


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    """In a process of its own, whose every `open` is seen."""
    run = write_lightning_run(tmp_path / "run")
    (run / "checkpoint-100").mkdir()
    (run / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    (run / "training_args.bin").write_bytes(b"x")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-100" / name).write_bytes(b"x")
    code = (
        "import sys; seen = []\n"
        "see = lambda event, args: seen.append(str(args[0])) if event == 'open' else None\n"
        "sys.addaudithook(see)\n"
        "from poprisk_integrations.cli.main import main\n"
        f"assert main(['report', {str(run)!r}]) == 0\n"
        f"print('SEEN', *[p for p in seen if p.startswith({str(tmp_path)!r})], sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    seen = {Path(p).name for p in done.stdout.partition("SEEN")[2].splitlines() if p}
    assert "trainer_state.json" in seen
    assert not {name for name in seen if re.search(r"\.(bin|pt|pth|ckpt|pkl|safetensors)$", name)}


def test_a_long_run_stays_small_and_quick(tmp_path: Path) -> None:
    """10,000 steps, all keys logged every 10: the page is under 3 MB.

    The bound on CPU time is generous: 4 to 5 s on an idle core.
    """
    run = write_dpo_run(tmp_path / "run", 10_000, 10, groups=24)
    start = time.process_time()
    assert main(["report", str(run)]) == 0
    assert time.process_time() - start < 30
    assert (run / "poprisk_report.html").stat().st_size < 3_000_000


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_an_error_of_writing_names_the_file_that_was_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["report", "--playground", "--out", "/proc/self/x.html"]) == 2
    error = capsys.readouterr().err
    assert error == "poprisk: cannot write '/proc/self/x.html' (No such file or directory)\n"
