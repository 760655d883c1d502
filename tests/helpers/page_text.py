"""What a page of `poprisk report` says, line by line, whatever it looks like."""

import re
from html.parser import HTMLParser

__all__ = ["page_text"]

_STARTS = {
    "h1": "# ", "h2": "## ", "h3": "### ", "p": "", "li": "- ", "summary": "> ", "dt": "",
    "dd": "= ", "figcaption": "note: ", "desc": "drawn: ", "caption": "table: ", "text": "",
    "th": "", "td": "",
}  # fmt: skip
_VOID = {"meta", "br", "img", "input", "link", "hr"}
_TICK = re.compile(r"-?[\d.]+(e-?\d+)?[GMkmµ]?|optimizer step")


class _Lines(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self._path: list[str] = []
        self._text = ""
        self._row: list[str] = []
        self._rows: list[str] = []
        self._legend: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self._path.append(tag)
        if tag in _STARTS:
            self._text = ""

    def handle_data(self, data: str) -> None:
        if {*self._path} & {*_STARTS}:
            self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        self._path.pop()
        text, start = " ".join(self._text.split()), _STARTS.get(tag)
        if tag == "text":
            if not _TICK.fullmatch(text):
                self._legend.append(text)
        elif tag in ("th", "td"):
            self._row.append(text)
        elif tag == "tr":
            self._rows.append(" | ".join(self._row))
            self._row = []
        elif tag == "table":
            if "figure" in self._path and len(self._rows) > 4:
                rest = f"... {len(self._rows) - 3} more rows ..."
                self._rows = [*self._rows[:2], rest, self._rows[-1]]
            self.lines += self._rows
            self._rows = []
        elif tag == "svg" and self._legend:
            self.lines.append(f"legend: {'; '.join(self._legend)}")
            self._legend = []
        elif start is not None:
            self.lines.append(f"{start}{text}")


def page_text(html: str) -> str:
    """Headings, paragraphs, legends and tables; of a chart's table the head and the outer rows."""
    parser = _Lines()
    parser.feed(html)
    parser.close()
    return "\n".join(parser.lines)
