"""Private names of others that the package touches: all of them listed, all of them still there.

The list is `tests/helpers/private_names.py`. It is compared with a scan of the package's syntax
trees, which sees attributes, strings and keywords that begin with one underscore, and imports from
private modules. It does not see names that are put together at run time, nor a private name read
off `self` that a class of ours elsewhere in the package happens to define too.
"""

import ast
import importlib
import inspect
import pkgutil
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.version import Version

import poprisk_integrations
from tests.helpers.private_names import TABLE, Private

ROOT = Path(poprisk_integrations.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
OUR_NAME = "poprisk_integrations"
NOT_THEIRS = {OUR_NAME, *sys.stdlib_module_names}

# Strings that begin with an underscore and name nothing of anyone else's.
WORDS = {
    "endings of keys and files": {
        "_action", "_change_", "_change_se", "_clean", "_codes", "_criterion", "_kappa",
        "_min_steps", "_patience", "_restore", "_scale", "_se", "_sit_out", "_stop", "_suspect",
        "_threshold", "_version", "_window",
    },
    "a key of a model's config.json": {"_name_or_path"},
    "our own, kept out of Optimizer's __dict__ of options": {
        "_poprisk_noise_source", "_poprisk_record",
    },
    "part of a name": {"_available", "_state", "_stop_"},
    "an attribute of ours, quoted": {"_steps"},
}  # fmt: skip

TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def _is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_[A-Za-z]\w*", name)) and not name.endswith("__")


def _defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file defines: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from [node.attr] if ast.unparse(node.value) in ("self", "cls") else []


def _is_ours(owner: ast.expr, name: str, file: str) -> bool:
    """Whether we define it: anywhere for `self` and `super()`, else in the same file."""
    text = ast.unparse(owner)
    return name in OUR_NAMES if text in ("self", "cls", "super()") else name in DEFINED[file]


DEFINED = {name: set(_defined(tree)) for name, tree in TREES.items()}
OUR_NAMES = set().union(*DEFINED.values())


def _used(file: str, tree: ast.AST) -> Iterator[str]:
    """Private names of others in a file, by syntax."""
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = set().union(*WORDS.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            if not _is_ours(node.value, node.attr, file):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _is_private(node.value) and node.value not in words and node not in docstrings:
                yield node.value
        elif isinstance(node, ast.arg | ast.keyword):
            if node.arg and _is_private(node.arg):
                yield node.arg
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for path in (f"{module}.{alias.name}".strip(".") for alias in node.names):
                if not path.startswith(("__future__", OUR_NAME)):
                    yield from filter(_is_private, path.split("."))


def _overridden() -> Iterator[tuple[str, str]]:
    """File and name of private attributes that our classes set over those of others' classes."""
    for found in pkgutil.walk_packages([str(ROOT)], f"{OUR_NAME}."):
        if "_triton_kernel" in found.name or ".frameworks." in found.name:
            continue  # need Triton, or a framework that is not installed
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for cls in filter(inspect.isclass, list(vars(module).values())):
            theirs = [c for c in cls.__mro__ if c.__module__.split(".")[0] not in NOT_THEIRS]
            if cls.__module__ != found.name:
                continue
            for ours in (c for c in cls.__mro__ if c.__module__.startswith(OUR_NAME)):
                for name in filter(_is_private, vars(ours)):
                    if any(name in vars(c) for c in theirs):
                        file = inspect.getsourcefile(ours)
                        assert file is not None
                        yield Path(file).relative_to(ROOT).as_posix(), name


def _listed() -> set[tuple[str, str]]:
    return {(file, private.name) for private in TABLE for file in private.files}


@pytest.mark.parametrize("private", TABLE, ids=lambda p: f"{p.package or 'python'}:{p.name}")
def test_is_still_there(private: Private) -> None:
    try:
        installed = version(private.package) if private.package else platform.python_version()
    except PackageNotFoundError:
        pytest.skip(f"{private.package} is not installed")
    if Version(installed) < Version(private.since):
        pytest.skip(f"{private.package or 'Python'} {installed} does not have it")
    assert private.exists(), f"{private.name}: {private.why} ({', '.join(private.files)})"


def test_all_are_listed() -> None:
    found = {(file, name) for file, tree in TREES.items() for name in _used(file, tree)}
    protocols = {("optim/poprisk_adamw.py", "_step_supports_amp_scaling")}  # defined, never read
    protocols |= {("huggingface/registration.py", "_clip_grad_norm")}
    protocols |= {("trl/pair_trainer.py", "_set_signature_columns_if_needed")}
    assert found - _listed() == set(), "used, but not in the table"
    assert _listed() - found - protocols == set(), "in the table, but not used"


def test_words_are_used() -> None:
    texts = "\n".join(path.read_text() for path in FILES.values())
    assert [word for words in WORDS.values() for word in words if word not in texts] == []


def test_overrides_are_listed() -> None:
    for package in ("trl", "lightning", "matplotlib"):  # modules of ours import these
        pytest.importorskip(package)
    assert set(_overridden()) - _listed() == set(), "hides a private name of a class of others"


@pytest.mark.parametrize(
    "code",
    [
        "optimizer._hidden",
        "getattr(optimizer, '_hidden', None)",
        "names = ('_hidden',)",
        "from torch.optim._hidden import x",
        "from torch.optim import _hidden",
        "import torch._hidden",
        "self._hidden.x",
        "super()._hidden()",
        "trainer.save_model(_hidden=True)",
        "def save(self, _hidden=False): ...",
    ],
)
def test_the_scan_sees(code: str) -> None:
    assert list(_used("core/gate.py", ast.parse(code))) == ["_hidden"]


@pytest.mark.parametrize(
    "code", ["self.__dict__", "x = '__len__'", "'''_hidden'''", "import _", "for _ in x: _"]
)
def test_the_scan_passes_over(code: str) -> None:
    assert list(_used("core/gate.py", ast.parse(code))) == []
