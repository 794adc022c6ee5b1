"""Results kept on disk by what determines them, so that nothing is measured or scored twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.trainer.storage import open_aside, write_durable

FORMAT = 1  # raise when the same inputs would give another result than before


class ResultCache:
    """JSON results under hashed keys; a killed comparison finds what it finished."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, kind: str, facts: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """Return the stored result for `facts`, or compute and store it.

        Args:
            kind: First part of the file name.
            facts: Everything that determines the result, as plain values.
            compute: Makes the result, a tree for JSON.
        """
        if self.folder is None:
            return compute()
        plain = json.dumps({"format": FORMAT, "kind": kind} | facts, sort_keys=True)
        file = self.folder / f"{kind}-{hashlib.sha256(plain.encode()).hexdigest()[:24]}.json"
        stored = _read(file, plain)
        if stored is not None:
            return stored
        result = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = open_aside(file, alone=True)
        write_durable(aside, json.dumps({"facts": plain, "result": result}))
        aside.replace(file)
        return result


def _read(file: Path, facts: str) -> Any:
    """Return a stored result; None where there is none, or the file is not what was written."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None  # it is computed again, and replaced
    return tree["result"] if isinstance(tree, dict) and tree.get("facts") == facts else None
