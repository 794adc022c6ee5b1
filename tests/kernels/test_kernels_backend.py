"""Choosing kernels: `auto` chooses and says so; a name that does not run is an error."""

import pytest
import torch
import torch.nn.functional as F

from shoal.configs.errors import PreflightError
from shoal.configs.schema import KernelConfig
from shoal.kernels.backend import Kernels, resolve

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_chooses_the_fast_kernels(dtype):
    kernels = resolve(KernelConfig(), CPU, dtype)
    assert kernels == Kernels("sdpa", "grouped_mm", KernelConfig().loss_chunk_tokens)


def test_names_are_taken_at_their_word():
    config = KernelConfig(attention="reference", experts="loop", loss_chunk_tokens=7)
    assert resolve(config, CPU, torch.float32) == Kernels("reference", "loop", 7)


def test_a_kernel_that_does_not_run(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(F, "grouped_mm", broken)
    assert resolve(KernelConfig(), CPU, torch.float32).experts == "loop"
    assert "no such kernel" in caplog.text
    with pytest.raises(PreflightError, match="no such kernel"):
        resolve(KernelConfig(experts="grouped_mm"), CPU, torch.float32)
    monkeypatch.delattr(F, "grouped_mm")
    with pytest.raises(PreflightError, match="no grouped_mm"):
        resolve(KernelConfig(experts="grouped_mm"), CPU, torch.float32)
