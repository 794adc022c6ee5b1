"""Who may change which checkpoints there are."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from shoal.configs.errors import PreflightError
from shoal.trainer.stores import hold_folder


def test_one_at_a_time_may_change_a_folder(tmp_path: Path) -> None:
    held = threading.Event()

    def hold() -> None:
        with hold_folder(tmp_path):
            held.set()

    begun = time.monotonic()
    with hold_folder(tmp_path):
        thread = threading.Thread(target=hold)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not held.is_set()
        with pytest.raises(PreflightError, match="for too long"), hold_folder(tmp_path, 0.1):
            pass
    thread.join(10)
    assert held.is_set() and time.monotonic() - begun < 10
