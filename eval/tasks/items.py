"""Task files: JSON lines, plain or compressed, with every fault named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.configs.errors import DataError
from shoal.data_pipeline.sources import read_lines, resolve_path


def locate(path: str) -> Path:
    """Return the file a task names; `{samples}` stands for the samples shipped with the project.

    Raises:
        DataError: there is no such file.
    """
    file = Path(resolve_path(path))
    if not file.is_file():
        raise DataError("no such task file", where=file)
    return file


def read_items(
    path: Path, fields: dict[str, type | tuple[type, ...]], limit: int | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Read the records of a task file, each with the place it stands at.

    Args:
        path: JSON lines; .gz and .zst are unpacked.
        fields: Name and type of every field a record must have.
        limit: First records only.

    Returns:
        (file:line, record) pairs.

    Raises:
        DataError: unreadable, empty, or a record is broken; names file and line.
    """
    records: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(read_lines(path), 1):
        if limit is not None and len(records) == limit:
            break
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
            if not text.strip():
                continue
            record = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"not a line of JSON: {error}", where=place) from None
        _check_record(record, fields, place)
        records.append((place, record))
    if not records:
        raise DataError("holds no items", where=path)
    return records


def _check_record(record: Any, fields: dict[str, type | tuple[type, ...]], place: str) -> None:
    if not isinstance(record, dict):
        raise DataError("expected an object with " + ", ".join(fields), where=place)
    for name, kind in fields.items():
        if name not in record:
            raise DataError(
                f"field {name!r} is missing; there are {', '.join(record) or 'none'}", where=place
            )
        value = record[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"field {name!r} holds {type(value).__name__}", where=place)
        if value == "" or value == []:
            raise DataError(f"field {name!r} is empty", where=place)
