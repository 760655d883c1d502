"""Pages that are opened from a file of their own, each with a profile of its own."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import Loaded, load


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Loaded]:
    count = itertools.count()

    def open_page(html: str, **options: Any) -> Loaded:
        name = f"page-{next(count)}"
        (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        return load(tmp_path / f"{name}.html", tmp_path / name, **options)

    return open_page
