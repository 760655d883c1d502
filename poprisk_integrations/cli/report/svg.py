"""Figures as SVG elements that follow the colours of the page they stand in."""

import io
import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from matplotlib.figure import Figure

from poprisk_integrations.cli.report.palette import variable_of

__all__ = ["svg_element"]

_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_TEXT_STYLES = ("font-size", "font-weight", "text-anchor", "fill", "stroke", "opacity")


def svg_element(figure: Figure, name: str, title: str, description: str) -> Element:
    """A figure as part of an HTML page.

    Colours of the palette become the page's variables, text stays text in the page's font,
    coordinates are rounded to a tenth of a point, and names begin with `name`, so that several
    figures fit one page.

    Args:
        figure: With no colours but those of `palette.LIGHT`.
        name: An identifier, unique in the page.
        title: Accessible name.
        description: What a reader who does not see it is told.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=_NO_METADATA)
    # Our own renderer wrote it: this is no text from outside.
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    used = {m for e in root.iter() for v in e.attrib.values() for m in _REFERENCE.findall(v)}
    used |= {v[1:] for e in root.iter() for k, v in e.attrib.items() if _local(k) == "href"}
    for element in root.iter():
        _rewrite(element, name, used)
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "tabindex": "0",
        "aria-labelledby": f"{name}-title",
        "aria-describedby": f"{name}-desc",
        "class": "chart",
    }
    for tag, text in (("desc", description), ("title", title)):
        element = Element(tag, {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(0, element)
    return root


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _rewrite(element: Element, name: str, used: set[str]) -> None:
    attributes: dict[str, str] = {}
    for key, value in element.attrib.items():
        key = _local(key)
        if key == "id":
            if value not in used:
                continue
            value = f"{name}-{value}"
        elif key == "href":
            value = f"#{name}-{value[1:]}"
        elif key == "style" and element.tag in ("text", "tspan"):
            value = _text_style(value)
        elif key == "transform" and value.startswith("rotate(-0 "):
            continue
        value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
        value = _COLOUR.sub(_colour, value)
        if key in ("d", "x", "y", "width", "height", "transform"):
            value = _NUMBER.sub(lambda m: _rounded(m[0]), value)
            value = re.sub(r"\s*\n\s*", "", value) if key == "d" else value
            value = re.sub(r"([A-Za-z]) ", r"\1", value) if key == "d" else value
        if key in ("fill", "stroke") and value.startswith("var("):  # no attribute knows variables
            attributes["style"] = f"{attributes.get('style', '')}{key}: {value};"
        else:
            attributes[key] = value
    element.attrib = attributes


def _text_style(style: str) -> str:
    parts = [part.strip() for part in style.split(";")]
    kept = [part for part in parts if part.partition(":")[0] in _TEXT_STYLES]
    if not any(part.startswith("font-size") for part in kept):  # matplotlib's short form `font:`
        kept += [f"font-size: {size}" for size in re.findall(r"\b[\d.]+px", style)[:1]]
    return "; ".join(kept)


def _colour(match: re.Match[str]) -> str:
    return variable_of(match[0].lower()) or match[0]


def _rounded(text: str) -> str:
    return f"{round(float(text), 1) + 0.0:g}"
