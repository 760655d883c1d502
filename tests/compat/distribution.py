"""The files that users download, built from a copy of the working tree."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

__all__ = ["build", "unpack_tests"]

ROOT = Path(__file__).parents[2]
PACKAGE = "poprisk_integrations"


def build(folder: Path) -> tuple[Path, Path]:
    """Sdist, and the wheel that is built from it.

    A committed copy: the sdist holds what git tracks, and the checkout stays as it is.
    """
    source = folder / "source"
    listing = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    _git(source, "init", "-q")
    _git(source, "add", "-A")
    who = ("-c", "user.name=build", "-c", "user.email=build@localhost")
    _git(source, *who, "commit", "-q", "-m", "build")
    out = folder / "dist"
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def unpack_tests(sdist: Path, folder: Path) -> Path:
    """The sdist without the package: its tests then import the installed one."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    shutil.rmtree(root / PACKAGE)
    shutil.rmtree(root / f"{PACKAGE}.egg-info")  # else the metadata is this, not the wheel's
    return root


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
