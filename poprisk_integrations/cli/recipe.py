"""Reads a DPO recipe: YAML with TRL's keys and ours, overridden by the command line."""

# TRL exports lazily and leaves most functions untyped.
# mypy: disable-error-code="attr-defined,no-untyped-call"

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
from poprisk_integrations.cli.recipe_index import check_config
from poprisk_integrations.trl import PopRiskDPOConfig

__all__ = ["PairArguments", "Recipe", "parse_recipe", "recipe_help"]


@dataclass
class PairArguments:
    """What happens to the pairs before training.

    Args:
        drop_unusable_pairs: Leave out pairs with an empty or twice the same completion, which are
            an error otherwise.
        flip_rate: Share of the training pairs whose labels are swapped, in [0, 1].
        flip_seed: Seed of the draw.
        eval_dataset_name: Evaluation pairs that are not a split of `dataset_name`: a local file,
            all of whose rows are taken, or the split `dataset_test_split` of what has this name.
    """

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
class Recipe:
    """A parsed recipe.

    Attributes:
        script: Which data to load, as in `trl dpo`.
        training: Settings of the trainer.
        model: Which model to load, and LoRA and quantization.
        mixture: Data from several sources or local files, as in `trl dpo`.
        pairs: What happens to the pairs.
    """

    script: ScriptArguments
    training: PopRiskDPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    pairs: PairArguments


class _RecipeParser(TrlParser):
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
            raise UsageError(f"unknown key in the recipe: {', '.join(map(repr, unknown))}.{hint}")
        remaining: list[str] = super().set_defaults_with_config(**kwargs)
        return remaining


def parse_recipe(argv: Sequence[str]) -> Recipe:
    """Parse `--config config.yaml --key value ...`.

    Args:
        argv: Arguments; keys given here win over those of the YAML file.

    Raises:
        UsageError: If the file cannot be read, a key is unknown or a required one is missing.
        ValueError: If a value is not allowed.
    """
    argv = [part for item in argv for part in _split_config(item)]
    if not argv:
        raise UsageError("a recipe is missing: poprisk dpo --config CONFIG.yaml")
    if argv[-1] == "--config":
        raise UsageError("--config needs the path of a YAML file")
    for option, value in itertools.pairwise(argv):
        if option == "--config":
            check_config(Path(value))
    try:
        parsed = _parser().parse_args_and_config(argv)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise UsageError(f"the recipe is not valid YAML{place}") from error
    except TypeError as error:  # an unknown key inside `datasets:`
        raise UsageError(f"the recipe is not valid: {error}") from error
    recipe = Recipe(*parsed)
    if recipe.model.model_name_or_path is None:
        raise UsageError("model_name_or_path is missing: a name or a local directory")
    if not (recipe.script.dataset_name or recipe.mixture.datasets):
        raise UsageError("dataset_name is missing: a name, a local file or directory; or datasets")
    check_names(recipe.model.model_name_or_path, recipe.script.dataset_name)
    check_names(None, recipe.pairs.eval_dataset_name)
    return recipe


def recipe_help() -> str:
    """Every key with its default."""
    return str(_parser().format_help())


def _parser() -> TrlParser:
    types: Any = (
        ScriptArguments,
        PopRiskDPOConfig,
        ModelConfig,
        DatasetMixtureConfig,
        PairArguments,
    )
    return _RecipeParser(types, prog="poprisk dpo", allow_abbrev=False)


def _split_config(argument: str) -> list[str]:
    """`--config=x` as TRL's parser expects it: two arguments."""
    name, found, value = argument.partition("=")
    return [name, value] if found and name == "--config" else [argument]
