"""One message for a framework that is not installed."""

from importlib.util import find_spec

__all__ = ["require_framework"]


def require_framework(module: str, pip_name: str) -> None:
    """Raise what to run if a framework is missing.

    Unlike a failing import it does not hide what is missing inside an installed framework.

    Args:
        module: Its top-level import name.
        pip_name: What pip calls it.

    Raises:
        ImportError: If it is not installed.

    Example:
        >>> require_framework("transformers", "transformers")
    """
    if find_spec(module) is None:
        raise ImportError(
            f"{pip_name} not found: this module plugs into it. Run: pip install {pip_name}"
        )
