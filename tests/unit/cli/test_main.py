"""Exit status, one line on stderr, and what is passed through."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from poprisk_integrations import __version__
from poprisk_integrations.cli import main as module
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.main import main


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces what `poprisk env` does."""

    def replace(run: Any) -> None:
        monkeypatch.setattr(module.env, "run", run)

    return replace


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("poprisk")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["env", "--jsn"], "unrecognized arguments: --jsn"),
        (["--version=3"], "--version"),
        (["run"], "required: TARGET (see"),
        (["run", "no/such.py"], "no script at 'no/such.py'"),
        (["run", "no_such_module"], "no module named 'no_such_module'"),
        (["run", "no.such.module"], "no module named 'no.such.module'"),
        (["run", "not a name"], "no module named 'not a name'"),
        (["run", "tests"], "'tests' is a package, or a folder, without a __main__.py to run"),
    ],
)
def test_bad_usage(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(arguments) == 2
    assert message in one_error_line(capsys)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UsageError("fix\n  this"), "poprisk: fix this"),
        (ValueError("Invalid x: 3."), "poprisk: Invalid x: 3."),
        (FileNotFoundError(2, "No such file", "a.yaml"), "poprisk: No such file: 'a.yaml'"),
        (PermissionError("no permission"), "poprisk: no permission"),
        (ImportError("Run: pip install x"), "poprisk: Run: pip install x"),
    ],
)
def test_errors_become_one_line(
    error: Exception, message: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: Any) -> int:
        raise error

    command(run)
    assert main(["env"]) == 2
    assert one_error_line(capsys).strip() == message
    with pytest.raises(type(error)):
        main(["--debug", "env"])


def test_a_bug_keeps_its_traceback(command: Any) -> None:
    def run(args: Any) -> int:
        raise RuntimeError("a bug")

    command(run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["env"])


def test_interrupt(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: Any) -> int:
        raise KeyboardInterrupt

    command(run)
    assert main(["env"]) == 130
    assert one_error_line(capsys) == "poprisk: interrupted\n"


def test_other_ranks_say_who_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert main(["nonsense"]) == 2
    assert one_error_line(capsys).startswith("poprisk (rank 3): ")


def test_exit_status_of_the_command_is_passed_on(command: Any) -> None:
    command(lambda args: 7)
    assert main(["env"]) == 7


def test_an_error_without_words_has_a_name() -> None:
    assert one_line(ValueError()) == "ValueError"


def test_version_loads_no_framework() -> None:
    code = (
        "import sys; from poprisk_integrations.cli.main import main\n"
        "try: main(['--version'])\n"
        "finally: print(sorted({'transformers', 'trl', 'lightning', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines() == [f"poprisk {__version__}", "[]"]
    assert run.returncode == 0


def test_console_script() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="poprisk")
    assert entry.load() is main
    assert (Path(module.__file__).parent / "__main__.py").exists()
