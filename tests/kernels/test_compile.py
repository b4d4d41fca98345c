"""Machine code for GPUs that are not there: no spills, few enough registers, wide loads."""

import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("triton")
import compiling

NAMES = tuple(compiling.cases("k8v4-k4v2", 128, 4))

WITH_SUMS = ("attend", "finish", "recompute", "prepare", "decide", "append", "write", "gather")
"""Kernels that differ where sums of low tokens are kept."""

CHAINED = ("attend", "prepare")
"""Kernels that differ where requests can have closed rows."""

CASES = [
    *((name, False, True) for name in NAMES),
    *((name, True, True) for name in WITH_SUMS),
    *((name, False, False) for name in CHAINED),
]
"""(kernel, whether sums of low tokens are kept, whether there are chains)."""


SPILLED = {"count": 8, "report": 8, "attend": 32}
"""Bytes that are spilled at most, in none of the loops over tiles."""


@contextmanager
def compiler(folder: Path | None = None) -> Iterator[Callable[..., compiling.Code]]:
    """`compiling.code_of`, called where Triton compiles: here it may interpret.

    Args:
        folder: of another Triton than the one that is installed.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        if folder is not None:
            patch.syspath_prepend(folder)
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        version = process.submit(compiling.version).result()
    assert folder is None or folder.name == f"triton-{version}"
    with process:
        yield lambda *args, **kwargs: process.submit(compiling.code_of, *args, **kwargs).result()


@pytest.fixture(scope="module")
def code_of():
    """By the oldest Triton: GPU builds of vLLM come with it."""
    folders = sorted(Path(sys.prefix).glob("triton-*.*"))
    if not folders:
        pytest.skip("`make test` installs it")
    with compiler(folders[0]) as code_of:
        yield code_of


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_triton_compiles_too(newest_code_of, name):
    code = newest_code_of(name, "k8v4-k4v2", 128, 4, name in WITH_SUMS)
    assert code.stack_bytes <= SPILLED.get(name, 0), "registers spill"
    assert code.spills_of_tiles() == 0, "registers spill where it costs most"


@pytest.fixture(scope="module")
def newest_code_of():
    """By the Triton of this environment."""
    with compiler() as code_of:
        yield code_of


@pytest.mark.parametrize(
    ("name", "drops", "chained", "arch"),
    [
        *((*case, 90) for case in CASES),
        *((name, name in WITH_SUMS, True, arch) for name in NAMES for arch in (89, 120)),
    ],
)
def test_nothing_spills(code_of, name, drops, chained, arch):
    code = code_of(name, "k8v4-k4v2", 128, 4, drops, arch=arch, chained=chained)
    print(f"\n| {name} | sm_{arch} | {code.registers} | {code.shared_bytes} | {code.stack_bytes} |")
    assert code.stack_bytes <= SPILLED.get(name, 0), "registers spill"
    assert code.spills_of_tiles() == 0, "registers spill where it costs most"
    assert bool(code.stack_bytes) == bool(re.search(r"\b(LDL|STL)\b", code.sass))
    assert code.registers <= 255
    assert code.shared_bytes <= 48 << 10, "more shared memory than every GPU gives a block"


@pytest.mark.parametrize("quant", ["k8v4-k4v2", "k8v4g1x2-k4v2g2x4", "k8v8", "k4v1", "k16v16"])
def test_attention_loads_codes_16_bytes_at_a_time(code_of, quant):
    code = code_of("attend", quant, 128, 8)
    print(f"\n| attend {quant} | sm_90 | {code.registers} | {code.shared_bytes} |")
    assert code.stack_bytes <= SPILLED["attend"], "registers are spilled"
    assert code.spills_of_tiles() == 0, "registers spill where it costs most"
    wide = re.findall(r"LDGSTS\.E\.(?:BYPASS\.)?128|LDG\.E\.128", code.sass)
    assert len(wide) >= 2, "codes are not loaded 16 bytes at a time"
    assert "HMMA" in code.sass or "HGMMA" in code.sass, "no tensor-core products"
    assert quant == "k16v16" or "PRMT" in code.sass


@pytest.mark.parametrize(
    ("quant", "head_dim", "dtype"),
    [
        ("k8v2-k2v1g1x4", 64, "fp16"),
        ("k8v4-k4v2", 80, "bf16"),
        ("k4v4", 256, "bf16"),
        ("k8v4-k4v2", 96, "fp32"),
        ("k16v16", 128, "fp32"),
    ],
)
@pytest.mark.parametrize("name", ["attend", "prepare", "append", "write", "gather"])
def test_every_kind_of_layout_compiles(code_of, quant, head_dim, dtype, name):
    code = code_of(name, quant, head_dim, 16, dtype=dtype)
    assert code.shared_bytes <= 99 << 10, "more shared memory than Ada has"


@pytest.mark.parametrize(("head_dim", "dtype"), [(256, "fp32"), (256, "bf16"), (128, "fp32")])
@pytest.mark.parametrize("name", ["rotate", "lse", "sum"])
def test_long_vectors_fit_the_shared_memory(code_of, head_dim, dtype, name):
    code = code_of(name, "k8v4-k4v2", head_dim, 4, dtype=dtype)
    print(f"\n| {name} {head_dim} {dtype} | {code.registers} | {code.shared_bytes} |")
    assert code.shared_bytes <= 99 << 10, "more shared memory than Ada has"
