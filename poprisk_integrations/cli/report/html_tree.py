"""HTML as a tree: text can only get into it as text."""

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

__all__ = ["details", "serialized", "table", "tag"]


def tag(name: str, *content: "Element | str | None", **attributes: str) -> Element:
    """An element.

    Args:
        name: Of the element.
        content: Children and text, in order; None for nothing.
        attributes: `class_` stands for `class`, other underscores for hyphens.

    Example:
        >>> serialized(tag("p", "a < b ", tag("b", "c"), class_="x"))
        '<p class="x">a &lt; b <b>c</b></p>'
    """
    element = Element(name, {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items()})
    last: Element | None = None
    for item in content:
        if isinstance(item, Element):
            element.append(item)
            last = item
        elif item is not None and last is None:
            element.text = (element.text or "") + item
        elif item is not None and last is not None:
            last.tail = (last.tail or "") + item
    return element


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    row_heads: bool = True,
) -> Element:
    """A table that scrolls in its own box where the page is narrow.

    Args:
        caption: What it is; read out first.
        columns: Heads.
        rows: Cells.
        row_heads: Whether a row's first cell names it.
    """
    head = tag("tr", *(tag("th", text, scope="col") for text in columns))
    body = [
        tag(
            "tr",
            *(
                tag("th", text, scope="row") if row_heads and index == 0 else tag("td", text)
                for index, text in enumerate(row)
            ),
        )
        for row in rows
    ]
    content = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", content, class_="scroll", tabindex="0", role="group", aria_label=caption)


def details(summary: str, *content: "Element | str | None", is_open: bool = False) -> Element:
    """Content behind a line that unfolds it."""
    element = tag("details", tag("summary", summary), *content)
    if is_open:
        element.set("open", "open")
    return element


def serialized(element: Element) -> str:
    """As HTML."""
    return ElementTree.tostring(element, encoding="unicode", method="html")
