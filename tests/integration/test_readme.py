"""Every Python block of the READMEs runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
            yield pytest.param(code, id=f"{readme.relative_to(ROOT)}:{index}")


def test_the_three_uses_were_found():
    assert len([b for b in blocks() if b.id.startswith("README.md")]) == 3


@pytest.mark.parametrize("code", list(blocks()))
def test_block_runs(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_links_and_cited_files_exist():
    for readme in READMES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme.relative_to(ROOT)}: {target}"


def test_commands_are_the_ones_that_are_checked():
    """.ci/run takes its command from the README by these markers."""
    text = (ROOT / "README.md").read_text()
    for marker, last in (("demo", "poprisk demo"), ("tests", "pytest -n 2 --dist loadfile")):
        (command,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*)\n```", text)
        assert command.startswith("python3 -m venv .venv && ")
        assert command.endswith(last)
