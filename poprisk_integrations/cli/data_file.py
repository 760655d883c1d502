"""Reads rows from CSV and JSON files as they are written: a cell is text, "007" and "None" too.

The loaders of `datasets` guess types: of CSV "007" becomes 7 and the answer "None" becomes no
answer, of JSON "2020-01-01" becomes a time stamp. Here nothing is guessed, and what cannot be
read is refused with its file and line.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

from poprisk_integrations.cli.errors import UsageError

__all__ = ["check_parquet", "read_columns"]

_LONGEST_CELL = 2**31 - 1  # csv's own limit is 131,072 characters
_SIGNS = {
    b"version https://git-lfs": "is a Git LFS pointer: fetch the file itself (git lfs pull)",
    b"PAR1": "is a parquet file: name it .parquet",
    b"\x1f\x8b": "is compressed with gzip: add .gz to its name",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or export CSV",
    b"\xff\xfe": "is UTF-16, not UTF-8: save it as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8: save it as UTF-8",
}


def read_columns(path: Path, number_columns: Collection[str] = ()) -> dict[str, list[Any]]:
    """The columns of a file, row by row in its order.

    The name ends in .csv, .json or .jsonl, or in one of these and .gz; JSON is an array of objects,
    or one object per line. An empty cell of CSV is None, and all others are text but those of
    `number_columns`. What cannot be read is a UsageError with the line.
    """
    text = _text(path)
    is_csv = kind(path) == ".csv"
    rows = list(_csv_rows(text, path, set(number_columns)) if is_csv else _json(text, path))
    if not rows:
        _refuse(path, "has no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def kind(path: Path) -> str:
    """The suffix that names the format: of "a.jsonl.gz" it is ".jsonl"."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def check_parquet(path: Path) -> None:
    """Refuse what is no whole parquet file, or one without rows."""
    import pyarrow
    from pyarrow import parquet

    try:
        num_rows = parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        _refuse(path, "is not a whole parquet file", error)
    if num_rows == 0:
        _refuse(path, "has no rows")


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            _refuse(path, "is not a whole gzip file", error)
    if not raw.strip():
        _refuse(path, "is empty")
    for start, message in _SIGNS.items():
        if raw.startswith(start):
            _refuse(path, message)
    if raw[:200].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        _refuse(path, "is a web page, perhaps an error or a login page, not data")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        _refuse(path, f"line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}): save it as UTF-8")


def _csv_rows(text: str, path: Path, numbers: set[str]) -> Iterator[dict[str, Any]]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # newline: ends inside cells
    start = 1
    try:
        header = next(reader, [])
        _check_header(header, path)
        header = [name or "Unnamed: 0" for name in header]  # what pandas writes of its index
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                _refuse(path, f"line {start} has {len(cells)} cells, the first {len(header)}")
            if cells:
                row: dict[str, Any] = {
                    name: cell or None for name, cell in zip(header, cells, strict=True)
                }
                for name in numbers & row.keys():
                    row[name] = _number(row[name], name, path, start)
                yield row
            start = reader.line_num + 1
    except csv.Error as error:
        where = f"line {start}" if start >= reader.line_num else f"lines {start} to the end"
        _refuse(path, f"{where}: not CSV, a quotation mark may be missing", error)
    finally:
        csv.field_size_limit(limit)


def _check_header(header: list[str], path: Path) -> None:
    for name in header:
        if header.count(name) > 1:
            _refuse(path, f"has two columns {name!r}")
    if "" in header[1:]:
        _refuse(path, "line 1 has a column without a name")
    if len(header) == 1 and any(sign in header[0] for sign in ";\t|"):
        _refuse(path, f"has one column, {header[0]!r}: cells must be parted by commas")


def _number(cell: str | None, name: str, path: Path, line: int) -> float | None:
    try:
        return None if cell is None else float(cell)
    except ValueError:
        _refuse(path, f"line {line}: {cell!r} in column {name!r} is not a number")


def _json(text: str, path: Path) -> Iterator[dict[str, Any]]:
    if text.lstrip().startswith("["):
        for index, row in enumerate(_parse(text, path)):
            if not isinstance(row, dict):
                _refuse(path, f"entry {index} is {_shown(row)}, not an object")
            yield row
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may be in text
        if not line.strip():
            continue
        row = _parse(line, path, number, whole=text)
        if not isinstance(row, dict):
            _refuse(path, f"line {number} is {_shown(row)}, not an object")
        yield row


def _parse(text: str, path: Path, line: int = 1, whole: str | None = None) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            where = "" if whole is None else f"line {line}: "
            _refuse(path, f"{where}the key {double!r} occurs twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        if whole is not None and line == 1 and text.strip() == "{":
            _refuse(path, "is one object over several lines: rows must be an array, or a line each")
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        _refuse(path, f"{where}: not JSON ({error.msg}): {_shown(error.doc[error.pos :])}")
    except RecursionError:
        _refuse(path, f"line {line}: nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        _refuse(path, f"line {line}: not JSON", error)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text[:30]) + ("..." if len(text) > 30 else "")


def _refuse(path: Path, message: str, error: BaseException | None = None) -> NoReturn:
    reason = f" ({error})" if error is not None and str(error) else ""
    raise UsageError(f"{str(path)!r} {message}{reason}") from None
