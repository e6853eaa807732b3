"""A table of tags (CSV) → rows by meaning, tags per row. Headers and separators are understood as people write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.listing import DatasetError, duplicates

# meaning → names of columns, lower case, `_` for spaces and hyphens
MEANINGS = {
    "id": ("id", "filename", "image", "file_name", "image_id"),
    "tags": ("tags", "tag", "labels", "label", "classes", "class"),
    "split": ("split", "subset", "set"),
}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
COLUMN_SEPARATORS = ",;\t"
TAG_SEPARATORS = ";|,"  # in the order in which they are looked for; white space comes last


def read_table(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table with a header: meaning of the column, or its own name where it has none → cell without outer spaces.

    UTF-8, with or without byte-order mark. Columns are separated by that one of COLUMN_SEPARATORS at which the header falls
    into columns that mean something.

    DatasetError where the file or a required meaning is missing, where two columns mean the same, or where a row has more or
    fewer cells than the header allows: tags separated by commas would otherwise be lost silently. A row may end after the
    last required column.
    """
    if not path.is_file():
        raise DatasetError([f"{path} is missing"])
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = max(COLUMN_SEPARATORS, key=lambda candidate: _understood(next(_lines(text, candidate))[1], required))
        (_, header), *lines = _lines(text, separator)
    except UnicodeDecodeError as error:
        raise DatasetError([f"{path} is not UTF-8 ({error}); save it as UTF-8"]) from error
    except csv.Error as error:
        raise DatasetError([f"{path} is no CSV: {error}"]) from error
    names = [_meaning(name) for name in header]
    problems = _header_problems(path, header, names, required)
    if problems:
        raise DatasetError(problems)
    shortest = 1 + max(names.index(name) for name in required)
    rows = []
    for number, cells in lines:
        if not shortest <= len(cells) <= len(names):
            allowed = f"{shortest} to {len(names)}" if shortest < len(names) else str(shortest)
            problems.append(f"{path} line {number}: {len(cells)} columns, not {allowed}; part tags by spaces or `;`")
        padded = [*cells, *[""] * len(names)][: len(names)]
        rows.append({name: cell.strip() for name, cell in zip(names, padded, strict=True)})
    if problems:
        raise DatasetError(problems)
    return rows


def _lines(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(Number of the line, cells) of all lines that are not empty; of an empty text a line without cells."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    empty = True
    for cells in reader:
        if cells:
            empty = False
            yield reader.line_num, cells
    if empty:
        yield 1, []


def _meaning(name: str) -> str:
    plain = "_".join(name.casefold().replace("-", " ").replace("_", " ").split())
    return next((meaning for meaning, names in MEANINGS.items() if plain in names), name.strip())


def _understood(header: Sequence[str], required: Sequence[str]) -> tuple[int, int]:
    """How many of the required meanings, and of all, a header has."""
    meanings = {_meaning(name) for name in header}
    return len(meanings & set(required)), len(meanings & set(MEANINGS))


def _header_problems(path: Path, header: Sequence[str], names: Sequence[str], required: Sequence[str]) -> list[str]:
    problems = []
    missing = [name for name in required if name not in names]
    if missing:
        columns = "; ".join(f"column {name!r} is missing ({', '.join(MEANINGS.get(name, (name,)))})" for name in missing)
        problems.append(
            f"{path}: {columns}; the first line is {', '.join(header)!r}, and it must name the columns, as `id,tags` does"
        )
    for name in duplicates(names):
        same = [column.strip() for column, meaning in zip(header, names, strict=True) if meaning == name]
        if len(set(same)) == 1:
            problems.append(f"{path}: column {same[0]!r} stands twice")
        else:
            problems.append(
                f"{path}: columns {' and '.join(map(repr, same))} both mean {name}; rename or remove one of them"
            )
    return problems


def split_tags(cells: Iterable[str], known: Collection[str] = ()) -> list[tuple[str, ...]]:
    """Cells of the column `tags` → tags per row, duplicates dropped. An empty cell gives (): no class is present.

    Tags are separated by `;` if any cell of the column holds one, else by `|`, else by `,` (names may then hold spaces),
    else by white space. known: names of classes, if they are settled; a cell or a part that is one of them stays whole.

    DatasetError names every cell that holds one of these separators beside the one of the column.
    """
    cells = list(cells)
    separator = next((mark for mark in TAG_SEPARATORS if any(mark in cell and cell not in known for cell in cells)), None)
    rows, unclear = [], []
    for cell in cells:
        parts = [cell] if cell in known else [part.strip() for part in cell.split(separator)]
        if separator is not None and any(mark in part for part in parts if part not in known for mark in TAG_SEPARATORS):
            unclear.append(cell)
        rows.append(tuple(dict.fromkeys(part for part in parts if part)))
    if unclear:
        raise DatasetError(
            [f"tags {cell!r}: other rows part tags by `{separator}`; part all by `;`" for cell in dict.fromkeys(unclear)]
        )
    return rows
