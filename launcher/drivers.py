"""What NVIDIA's driver says of its devices to anybody who asks: no root, nothing is changed."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from xml.etree import ElementTree

SECONDS = 20
BROKEN_XIDS = frozenset({48, 62, 64, 74, 79, 92, 95, 119, 120, 140, 143})
"""Of the device, its memory or its links; the others are mostly faults of programs."""
XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")


@dataclass
class DriverFacts:
    """What is wrong with the devices, and what could be better."""

    version: str | None = None
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_driver() -> DriverFacts | None:
    """Ask `nvidia-smi`, and the kernel's log where it may be read; None where there is neither."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "-q", "-x"], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return DriverFacts(problems=[f"nvidia-smi does not answer within {SECONDS} s"])
    facts = parse_query(done.stdout) if done.returncode == 0 else DriverFacts()
    if done.returncode:
        words = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        facts.problems.append(f"nvidia-smi: {words[-1]} (exit code {done.returncode})")
    facts.problems += find_xids(_read_kernel_log())
    return facts


def parse_query(text: str) -> DriverFacts:
    """Read what `nvidia-smi -q -x` prints; fields a driver does not know are passed over."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        return DriverFacts(problems=[f"nvidia-smi gives no XML: {error}"])
    facts = DriverFacts(root.findtext("driver_version"))
    for number, device in enumerate(root.iter("gpu")):
        facts.problems += [f"GPU {number}: {problem}" for problem in _list_problems(device)]
        if device.findtext("persistence_mode") == "Disabled":
            facts.remarks.append(f"GPU {number}: persistence mode is off")
    return facts


def _list_problems(device: ElementTree.Element) -> list[str]:
    problems = []
    for volatile in device.findall("ecc_errors/volatile"):
        uncorrected = {field.tag: _count(field) for field in volatile if "uncorr" in field.tag}
        uncorrected |= {"double_bit": _count(volatile.find("double_bit/total"))}  # older drivers
        problems += [f"{count} ECC errors since its start ({name})"
                     for name, count in uncorrected.items() if count]  # fmt: skip
    said = {
        "retired_pages/pending_blacklist": "pages of its memory wait to be retired",
        "retired_pages/pending_retirement": "pages of its memory wait to be retired",
        "remapped_rows/remapped_row_pending": "rows of its memory wait to be remapped",
        "remapped_rows/remapped_row_failure": "rows of its memory could not be remapped",
    }
    problems += [text for path, text in said.items() if device.findtext(path) == "Yes"]
    action = device.findtext("gpu_recovery_action", "None")
    if action.strip() not in ("None", "N/A", ""):
        problems.append(f"the driver asks for: {action}")
    return problems


def _count(field: ElementTree.Element | None) -> int:
    text = (field.text or "") if field is not None else ""
    return int(text) if text.strip().isdigit() else 0


def find_xids(log: str) -> list[str]:
    """Return the errors of devices (Xid) in a kernel log, each once."""
    found = dict.fromkeys((place, int(number)) for place, number in XID.findall(log))
    return [f"Xid {number} in the kernel's log ({place})"
            for place, number in found if number in BROKEN_XIDS]  # fmt: skip


def _read_kernel_log() -> str:
    """Return it where this user may read it."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            ["dmesg"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        ).stdout
    return ""
