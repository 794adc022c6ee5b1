"""Budgets as they are written on a command line: resident_bytes=250MB,precision=bf16."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from shoal.configs.errors import ConfigError
from shoal.configs.load import build_config
from shoal.configs.study import BudgetConfig

# Decimal, as disks and accelerators are sold and as `shoal plan` prints.
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(?P<unit>[kKMGT]?)B?")


def parse_quantity(text: str, where: str) -> float:
    """Return the number that `250MB`, `24kB`, `2e8` or `1.5G` stands for.

    Raises:
        ConfigError: it stands for none.
    """
    match = QUANTITY.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"{text!r} is no quantity", where=where, fix="for example 250MB or 2e8")
    return float(match["number"]) * UNITS[match["unit"].replace("K", "k")]


def parse_budgets(texts: Sequence[str]) -> dict[str, BudgetConfig]:
    """Return budgets by axis; conditions (precision, context, batch, tolerance) follow in commas.

    Raises:
        ConfigError: unknown axis or condition, a target that is no quantity, an axis twice.
    """
    budgets: dict[str, BudgetConfig] = {}
    for text in texts:
        (axis, target), *conditions = [part.partition("=")[::2] for part in text.split(",")]
        where = f"--budget {text}"
        tree: dict[str, Any] = {"axis": axis, "target": parse_quantity(target, where)}
        for key, value in conditions:
            tree[key] = value if key == "precision" else parse_quantity(value, where)
        if axis in budgets:
            raise ConfigError(f"{axis} is given twice", where=where)
        budgets[axis] = build_config(BudgetConfig, tree, where=where)
    return budgets
