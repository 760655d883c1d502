"""How the CPU kernel comes to be: compilers, the cache, and what happens without."""

import ctypes
import logging
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.optim import _cpu_build
from tests.helpers.optim_problem import make_params, train
from tests.unit.optim.paths import needs_compiler

STEP = """
import sys, torch
from poprisk_integrations import PopRiskAdamW
p = torch.nn.Parameter(torch.ones(8))
p.grad = torch.ones(8)
optimizer = PopRiskAdamW([p], fused=True)
optimizer.step()
print(optimizer.path, float(p[0]))
"""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As a new process with an empty cache."""
    monkeypatch.setattr(_cpu_build, "_loaded", [])
    monkeypatch.setattr(_cpu_build, "_failures", [])
    # compiled faster, since little is computed
    flags = tuple("-O0" if flag == "-O2" else flag for flag in _cpu_build.FLAGS)
    monkeypatch.setattr(_cpu_build, "FLAGS", flags)
    monkeypatch.setenv("POPRISK_CACHE_DIR", str(tmp_path / "cache"))
    _cpu_build._cache_folder.cache_clear()
    yield tmp_path / "cache"
    _cpu_build._cache_folder.cache_clear()


def two_steps():
    params = make_params()
    optimizer = PopRiskAdamW(params, fused=True)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


@needs_compiler
def test_compiled_once_and_said_before_it_starts(fresh, caplog, monkeypatch):
    said, calls, run = [], [], _cpu_build._run

    def watched(*words, source):
        calls.append(words)
        said.append(len(caplog.records))
        return run(*words, source=source)

    monkeypatch.setattr(_cpu_build, "_run", watched)
    with caplog.at_level(logging.INFO, logger="poprisk_integrations"):
        for _ in range(2):
            assert two_steps().path == "fused_compiled"
    assert said == [0, 1]  # the question for the key, then the compilation
    (record,) = caplog.records
    assert "compiles its CPU kernel with" in record.getMessage()
    assert "fused=False" in record.getMessage()
    # the next process finds it
    (library,) = fresh.iterdir()
    assert fresh.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(_cpu_build, "_loaded", [])
    two_steps()
    assert len(calls) == 3
    assert library.suffix == ".so"


def test_without_a_compiler_one_warning_and_the_eager_path(fresh, monkeypatch):
    monkeypatch.setattr(_cpu_build.shutil, "which", lambda _: None)
    optimizer = PopRiskAdamW(make_params(), fused=True)
    with pytest.warns(UserWarning, match=r"none of the C\+\+ compilers"):
        assert optimizer.path == "single_tensor"
    assert optimizer.path == "single_tensor"  # no second warning: it would be an error
    assert not optimizer._step_supports_amp_scaling


BROKEN = {
    "exit status": ("#!/bin/sh\necho 'error: no space left' >&2\nexit 1\n", "no space left"),
    "not a library": (
        '#!/bin/sh\nfor last; do :; done\n[ "$last" = - ] || echo garbage > "$last"\n',
        "invalid ELF header|file too short",
    ),
    "not a program": ("nonsense", "Exec format error"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="messages are Linux's")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_compiler_loses_no_step(kind, fresh, monkeypatch, tmp_path):
    script, reason = BROKEN[kind]
    compiler = tmp_path / "broken++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    expected, _ = train(lambda p: PopRiskAdamW(p, fused=False), steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual, optimizer = train(lambda p: PopRiskAdamW(p, fused=True), steps=3)
    messages = [str(w.message) for w in caught if "CPU kernel" in str(w.message)]
    assert len(messages) == 1
    assert re.search(reason, messages[0]), messages
    assert optimizer.path == "single_tensor"
    assert all(map(torch.equal, actual, expected))


@needs_compiler
def test_a_flag_that_the_compiler_does_not_know_is_left_out(fresh, monkeypatch):
    extra = (("--no-such-flag",), *_cpu_build.EXTRA_FLAGS[-1:])
    monkeypatch.setattr(_cpu_build, "EXTRA_FLAGS", extra)
    assert two_steps().path == "fused_compiled"


@needs_compiler
def test_a_cache_that_cannot_be_written_is_not_needed(fresh, monkeypatch):
    def refuses(**_):
        raise PermissionError("a read-only file system")

    monkeypatch.setattr(_cpu_build.tempfile, "TemporaryFile", refuses)  # root may write anywhere
    assert two_steps().path == "fused_compiled"
    assert not list(fresh.iterdir())


@needs_compiler
def test_a_cache_that_others_can_write_to_is_not_trusted(fresh):
    fresh.mkdir()
    fresh.chmod(0o777)
    assert two_steps().path == "fused_compiled"
    assert not list(fresh.iterdir())
    assert _cpu_build._cache_folder().stat().st_mode & 0o077 == 0


@needs_compiler
def test_a_cache_that_is_no_folder_is_not_needed(fresh):
    fresh.write_text("a file")
    assert two_steps().path == "fused_compiled"


@needs_compiler
def test_two_that_compile_at_once_leave_one_whole_library(fresh, monkeypatch):
    """Neither finds the other's, because both wait until both have looked."""
    both, compile_ = threading.Barrier(2, timeout=60), _cpu_build._compile

    def at_once(*args):
        both.wait()
        return compile_(*args)

    monkeypatch.setattr(_cpu_build, "_compile", at_once)
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(lambda _: _cpu_build._load(), range(2)))
    assert all(library.poprisk_step for library in loaded)
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together_do_not_disturb_each_other(fresh):
    """Each compiles under a name of its own, so all that is ever loaded is whole."""
    running = [
        subprocess.Popen([sys.executable, "-c", STEP], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=300)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (line,) = said
    assert line.startswith("fused_compiled ")
    (library,) = fresh.iterdir()
    assert ctypes.CDLL(str(library)).poprisk_step
