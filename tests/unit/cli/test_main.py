"""Exit status, one line on stderr, and what is passed through; `poprisk env`.

What is refused on the command line is in tests/goldens/cli/main.txt.
"""

import importlib.metadata
import json
import subprocess
import sys
from typing import Any

import pytest

from poprisk_integrations import __version__
from poprisk_integrations.cli import main as module
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.main import main


@pytest.fixture
def ends_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces what `poprisk env` does: it raises, or returns a status."""

    def replace(end: Any) -> None:
        def run(args: Any) -> int:
            if isinstance(end, BaseException):
                raise end
            return int(end)

        monkeypatch.setattr(module.env, "run", run)

    return replace


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("fix\n  this"), 2, "poprisk: fix this"),
        (ValueError("Invalid x: 3."), 2, "poprisk: Invalid x: 3."),
        (FileNotFoundError(2, "No such file", "a.yaml"), 2, "poprisk: No such file: 'a.yaml'"),
        (PermissionError("no permission"), 2, "poprisk: no permission"),
        (ImportError("Run: pip install x"), 2, "poprisk: Run: pip install x"),
        (KeyboardInterrupt(), 130, "poprisk: interrupted"),
    ],
)
def test_errors_become_one_line(
    error: BaseException,
    status: int,
    message: str,
    ends_with: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends_with(error)
    assert main(["env"]) == status
    assert capsys.readouterr() == ("", f"{message}\n")
    with pytest.raises(type(error)):
        main(["--debug", "env"])


def test_a_bug_keeps_its_traceback_and_a_status_is_passed_on(ends_with: Any) -> None:
    ends_with(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["env"])
    ends_with(7)
    assert main(["env"]) == 7
    assert one_line(ValueError()) == "ValueError"


def test_other_ranks_say_who_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().err.startswith("poprisk (rank 3): ")


def test_version_loads_no_framework() -> None:
    code = (
        "import sys; from poprisk_integrations.cli.main import main\n"
        "try: main(['--version'])\n"
        "finally: print(sorted({'transformers', 'trl', 'lightning', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines() == [f"poprisk {__version__}", "[]"]
    assert run.returncode == 0


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"system", "packages", "extras", "devices"}
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["packages"]["poprisk_integrations"] == __version__
    assert "gloo" in report["devices"]["distributed_backends"]
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for section, names in report.items() for name in (section, *names))


@pytest.mark.parametrize(
    ("absent", "extras"),
    [
        (["trl", "lightning", "pytorch-lightning"],
         {"hf": "available", "trl": ["trl"], "lightning": ["lightning"], "demo": ["trl"]}),
        (["lightning"], dict.fromkeys(("hf", "trl", "lightning", "demo"), "available")),
    ],
)  # fmt: skip
def test_env_without_extras(
    absent: list[str],
    extras: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lightning has two names, of which one is enough."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.4.0" if name == "pytorch-lightning" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"][absent[0]] == "not installed"
    assert report["extras"] == extras
