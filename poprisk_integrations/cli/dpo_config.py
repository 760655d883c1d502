"""Reads a config of `poprisk dpo`: YAML with TRL's keys and ours; the command line wins over it."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from poprisk_integrations.cli.builtin import check_names
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.recipes import CARD, read_card
from poprisk_integrations.trl import PopRiskDPOConfig

__all__ = ["DPOArguments", "PairArguments", "check_config", "config_help", "parse_config"]


@dataclass
class PairArguments:
    """What happens to the pairs before training."""

    drop_unusable_pairs: bool = field(
        default=False,
        metadata={"help": "Leave out pairs with an empty or twice the same completion."},
    )
    flip_rate: float = field(
        default=0.0,
        metadata={"help": "Share of the training pairs whose labels are swapped, for studies."},
    )
    flip_seed: int = field(default=0, metadata={"help": "Seed that draws these pairs."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation pairs from elsewhere than dataset_name: a local file, or a name "
            "or directory with the split dataset_test_split."
        },
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.flip_rate <= 1.0:
            raise ValueError(f"Invalid flip_rate: {self.flip_rate}. Must be in [0, 1].")


@dataclass(frozen=True)
class DPOArguments:
    """A parsed config: data, trainer, model with LoRA and quantization, mixture, and pairs."""

    script: ScriptArguments
    training: PopRiskDPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    pairs: PairArguments


class _ConfigParser(TrlParser):
    """TRL's parser, with one line per mistake instead of all its options."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:  # now, since the values are checked right after this
            raise UsageError(f"unknown option {unknown[0]!r} (see `poprisk dpo --help-all`)")
        return parsed, unknown

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        known = {action.dest for action in self._actions}
        unknown = [key for key in kwargs if key not in known]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"unknown key in the config: {', '.join(map(repr, unknown))}.{hint}")
        remaining: list[str] = super().set_defaults_with_config(**kwargs)
        return remaining


def parse_config(argv: Sequence[str]) -> DPOArguments:
    """Parse `--config config.yaml --key value ...`; keys given here win over those of the file."""
    # TRL's parser wants `--config=x` in two.
    parts = [item.split("=", 1) if item.startswith("--config=") else [item] for item in argv]
    argv = list(itertools.chain.from_iterable(parts))
    if not argv:
        raise UsageError("a config is missing: poprisk dpo --config CONFIG.yaml")
    if argv[-1] == "--config":
        raise UsageError("--config needs the path of a YAML file")
    for option, value in itertools.pairwise(argv):
        if option == "--config":
            check_config(Path(value))
    try:
        found = DPOArguments(*_parser().parse_args_and_config(argv))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UsageError(f"the config is not valid YAML{place}") from error
    except TypeError as error:  # an unknown key inside `datasets:`
        raise UsageError(f"the config is not valid: {error}") from error
    if found.model.model_name_or_path is None:
        raise UsageError("model_name_or_path is missing: a name or a local directory")
    if not (found.script.dataset_name or found.mixture.datasets):
        raise UsageError("dataset_name is missing: a name, a local file or directory; or datasets")
    check_names(found.model.model_name_or_path, found.script.dataset_name)
    check_names(None, found.pairs.eval_dataset_name)
    return found


def check_config(path: Path) -> None:
    """Refuse a recipe's card or folder where its config is wanted, and name that."""
    folder = path if path.is_dir() else path.parent
    try:
        is_card = path.is_file() and read_card(path) is not None
    except (yaml.YAMLError, UnicodeDecodeError):
        is_card = False
    if path.is_dir():
        found = "is a folder"
    elif is_card:
        found = "is the card of a recipe, which says what it is"
    elif not path.exists() and (folder / CARD).is_file():
        found = "does not exist"
    else:
        return  # what else may be wrong with it is said where it is read
    files = sorted(folder.glob("*.yaml"))
    configs = [str(file) for file in files if file.stem.startswith(("config", "smoke"))]
    hint = f"its settings: --config {' or '.join(configs)}" if configs else "no settings there"
    raise UsageError(f"Invalid --config: {str(path)!r} {found}; {hint}.")


def config_help() -> str:
    """Every key with its default."""
    return str(_parser().format_help())


def _parser() -> TrlParser:
    types: Any = [part.type for part in dataclasses.fields(DPOArguments)]
    return _ConfigParser(types, prog="poprisk dpo", allow_abbrev=False)
