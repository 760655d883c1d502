"""The CPU kernel: compiled once per machine, kept in a cache on disk, loaded in each process.

`_cpu_kernel.cpp` needs a C++17 compiler and nothing else, no headers of torch either, so that it
compiles in a few seconds. What is compiled for one processor never runs on another: the cache is
keyed by the source, the flags and what the compiler says of itself and of the processor.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

from poprisk_integrations.optim._scalars import COLUMNS

__all__ = ["FIELDS", "SETTINGS", "compiler_is_found", "load_kernel", "warn_without_compiler"]

logger = logging.getLogger("poprisk_integrations")

FIELDS = (
    *("param", "grad", "exp_avg", "exp_avg_sq", "exp_dev_sq"),  # addresses, as the next ones
    *("scale_avg", "scale_sq", "scale_dev", "step", "dev_step", "gate"),
    *("numel", "rows", "offset", "key", "row_index"),
)
SETTINGS = (
    *("count", "threads", "param_format", "grad_format", "avg_format", "sq_format", "dev_format"),
    *("converts", "gate_kind", "shifts", "measures", "gates_decay", "maximizes", "rounds_param"),
    "collects",
)
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O2", "-ftree-vectorize", "-shared", "-fPIC"),
    # a product and a sum round separately, as in the other paths
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    f"-DCOLUMNS={','.join(COLUMNS)}",
    f"-DFIELDS={','.join(FIELDS)}",
    f"-DSETTINGS={','.join(SETTINGS)}",
)
# The first set that a compiler takes: for this processor, with threads of the library that torch
# has loaded already.
EXTRA_FLAGS = (
    ("-march=native", "-fopenmp", "-fvect-cost-model=dynamic"),
    ("-march=native", "-fopenmp"),
    ("-fopenmp",),
    (),
)
TIMEOUT = 300  # seconds; a busy machine takes some ten


def compiler_is_found() -> bool:
    """Whether the kernel can be expected to work here; no compilation is started."""
    return bool(_loaded) or (not _failures and _compiler() is not None)


def warn_without_compiler() -> None:
    """Say once in a process why `fused=True` has no effect."""
    if not _failures:
        _fail(
            "none of the C++ compilers "
            f"{_names()} was found. Install one, or name it in the environment variable CXX."
        )


def load_kernel() -> ctypes.CDLL | None:
    """The kernel, compiled if it was not before; None, after one warning, where that fails."""
    if not _loaded and not _failures:
        try:
            _loaded.append(_load())
        except (OSError, ValueError, subprocess.SubprocessError, RuntimeError) as error:
            _fail((str(error).strip() or type(error).__name__).splitlines()[0])
    return _loaded[0] if _loaded else None


_loaded: list[ctypes.CDLL] = []
_failures: list[str] = []


def _fail(reason: str) -> None:
    _failures.append(reason)
    warnings.warn(f"PopRiskAdamW steps without its CPU kernel: {reason}", stacklevel=4)


def _names() -> list[str]:
    chosen = os.environ.get("CXX")
    return [chosen] if chosen else ["g++", "clang++"]


def _compiler() -> str | None:
    if sys.platform == "win32":
        return None
    return next((found for found in map(shutil.which, _names()) if found), None)


def _load() -> ctypes.CDLL:
    compiler = _compiler()
    if compiler is None:
        raise RuntimeError(f"none of the C++ compilers {_names()} was found")
    source = files(__package__).joinpath("_cpu_kernel.cpp").read_bytes()
    reasons = []
    for extra in EXTRA_FLAGS:
        flags = (*FLAGS, *extra)
        # the compiler's version, and the processor as it sees it
        asked = _run(compiler, *flags, "-E", "-v", "-", source=b"")
        if asked.returncode:
            reasons.append(_reason(asked.stderr))
            continue
        key = hashlib.sha256(b"\0".join([source, repr(flags).encode(), asked.stderr])).hexdigest()
        folder = _cache_folder()
        path = folder / f"cpu_kernel_{key[:32]}.so"
        if not (path.exists() and _is_ours(path)):
            problem = _compile(compiler, flags, source, path)
            if problem:
                reasons.append(problem)
                continue
        return _open(path)
    raise RuntimeError(f"{compiler} failed: {reasons[0]}")


def _run(compiler: str, *words: str, source: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [compiler, *words],
        input=source,
        capture_output=True,
        timeout=TIMEOUT,
        env={**os.environ, "LC_ALL": "C"},
    )


def _reason(errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no message")


def _compile(compiler: str, flags: tuple[str, ...], source: bytes, path: Path) -> str | None:
    """Compile under another name and rename, so that no process ever loads half a file."""
    # Not through `warnings`: nothing is wrong, but a training that stands still must say why.
    logger.warning(
        "PopRiskAdamW compiles its CPU kernel with %s: a few seconds, once; later runs find it in "
        "%s. fused=False does without.",
        compiler,
        path.parent,
    )
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        done = _run(compiler, *flags, "-", "-o", name, source=source)
        if done.returncode:
            return _reason(done.stderr)
        os.chmod(name, 0o700)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return None


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.poprisk_all_finite.argtypes = [pointer, pointer, number, number, number]
    library.poprisk_all_finite.restype = ctypes.c_int32
    library.poprisk_step.argtypes = [pointer, pointer, pointer, pointer]
    library.poprisk_step.restype = None
    return library


@cache
def _cache_folder() -> Path:
    """A folder that only this user can write to; one of this process where there is none."""
    chosen = os.environ.get("POPRISK_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else home / "poprisk_integrations"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_ours(folder):
            with tempfile.TemporaryFile(dir=folder):  # it can be written to
                return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="poprisk_integrations_"))


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have put code there."""
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
