"""Where the Pythons of this machine are: on PATH, or among pyenv's."""

import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["find_python"]


def find_python(version: str) -> str | None:
    """An interpreter of this version ("3.11"), or None."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [on_path] if on_path else []
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    return next((path for path in candidates if _version_of(path) == version), None)


def _version_of(python: str) -> str | None:
    """What it says of itself: a shim on PATH may start nothing."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
