"""The Triton backend against the eager one: in Triton's interpreter here, and on a GPU where there is one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyper_geom.contrastive import distance_info_nce

CASES = Path(__file__).with_name("_triton_cases.py")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def run_cases(path, device, **environment):
    command = [sys.executable, str(CASES), str(path), device]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("triton") / "cpu.json", "cpu", TRITON_INTERPRET="1")


def check(report):
    for case in report["cases"]:
        loss, *gradients = case["vs_eager"]
        assert loss < 1e-6, case
        x_and_y, c_and_scale = gradients[:2], gradients[2:]
        # The gradient of a half input is stored in half precision.
        assert max(x_and_y) < (1e-2 if case["half"] else 1e-5), case
        assert max(c_and_scale) < 1e-5, case
    assert report["edges"]["single"] == [0.0, 0.0]
    assert report["edges"]["empty"] == 0.0
    assert report["edges"]["nan"] is True
    assert report["edges"]["golden"] == pytest.approx(1.1024809829, abs=3e-7)
    assert report["edges"]["second_derivative"] == "RuntimeError"
    assert "float64" in report["edges"]["fp64"]
    assert max(report["compiled"]) < 1e-6
    assert set(report["opcheck"].values()) == {"SUCCESS"}


def test_interpreted_kernels_equal_eager(interpreted):
    check(interpreted)
    assert len(interpreted["cases"]) == 15


def test_interpreted_kernels_equal_fp64(interpreted):
    """The same against float64, so that an error shared with the eager float32 kernel shows."""
    for case in interpreted["cases"]:
        assert case["vs_fp64"][0] < 1e-6, case
        assert max(case["vs_fp64"][1:3]) < (1e-2 if case["half"] else 1e-5), case


def test_needs_cuda_or_the_interpreter():
    x = torch.eye(3)
    with pytest.raises(ValueError, match="CUDA"):
        distance_info_nce(x, x, logit_scale=1.0, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_kernels_equal_eager(tmp_path):
    check(run_cases(tmp_path / "gpu.json", "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_memory_stays_below_the_score_matrix():
    num = 16384
    x, y = (torch.randn(num, 128, device="cuda").div_(11).requires_grad_() for _ in range(2))
    distance_info_nce(x[:256], y[:256], logit_scale=10.0).backward()
    x.grad = y.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    distance_info_nce(x, y, logit_scale=10.0, backend="triton").backward()
    gradients = x.grad.nbytes + y.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - gradients < 0.25 * num * num * 4
