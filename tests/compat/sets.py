"""The sets of versions that the contract is run on, one virtual environment each."""

from dataclasses import dataclass

__all__ = ["SETS", "TOOLS", "VersionSet"]

TOOLS = ("numpy", "pytest>=8.2", "pytest-timeout>=2.3", "scipy")  # what the tests need


@dataclass(frozen=True, kw_only=True)
class VersionSet:
    """What one environment is made of.

    Args:
        name: Name of its result file.
        python: The interpreter's version, as in "3.11".
        extras: Extras of this package that pip resolves.
        pins: Requirements beyond those of the extras; empty for the newest of everything.
        about: Why this set is here, for the table.
    """

    name: str
    python: str
    extras: tuple[str, ...]
    pins: tuple[str, ...] = ()
    about: str

    def requirements(self, wheel: str) -> list[str]:
        """Arguments of `pip install` for this set."""
        package = f"{wheel}[{','.join(self.extras)}]" if self.extras else wheel
        return [package, *self.pins]


SETS = (
    VersionSet(
        name="floor",
        python="3.10",
        extras=("hf", "lightning"),
        pins=(
            "torch==2.6.0",
            "transformers==4.51.0",
            "accelerate==1.4.0",
            "datasets==3.0.0",
            "lightning==2.5.0",
            "rich==13.0.0",
        ),
        about="lowest allowed",
    ),
    VersionSet(
        name="floor-trl",
        python="3.10",
        extras=("trl",),
        pins=(
            "torch==2.6.0",
            "trl==1.0.0",
            "transformers==4.56.2",  # the lowest that TRL 1.0.0 takes
            "accelerate==1.4.0",
            "datasets==4.7.0",  # as above
            "peft==0.14.0",
            "pytorch-lightning==2.5.0",
        ),
        about="lowest with TRL; pytorch_lightning",
    ),
    VersionSet(
        name="newest-3.10",
        python="3.10",
        extras=("trl", "lightning"),
        about="newest for Python 3.10",
    ),
    VersionSet(
        name="transformers-4",
        python="3.11",
        extras=("trl", "lightning"),
        pins=("torch==2.13.0", "transformers<5"),
        about="newest with transformers 4",
    ),
    VersionSet(
        name="newest-3.12",
        python="3.12",
        extras=("trl",),
        pins=("pytorch-lightning",),
        about="newest; pytorch_lightning",
    ),
    VersionSet(
        name="newest-3.13",
        python="3.13",
        extras=("trl", "lightning"),
        about="newest",
    ),
    VersionSet(
        name="torch-only",
        python="3.11",
        extras=(),
        pins=("torch==2.13.0",),
        about="the bare package",
    ),
)
