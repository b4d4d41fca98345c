"""Launches: a kernel is found by what it was compiled for, and is the one that Triton would find."""

from collections import namedtuple

import pytest
import torch
import triton
import triton.language as tl
from backends import INTERPRETED

from diffkv.kernels.triton import launch as launching
from diffkv.kernels.triton.launch import launch

Param = namedtuple("Param", "name is_constexpr do_not_specialize")


class Kernel:
    """Stands in for one of Triton: says what it was asked to compile, and what then ran."""

    params = (
        Param("x_ptr", False, False),
        Param("stride", False, False),
        Param("N", False, True),
        Param("scale", False, False),
        Param("B", True, False),
    )

    def __init__(self):
        self.compiled, self.ran = [], []

    def __getitem__(self, grid):
        def compile_and_run(*args, **constants):
            number = len(self.compiled)
            self.compiled.append((args, constants))
            return Compiled(self, number)

        return compile_and_run


class Compiled:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *args: self.kernel.ran.append((self.number, grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "_launchers", {})
    return Kernel()


def test_the_same_kind_of_arguments_is_compiled_once(kernel):
    x = torch.zeros(64)
    launch(kernel, (3,), x, 128, 5, 0.5, B=8, num_warps=4)
    launch(kernel, (7, 2), x[4:], 256, 1, 1.5, B=8, num_warps=4)
    assert len(kernel.compiled) == 1
    assert kernel.ran == [(0, (7, 2, 1), (x.data_ptr() + 16, 256, 1, 1.5, 8))]


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(64)[1:]},
        {"x": torch.zeros(64).int()},
        {"stride": 1},
        {"stride": 24},
        {"stride": 1 << 40},
        {"n": 1 << 31},
        {"scale": 2},
        {"B": 16},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_another_kind_is_compiled_anew(kernel, other):
    def run(x, stride, n, scale, B, num_warps):
        launch(kernel, (1,), x, stride, n, scale, B=B, num_warps=num_warps)

    first = {"x": torch.zeros(64), "stride": 32, "n": 5, "scale": 0.5, "B": 8, "num_warps": 4}
    for case in (first, first | other, first | other, first):
        run(**case)
    assert len(kernel.compiled) == 2
    assert [number for number, *_ in kernel.ran] == [1, 0]


def test_another_device_has_its_own(kernel, monkeypatch):
    x = torch.zeros(8)
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        launch(kernel, (1,), x, 16, 5, 0.5, B=8)
    assert len(kernel.compiled) == 2 and [number for number, *_ in kernel.ran] == [0]


@triton.jit(do_not_specialize=["N"])
def _scaled_kernel(x_ptr, out_ptr, stride, N, scale, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i * stride, mask=i < N, other=0.0)
    tl.store(out_ptr + i, x * scale, mask=i < N)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "device", ["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_runs_as_triton_does(device):
    data = torch.randn(5000, device=device)
    for _ in range(2):
        for start, stride, num in ((0, 1, 100), (1, 1, 7), (4, 16, 64), (3, 17, 1), (0, 3, 1000)):
            x, out = data[start:], torch.zeros(num + 8, device=device)
            launch(_scaled_kernel, (-(-num // 64),), x, out, stride, num, 2.5, B=64)
            assert torch.equal(out[:num], x[: num * stride : stride] * 2.5)
            assert not out[num:].any()
