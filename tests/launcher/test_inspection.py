"""What a machine says of itself: its drivers, and what killed jobs have left there."""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from pathlib import Path

import pytest

from shoal.launcher import drivers, inspection
from shoal.launcher.drivers import find_xids, parse_query
from shoal.launcher.inspection import Request, find_shared_leftovers, inspect
from shoal.launcher.outcomes import scratch_folder

# Drivers.

SMI = """<?xml version="1.0" ?>
<nvidia_smi_log><driver_version>580.65</driver_version>
<gpu id="0"><persistence_mode>Enabled</persistence_mode><ecc_errors><volatile>
<sram_uncorrectable>0</sram_uncorrectable><dram_uncorrectable>N/A</dram_uncorrectable>
</volatile></ecc_errors><remapped_rows><remapped_row_pending>No</remapped_row_pending>
</remapped_rows><gpu_recovery_action>None</gpu_recovery_action></gpu>
<gpu id="1"><persistence_mode>Disabled</persistence_mode><ecc_errors><volatile>
<dram_uncorrectable>2</dram_uncorrectable></volatile></ecc_errors><remapped_rows>
<remapped_row_pending>Yes</remapped_row_pending></remapped_rows>
<gpu_recovery_action>Reset</gpu_recovery_action></gpu>
<gpu id="2"><ecc_errors><volatile><double_bit><total>1</total></double_bit></volatile>
</ecc_errors><retired_pages><pending_blacklist>Yes</pending_blacklist></retired_pages></gpu>
</nvidia_smi_log>"""


def test_what_drivers_say_is_read() -> None:
    facts = parse_query(SMI)
    assert facts.version == "580.65"
    assert facts.problems == [
        "GPU 1: 2 ECC errors since its start (dram_uncorrectable)",
        "GPU 1: rows of its memory wait to be remapped",
        "GPU 1: the driver asks for: Reset",
        "GPU 2: 1 ECC errors since its start (double_bit)",
        "GPU 2: pages of its memory wait to be retired",
    ]
    assert facts.remarks == ["GPU 1: persistence mode is off"]
    log = "[1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n"
    log += "[2.0] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, a fault of the program\n"
    assert find_xids(log * 2) == ["Xid 79 in the kernel's log (PCI:0000:3b:00)"]
    assert parse_query("no XML").problems


def test_a_driver_that_fails_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "_read_kernel_log", str)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert drivers.read_driver() is None, "no nvidia-smi is no fault"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho Unable to determine the device handle: Unknown Error\nexit 9\n"
    )
    tool.chmod(0o755)
    facts = drivers.read_driver()
    assert facts is not None
    assert facts.problems == [
        "nvidia-smi: Unable to determine the device handle: Unknown Error (exit code 9)"
    ]


# What is left behind.


def test_old_shared_memory_of_ours_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "SHARED_MEMORY", tmp_path)
    for name, age in {
        "nccl-old": 9999,
        "nccl-new": 0,
        "sem.other": 9999,
        "torch_used": 9999,
    }.items():
        (tmp_path / name).write_bytes(b"x" * 4096)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with (tmp_path / "torch_used").open("rb") as file:
        used = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert find_shared_leftovers() == [tmp_path / "nccl-old"]
        used.close()


def test_what_a_killed_job_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "shoal-dead").mkdir()
    (tmp_path / "shoal-dead" / "alive.lock").touch()
    with scratch_folder() as alive:
        assert alive.parent == tmp_path
        assert list(tmp_path.glob("shoal-*")) == [alive], "the next start clears it away"
        (tmp_path / "shoal-dead").mkdir()
        (tmp_path / "shoal-dead" / "alive.lock").touch()
        facts = inspect(Request(str(tmp_path), str(tmp_path / "x"), "localhost", []))
        assert str(tmp_path / "shoal-dead") in facts["leftovers"]
