"""Rows of a file: JSON, CSV, TSV, parquet, or a folder that Hugging Face ``datasets`` saved.

What is text is read by the standard library, row by row: columns of ``datasets`` have one type each, which rows of JSON need
not have, and it would take the answer 12.50 in a CSV for the number 12.5. A cell of a table that is a list in JSON
(``["12.50", "$12.50"]``) is that list; any other one is text as it stands, and an empty one nothing.
"""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from foveate.core.errors import FoveateError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = (".json", ".jsonl", ".ndjson")

Row = dict[str, Any]


def rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows, each with the words that say where it is: ``line 3`` or ``row 3``."""
    if not path.exists():
        raise FoveateError(f"data={str(path)!r}: no such file")
    if path.is_dir():
        return _numbered(_saved_rows(path))
    if path.suffix == ".parquet":
        return _numbered(_parquet_rows(path))
    return _opened(path, _table_rows if path.suffix in _DELIMITERS else _json_rows)


def _numbered(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _opened(path: Path, read: Callable[[Path, BinaryIO], Iterator[tuple[str, Row]]]) -> Iterator[tuple[str, Row]]:
    try:
        with path.open("rb") as file:
            yield from read(path, file)
    except OSError as error:
        raise FoveateError(f"data={str(path)!r}: cannot be read ({error.strerror or error})") from error


def _json_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, Row]]:
    """The objects of an array, or one in each line."""
    start = next((line for line in file if line.strip()), b"")
    file.seek(0)
    whole = start.removeprefix(BOM_UTF8).lstrip().startswith(b"[")
    for first, part in [(1, file.read())] if whole else enumerate(file, 1):
        if not part.strip():
            continue
        try:
            found = json.loads(part.rstrip())
        except ValueError as error:
            line = first - 1 + getattr(error, "lineno", 1)
            remedy = "" if path.suffix in _JSON else "; a table is known by its ending: .csv, .tsv or .parquet"
            raise FoveateError(
                f"data={str(path)!r}: line {line}: is not JSON ({getattr(error, 'msg', error)}){remedy}"
            ) from error
        for place, row in _numbered(found) if whole else [(f"line {first}", found)]:
            if not isinstance(row, dict):
                raise FoveateError(f"data={str(path)!r}: {place}: must be an object with image, question and answers")
            yield place, row


def _table_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, Row]]:
    """Rows of cells below a line with the columns' names."""
    text = TextIOWrapper(file, encoding="utf-8-sig", newline="")
    lines = csv.reader(text, delimiter=_DELIMITERS[path.suffix], strict=True)
    columns: list[str] = []
    try:
        for cells in lines:
            place = f"line {lines.line_num}"
            if not cells:
                continue
            if not columns:
                columns = cells
                twice = [name for number, name in enumerate(columns) if name in columns[:number]]
                if twice:
                    raise FoveateError(f"data={str(path)!r}: {place}: has two columns {twice[0]!r}; leave one of them out")
            elif len(cells) != len(columns):
                raise FoveateError(
                    f"data={str(path)!r}: {place}: has {len(cells)} cells for {len(columns)} columns; quote those "
                    "in which the separator stands"
                )
            else:
                yield place, {name: _cell(cell) for name, cell in zip(columns, cells)}
    except UnicodeDecodeError as error:
        raise FoveateError(f"data={str(path)!r}: is not UTF-8 behind line {lines.line_num}; save it as such") from error
    except csv.Error as error:
        raise FoveateError(f"data={str(path)!r}: line {lines.line_num}: is no line of a table ({error})") from error


def _cell(text: str) -> Any:
    """What stands in a cell of a table: a list, a text, or nothing."""
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text or None


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _missing(path) from error
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise FoveateError(f"data={str(path)!r}: is not a parquet file that can be read") from error


def _saved_rows(path: Path) -> Iterator[Row]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise _missing(path) from error
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise FoveateError(f"data={str(path)!r}: is no folder that datasets' save_to_disk wrote") from error
    if not isinstance(saved, Dataset):
        raise FoveateError(f"data={str(path)!r}: holds several splits; name the folder of one: {', '.join(sorted(saved))}")
    # As Arrow a picture stays the bytes or the path that were saved.
    for batch in saved.with_format("arrow").iter(batch_size=64):
        yield from batch.to_pylist()


def _missing(path: Path) -> FoveateError:
    return FoveateError(f"data={str(path)!r}: needs the package datasets; pip install 'foveate[data]'")
