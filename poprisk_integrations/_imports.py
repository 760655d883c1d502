"""One message for every missing extra."""

from importlib.util import find_spec

__all__ = ["require"]


def require(*modules: str, extra: str) -> None:
    """Raise the pip line to run if a module of an optional extra is missing.

    Args:
        modules: Import names that the extra provides.
        extra: Name of the extra in pyproject.toml.

    Raises:
        ImportError: If one of them is not installed.

    Example:
        >>> require("torch", extra="hf")
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} not found. Run: pip install 'poprisk_integrations[{extra}]'"
        )
