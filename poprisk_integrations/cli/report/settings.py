"""Settings and versions of a run, from files that are text."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.errors import one_line
from poprisk_integrations.cli.report.plain_text import plain
from poprisk_integrations.cli.report.read_json import read_json, read_text

__all__ = ["SettingsFound", "read_settings"]

_MODEL = (
    "model_type",
    "_name_or_path",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "dtype",
    "torch_dtype",
)
_ADAPTER = (
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
)
_CARD = ("base_model", "datasets", "library_name", "license", "model_name", "tags")
_VERSIONS = (("config.json", "transformers_version"), ("adapter_config.json", "peft_version"))
_BULLET = re.compile(r"[-*] ([^:]{1,60}?)(?:: | )(\S.*)")
_MOST = 200  # settings of one file
_LONGEST = 200  # characters of a value


class SettingsFound:
    """What was found, under the name of the file that says it.

    Attributes:
        settings: "file: name" -> value, both as text.
        versions: Package -> version.
        files: Files that were read.
        notes: What could not be read.
    """

    def __init__(self) -> None:
        self.settings: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.files: list[Path] = []
        self.notes: list[str] = []

    def add(self, source: str, name: str, value: Any) -> None:
        """Note one setting."""
        text = plain(", ".join(map(str, value)) if isinstance(value, list) else value)
        cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
        self.settings[f"{source}: {plain(name)}"] = cut


def read_settings(directory: Path) -> SettingsFound:
    """Read what is there; `training_args.bin` is a pickle and is not opened.

    Args:
        directory: Of the run.

    Raises:
        UsageError: If a JSON file is not whole.
    """
    found = SettingsFound()
    for name, keys in (("config.json", _MODEL), ("adapter_config.json", _ADAPTER)):
        if (directory / name).is_file():
            found.files.append(directory / name)
            _take_json(found, directory / name, keys)
    if (directory / "hparams.yaml").is_file():
        found.files.append(directory / "hparams.yaml")
        values = _yaml(found, "hparams.yaml", read_text(directory / "hparams.yaml"))
        for name, value in _flat(values):
            found.add("hparams.yaml", name, value)
    if (directory / "README.md").is_file():
        found.files.append(directory / "README.md")
        _take_card(found, read_text(directory / "README.md"))
    return found


def _take_json(found: SettingsFound, path: Path, keys: tuple[str, ...]) -> None:
    content = read_json(path)
    if not isinstance(content, dict):
        return
    for key in keys:
        if content.get(key) not in (None, ""):
            found.add(path.name, key, content[key])
    for file, key in _VERSIONS:
        if file == path.name and content.get(key):
            found.versions[key.removesuffix("_version")] = plain(content[key])


def _take_card(found: SettingsFound, text: str) -> None:
    """Metadata of a model card, and the lists that Trainer and TRL write into it."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match:
        metadata = _yaml(found, "README.md", match.group(1))
        for name in _CARD:
            if isinstance(metadata, dict) and metadata.get(name) not in (None, [], ""):
                found.add("README.md", name, metadata[name])
    for title, section in re.findall(r"^#+ (.*)\n((?:(?!#).*\n?)*)", text, re.MULTILINE):
        kind = title.strip().lower()
        bullets = [b for b in map(_BULLET.fullmatch, section.splitlines()) if b]
        if kind == "framework versions":
            found.versions |= {plain(b[1]).lower(): plain(b[2]) for b in bullets}
        elif kind == "training hyperparameters":
            for bullet in bullets:
                found.add("README.md", bullet[1], bullet[2])


def _yaml(found: SettingsFound, name: str, text: str) -> Any:
    if find_spec("yaml") is None:
        found.notes.append(f"{name} was not read: PyYAML is not installed.")
        return None
    import yaml

    try:
        return yaml.safe_load(text)  # builds no Python objects
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = one_line(error)[:150]
        found.notes.append(f"{name} was not read: not plain YAML ({plain(first)}).")
        return None


def _flat(value: Any) -> list[tuple[str, Any]]:
    """Nested mappings as dotted names, a bounded number of them: aliases can multiply."""
    pairs: list[tuple[str, Any]] = []
    for pair in _walk(value, "", 0):
        pairs.append(pair)
        if len(pairs) == _MOST:
            break
    return pairs


def _walk(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and depth < 6:
        for key, inner in value.items():
            yield from _walk(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, (dict, list)):
        is_short = isinstance(value, list) and len(value) <= 20
        simple = is_short and not any(isinstance(v, (dict, list)) for v in value)
        yield name, value if simple else f"{type(value).__name__} of {len(value)}"
    elif name:
        yield name, value
