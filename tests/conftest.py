"""What all tests share: an environment without networks, and one thread a process."""

from __future__ import annotations

import os

import pytest

# Before any library is imported: the suite runs in parallel on few cores, and must not depend on
# what a hub would answer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "USE_HUB_KERNELS": "NO",
    "TOKENIZERS_PARALLELISM": "false",
}
if os.environ.get("SHOAL_GPU") != "1":  # what is expected of CPU ranks must not meet a GPU
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow ones first, so that two workers end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
