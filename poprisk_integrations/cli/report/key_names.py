"""What the names of logged numbers mean."""

import re
from dataclasses import dataclass
from functools import cache

__all__ = ["Key", "natural", "parse_key"]

_SPLITS = {"eval": "eval", "val": "eval", "valid": "eval", "validation": "eval"}
_KEY = re.compile(r"(?:(train|eval|val|valid|validation|test)[_/])?(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Key:
    """A logged name in parts.

    Attributes:
        base: The quantity, as "loss" or "poprisk/open_fraction".
        split: "train", "eval" or "test".
        group: Of parameters, as "group0"; "" for all of them.
        kind: "step" or "epoch" where Lightning logs both; else "".
    """

    base: str
    split: str = "train"
    group: str = ""
    kind: str = ""


@cache
def parse_key(name: str) -> Key:
    """Take a logged name apart.

    Example:
        >>> parse_key("val_loss")
        Key(base='loss', split='eval', group='', kind='')
        >>> parse_key("eval_poprisk/kl_data").base
        'poprisk/kl_data'
        >>> parse_key("poprisk/group0/open_fraction")
        Key(base='poprisk/open_fraction', split='train', group='group0', kind='')
    """
    match = _KEY.fullmatch(name)
    assert match is not None or not name
    prefix, base = match.groups() if match else (None, name)
    split = _SPLITS.get(prefix or "train", prefix or "train")
    if base.startswith("poprisk/"):
        *groups, last = base.removeprefix("poprisk/").split("/")
        return Key(f"poprisk/{last}", split, "/".join(groups))
    kind = next((k for k in ("step", "epoch") if base.endswith(f"_{k}")), "")
    return Key(base.removesuffix(f"_{kind}") if kind else base, split, "", kind)


def natural(text: str) -> list[tuple[int, str]]:
    """Sort key by which group2 comes before group10.

    Example:
        >>> sorted(["group10", "group2"], key=natural)
        ['group2', 'group10']
    """
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)
    ]
