"""What each command prints, refuses and leaves behind, as the transcripts in tests/goldens/cli say.

A transcript is a list of commands, each run in a fresh copy of the files of `made_files`: below
`$ poprisk ...` stand its status in brackets, what it prints, its own lines on stderr after "! ",
and the files that it adds after "+ ". `python -m tests.integration.cli.test_goldens` writes the
transcripts anew.
"""

import contextlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import poprisk_integrations
from poprisk_integrations.cli.main import main
from poprisk_integrations.trl import FlipReport
from tests.integration.cli import probe_targets  # noqa: F401  (its helpers set the environment)

ROOT = Path(poprisk_integrations.__file__).parents[1]
GOLDENS = Path(__file__).parents[2] / "goldens" / "cli"
COUNT = 40
CONFIG = {"model_name_or_path": "m", "dataset_name": "d", "use_cpu": True, "bf16": False}
BUILTIN = {
    "model_name_or_path": "builtin:tiny-llama", "dataset_name": "builtin:tiny-pairs",
    "output_dir": "out", "max_steps": 1, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
# Each a mistake, or a way to write the same, on top of CONFIG or BUILTIN.
CONFIGS: dict[str, dict[str, Any]] = {
    "misspelt": {"learnin_rate": 1},
    "noise": {"noise": "sometimes"},
    "kappa": {"stop_kappa": 0},
    "smoothing": {"label_smoothing": 0.1},
    "flip_rate": {"flip_rate": 1.5},
    "optim": {"optim": "poprisk"},
    "type": {"learning_rate": "fast"},
    "mixture": {"datasets": [{"path": "json", "date_files": "x"}]},
    "no_model": {"model_name_or_path": None},
    "no_data": {"dataset_name": None},
    "builtin_model": {"model_name_or_path": "builtin:llama"},
    "builtin_data": {"dataset_name": "builtin:pairs"},
    "builtin": BUILTIN,
    "no_path": {**BUILTIN, "dataset_name": "/no/such/pairs.json"},
    "no_split": {**BUILTIN, "dataset_name": "data.jsonl", "eval_strategy": "epoch"},
    "eval_name": {**BUILTIN, "eval_dataset_name": "test.json"},
    "eval_path": {**BUILTIN, "eval_dataset_name": "test.json", "eval_strategy": "epoch"},
    "id_column": {**BUILTIN, "pair_id_column": "mixed"},
    "streamed": {**BUILTIN, "dataset_streaming": True, "flip_rate": 0.5},
    "no_rejected": {**BUILTIN, "dataset_name": "one_side.jsonl"},
    "same": {**BUILTIN, "dataset_name": "same.jsonl"},
    "all_dropped": {**BUILTIN, "dataset_name": "same.jsonl", "drop_unusable_pairs": True},
    "out_file": {**BUILTIN, "output_dir": "data.jsonl/out"},
    "resume": {**BUILTIN, "resume_from_checkpoint": True},
}


def made_files(folder: Path) -> None:
    """Configs, preference pairs, and finished runs of them."""
    for name, keys in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**CONFIG, **keys}))
    (folder / "broken.yaml").write_text("a: [1\nb: 2")
    (folder / "list.yaml").write_text("- 1")
    shutil.copy(ROOT / "recipes/dpo-noisy-7b-lora/card.yaml", folder / "card.yaml")
    (folder / "prints.py").write_text("import sys\nprint(__name__, sys.argv)\n")
    rows = [
        {"id": f"id-{i}", "prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(COUNT)
    ]
    same, one_side = {"prompt": "a", "chosen": " b", "rejected": " b"}, {"chosen": "b"}
    for name, content in {
        "data": rows, "short": rows[:9], "scored": [{**row, "score_chosen": 1.5} for row in rows],
        "same": [same] * 9, "one_side": [one_side] * 9,
    }.items():  # fmt: skip
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    labels = [
        {"prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"bad {i}", "rater": who}
        for i in range(COUNT) for who in "abc"
    ]  # fmt: skip
    for row in labels[2::6]:  # half of those of "c"
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    faulty = [*labels, {"chosen": "a", "prompt": "b"}, same, labels[0]]
    (folder / "faulty.jsonl").write_text("\n".join(map(json.dumps, faulty)))
    (folder / "folder").mkdir()
    shutil.copy(folder / "data.jsonl", folder / "folder" / "train.jsonl")
    rng = random.Random(3)
    p = [math.nan if i % 13 == 5 else round(rng.random(), 3) for i in range(COUNT)]
    texts = {i: (f"ask {i}", f"left {i}", f"right {i}") for i in range(COUNT)}
    estimate = {
        "slope": 2.0, "maximum_likelihood": 0.3, "upper_bound": 0.3, "anchor": 0.2,
        "num_pairs": 37, "method": "m",
    }  # fmt: skip
    runs: dict[str, tuple[dict[str, Any], Any]] = {
        "run": ({}, None),
        "ids": ({"pair_id": [row["id"] for row in rows]}, None),
        "texts": ({"texts": texts}, None),
        "ranking": ({"calibrated": False}, None),
        "nothing": ({"probability_wrong": [math.nan] * COUNT, "margin": [math.nan] * COUNT,
                     "step": [-1] * COUNT}, None),
        "noise": ({}, {**estimate, "rate": 0.31, "low": 0.26, "high": 0.36}),
        "wide": ({}, {**estimate, "rate": 0.4, "low": 0.0, "high": 0.48, "upper_bound": 0.49}),
        "given": ({}, {"rate": 0.2, "method": "double labels"}),
        "untold": ({}, {"rate": None, "num_pairs": 3}),
        "bad_noise": ({}, "["),
        "cleaned/cleaning": ({"texts": texts}, None),
        "retrained": ({}, {**estimate, "rate": 0.31, "low": 0.26, "high": 0.36}),
        "study": ({}, None),
        "other_study": ({}, None),
    }  # fmt: skip
    for name, (changes, noise) in runs.items():
        columns: dict[str, Any] = {
            "pair_id": range(COUNT), "row": range(COUNT), "probability_wrong": p,
            "margin": [0.5 - x for x in p], "step": [-1 if x != x else 0 for x in p], **changes,
        }  # fmt: skip
        FlipReport(**columns).save(folder / name)
        if noise is not None:
            (folder / name / "poprisk_noise.json").write_text(json.dumps(noise))
    (folder / "retrained" / "cleaning").mkdir()
    for place in ("cleaned", "retrained"):
        record = folder / place / "cleaning" / "poprisk_clean.json"
        record.write_text(json.dumps({"noise": {**estimate, "rate": 0.3, "low": 0.2, "high": 0.4}}))
    flips = {"rows": list(range(0, COUNT, 3)), "num_pairs": COUNT, "flip_rate": 0.3}
    (folder / "study" / "label_flips.json").write_text(json.dumps(flips))
    (folder / "other_study" / "label_flips.json").write_text(json.dumps({**flips, "num_pairs": 3}))


def transcript(line: str, folder: Path) -> list[str]:
    """Run a command in `folder`; its lines of the transcript."""
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: Any = main(shlex.split(line.replace("{ROOT}", str(ROOT)))[1:])
        except SystemExit as ended:  # --help
            status = ended.code
    added = sorted({path.relative_to(folder) for path in folder.rglob("*")} - before)

    def lines(text: str) -> list[str]:
        text = text.replace(str(ROOT), "{ROOT}").replace(str(folder), "{HERE}")
        text = re.sub(r"a probed step took .*", "a probed step took ...", text)
        # Notes of other libraries begin with the time; the Trainer's figures differ by machine.
        skipped = ("[20", "{'train_runtime'")
        return [line.rstrip() for line in text.splitlines() if not line.startswith(skipped)]

    return [
        f"[{status}]",
        *lines(out.getvalue()),
        *(f"! {line}" for line in lines(err.getvalue()) if line.startswith("poprisk")),
        *(f"+ {path.as_posix()}" for path in added if "__pycache__" not in path.parts),
    ]


def read(path: Path) -> dict[str, list[str]]:
    """Commands of a transcript, and the lines below each."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("$ "):
            lines = found.setdefault(line.removeprefix("$ "), [])
        else:
            lines.append(line)
    return {command: "\n".join(lines).rstrip().split("\n") for command, lines in found.items()}


CASES = {
    f"{path.stem}: {command}": (command, lines)
    for path in sorted(GOLDENS.glob("*.txt"))
    for command, lines in read(path).items()
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    made_files(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_transcript(
    case: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, expected = CASES[case]
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", files.parent / "cache")
    # Pictures are rendered where the tests look at them.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, to, **_: to.touch())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    found = transcript(command, tmp_path)
    if "--help" in command or command.endswith(" -h"):  # argparse breaks lines as it likes
        assert " ".join(found).split() == " ".join(expected).split()
    else:
        assert "\n".join(found).rstrip() == "\n".join(expected)


def write(path: Path) -> None:
    """Run the commands of a transcript again and write what they do now."""
    import datasets
    import torch

    torch.set_num_threads(1)
    blocks = []
    with tempfile.TemporaryDirectory() as scratch:
        datasets.config.HF_DATASETS_CACHE = Path(scratch, "cache")
        files = Path(scratch, "files")
        files.mkdir()
        made_files(files)
        for index, command in enumerate(read(path)):
            folder = Path(scratch, str(index))
            shutil.copytree(files, folder)
            os.chdir(folder)
            kept = list(sys.path), list(sys.argv)
            blocks.append("\n".join([f"$ {command}", *transcript(command, folder)]).rstrip())
            sys.path[:], sys.argv[:] = kept
        os.chdir(ROOT)
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    for chosen in sorted(GOLDENS.glob(sys.argv[1] if len(sys.argv) > 1 else "*.txt")):
        write(chosen)
