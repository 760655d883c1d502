"""Every Python block of the READMEs runs as printed, and what they cite is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from poprisk_integrations.cli.builtin import load_pairs, local_model

ROOT = Path(__file__).parents[2]
READMES = [
    ROOT / "README.md",
    *sorted((ROOT / "poprisk_integrations").rglob("README.md")),
    *sorted((ROOT / "recipes").rglob("README.md")),
]


def blocks():
    for readme in READMES:
        found = re.findall(r"^```python\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
        for index, code in enumerate(found):
            yield f"{readme.relative_to(ROOT)}:{index}", code


BLOCKS = dict(blocks())

# What a reader has: a project, a model, a file of pairs.
MY_PROJECT = """
import lightning as L
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("my-model")
model = AutoModelForSequenceClassification.from_pretrained("my-model", num_labels=2, pad_token_id=1)
dataset = [{**tokenizer(word), "label": i % 2} for i, word in enumerate(["ash cat", "fog"] * 64)]

class LitClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

data = torch.utils.data.TensorDataset(torch.randn(320, 4), torch.randint(2, (320,)))
train_loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
"""

# The frameworks are imported once, and nothing of ours: each block runs in a fork of its own.
RUN = """
import json, os, shutil, sys, tempfile, traceback
import lightning.pytorch, transformers.trainer, trl.trainer.dpo_trainer

for name, code in json.load(sys.stdin).items():
    child = os.fork()
    if child:
        print(json.dumps([name, os.waitpid(child, 0)[1]]), flush=True)
        continue
    status = 1
    os.dup2(2, 1)
    folder = tempfile.mkdtemp(dir=".")
    shutil.copytree("mine", folder, dirs_exist_ok=True)
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())
    try:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """({block: exit status}, what all of them said)."""
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "mine").mkdir()
    (folder / "mine" / "my_project.py").write_text(MY_PROJECT)
    Path(local_model("builtin:tiny-llama", folder)).rename(folder / "mine" / "my-model")
    load_pairs("builtin:tiny-pairs")["train"].to_json(folder / "mine" / "pairs.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        input=json.dumps(BLOCKS),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines())), done.stderr


def test_the_three_uses_were_found_and_are_short():
    for page, longest in (("README.md", 10), ("recipes/quickstart/README.md", 30)):
        uses = [code for name, code in BLOCKS.items() if name.rpartition(":")[0] == page]
        assert len(uses) == 3
        assert max(len(code.splitlines()) for code in uses) <= longest


def test_the_first_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert len(text.split()) <= 900


@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs(ran, name):
    statuses, said = ran
    assert statuses[name] == 0, said[-5000:]


def test_links_and_cited_files_exist():
    for readme in READMES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme.relative_to(ROOT)}: {target}"


def test_tests_that_the_tables_name_exist():
    """Of what was broken on purpose, and of what public reports describe."""
    paths = sorted((ROOT / "tests").rglob("*.py"))
    known = {path.stem for path in paths}
    for path in paths:
        known.update(re.findall(r"def (test_\w+)", path.read_text()))
    for readme in sorted((ROOT / "tests" / "integration").rglob("README.md")):
        named = set(re.findall(r"\btest_\w+", readme.read_text()))
        assert named - known == set(), readme
        assert len(named) > 5


def test_commands_are_the_ones_that_are_checked():
    """.ci/run takes its command from the README by these markers."""
    text = (ROOT / "README.md").read_text()
    for marker, last in (("demo", "poprisk demo"), ("tests", "pytest -n 2 --dist loadfile")):
        (command,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*)\n```", text)
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(last)
