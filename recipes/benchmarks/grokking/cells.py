"""Which cells of learning rate and decay each arm runs: the best of a look with one other seed."""

from collections.abc import Iterable, Mapping

from grokking_scores import Cell

__all__ = ["POWER", "cells_of", "looked_at", "ranked"]

POWER: Cell = ("0.001", "1")  # learning rate and decay of Power et al.
EQUAL = ("paper", "soft-32")  # compared with AdamW at its settings too
BEST = 2
LIKE = {
    **{f"{kind}({of})": of for of in ("soft-5", "soft-32") for kind in ("norm", "ratio", "mask")},
    "snr-fresh": "soft-5",
    "snr-32": "soft-32",
    "grokfast": "AdamW",
}


def looked_at(arms: Iterable[str]) -> list[str]:
    """The arms that a look must hold for `cells_of` these; AdamW always."""
    return list(dict.fromkeys(["AdamW", *(LIKE.get(arm, arm) for arm in arms)]))


def ranked(rows: Iterable[Mapping[str, object]], arm: str) -> list[Cell]:
    """Cells of an arm in a look with one seed: first done, then highest held-out accuracy ever."""

    def cost(row: Mapping[str, object]) -> tuple[float, float]:
        done = int(str(row["finished_at"]))
        return (done if done > 0 else float("inf"), -float(str(row["accuracy_max"])))

    mine = sorted((row for row in rows if row["arm"] == arm), key=cost)
    return [(str(row["lr"]), str(row["weight_decay"])) for row in mine]


def cells_of(arm: str, look: list[dict]) -> list[Cell]:
    """The arm's best two; then, for the arms compared at equal settings, those of others.

    An arm that was not looked at takes the cells of the one it resembles (`LIKE`).

    Args:
        arm: Name.
        look: Member rows of the look.
    """
    cells = ranked(look, LIKE.get(arm, arm))[:BEST]
    more = [POWER] if arm in ("AdamW", *EQUAL) else []
    if arm in EQUAL:
        more += ranked(look, "AdamW")[:BEST]
    return cells + [cell for cell in more if cell not in cells]
