"""Compile the Triton kernels for GPUs that are not there; where Triton interprets, it cannot."""

import importlib
import re
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffkv.kernels.triton import constants, rows, worklist, workspace
from diffkv.kernels.triton.closed import longer, most_closed_chunks
from diffkv.layout import PageLayout
from diffkv.quant import QuantConfig
from diffkv.segments import SEGMENT

LAYERS, HEADS = 32, 8
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

append, gather, prepare, rotate, significance = (
    importlib.import_module(f"diffkv.kernels.triton.{name}")
    for name in ("append", "gather", "prepare", "rotate", "significance")
)  # the package has functions of these names

BYTES, INTS, FLOATS = "*u8", "*i32", "*fp32"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPES = {
    "pages_ptr": BYTES,
    "codes_ptr": BYTES,
    "meta_ptr": "*fp16",
    "probs_ptr": "*fp16",
    "wants_ptr": "*i8",
    "tiers_ptr": "*i8",
    "first_ptr": "*i64",
    "ring_ends_ptr": "*i64",
    "partial_ptr": FLOATS,
    "lse_ptr": FLOATS,
    "most_ptr": FLOATS,
    "total_ptr": FLOATS,
    "sums_ptr": FLOATS,
    "leaf_ends_ptr": "*i64",
    "demotions_ptr": "*i64",
    "numbers_ptr": "*i64",
    "thresholds_ptr": FLOATS,
    "bounds_ptr": FLOATS,
    "scale": "fp32",
    "centres_ptr": "*bf16",
    "signs_ptr": FLOATS,
    "norm": "fp32",
}
MODEL = ("q_ptr", "output_ptr", "key_ptr", "value_ptr", "query_ptr", "x_ptr")


ROOMY = (90, 100)
"""Architectures with much shared memory."""


def version() -> str:
    """Of the Triton that compiles."""
    return triton.__version__


def kernel(module: str, name: str):
    return getattr(importlib.import_module(f"diffkv.kernels.triton.{module}"), name)


class Code(NamedTuple):
    """What became of a kernel."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    sass: str

    def spills_of_tiles(self) -> int:
        """Spilled registers that are read or written in the innermost loops with matrix products."""
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", self.sass)
        at = {int(address, 16): i for i, (address, _) in enumerate(found)}
        spills, end = 0, -1
        for i, (_, text) in enumerate(found):
            back = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
            first = at.get(int(back[1], 16), i) if back else i
            body = " ".join(text for _, text in found[first : i + 1])
            if end < first < i and "MMA" in body:
                spills, end = spills + len(re.findall(r"\b(?:LDL|STL)\b", body)), i
        return spills


def compiled(fn, constants, dtype, arch, **options):
    """Triton's binary of a kernel."""
    signature = {}
    for name in fn.arg_names:
        default = INTS if name.endswith("_ptr") else "i32"
        kind = f"*{dtype}" if name in MODEL else TYPES.get(name, default)
        signature[name] = "constexpr" if name in constants else kind
    if fn.__name__ == "_apply_kernel" or fn.__name__ == "_finish_kernel":
        signature["total_ptr"] = INTS
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def code_of(
    name: str,
    quant: str,
    head_dim: int,
    group: int,
    drops=False,
    dtype="bf16",
    arch=90,
    chained=True,
) -> Code:
    """Compile one of `cases`."""
    fn, constants, options = cases(quant, head_dim, group, drops, dtype, chained, arch in ROOMY)[
        name
    ]
    if "PDL" in constants:
        constants |= {"PDL": arch >= 90}
        options = {**options, "launch_pdl": arch >= 90}
    if dtype == "fp32" and "RAW_DOT" in constants:
        constants |= {"RAW_DOT": tl.float32, "CODE_DOT": tl.float32}
    binary = compiled(fn, constants, dtype, arch, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def tool(*args: str) -> str:
            command = [str(TOOLS / "cuobjdump"), *args, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("--dump-resource-usage"))
        shared = binary.metadata.shared
        return Code(int(usage[1]), int(usage[2]), shared, tool("--dump-sass"))


def cases(
    quant: str,
    head_dim: int,
    group: int,
    drops: bool = False,
    dtype: str = "bf16",
    chained: bool = True,
    roomy: bool = True,
) -> dict[str, tuple]:
    """(kernel, constants, options) of every kernel for one layout, as the wrappers launch them.

    Keys have centres where the layout says so, whether there are chains or not; `roomy` is for
    `workspace.Tuning.of`.
    """
    layout = PageLayout.derive(QuantConfig.parse(quant), head_dim, drops=drops)
    tiers, side = constants.tiers_of(layout), constants.vector_side(4, 2, head_dim)
    padded, vectors = triton.next_power_of_2(head_dim), constants.tile_vectors(head_dim)
    tables, table = {"L": LAYERS, "H": HEADS}, constants.Table(33, 64)
    paged = {**tables, "TABLE": table, "TIERS": tiers, "PAGE": layout.page_bytes}
    grouped = {
        "TIERS": tiers,
        "PAGE": layout.page_bytes,
        "G": group,
        "HEADS": max(constants.MIN_HEADS, group),
        "TILE": constants.tile_tokens(layout),
    }
    centred = {"CENTRED": layout.centred}
    products = {"RAW_DOT": tl.bfloat16, "CODE_DOT": tl.float16, "FAST": True, **centred}
    chunks = {**tables, "TABLE": table, "TOKENS": worklist.CHUNK_TOKENS}
    attention = {**grouped, **products, **chunks, "CHAINED": chained, "PDL": True}
    chain_width = 264 * chained
    closed = most_closed_chunks(layout, chain_width)
    rotated = {"BLOCK": head_dim & -head_dim, "ROTATED": True, "PDL": True}
    listed = {
        **chunks,
        **rotated,
        "G": group,
        "D": head_dim,
        "DP": padded,
        "VECTORS": prepare.VECTORS,
        "NEW": True,
        "PAGE": layout.page_bytes,
        **centred,
        "TIERS": tiers,
        "TILE": 64,
        "MAX": worklist.MAX_CHUNKS,
        "CHAIN_WIDTH": chain_width,
        "LONGER": longer(SEGMENT, is_crowd=False),
        "CLOSED": closed,
        "ROWS": 8,
        "COUNT": 1024,
    }
    dot = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
    tokens, queries = significance.tile(padded, dot.primitive_bitwidth // 8)
    scored = {
        "R_PADDED": 64,
        "H": HEADS,
        "G": group,
        "D": head_dim,
        "DP": padded,
        "DOT": dot,
        "QUERIES": 64,
        "ROWS": queries,
        "B": tokens,
    }
    summed_up = {**scored, "B": min(tokens, significance.SUM_TOKENS), "GIVEN": False}
    merged = {
        "HEADS": HEADS * group,
        "ITEMS": 32,
        "R_PADDED": 64,
        "QUERIES": 64,
        "ROWS": 64,
        "B": 128,
    }
    turned = {
        "H": HEADS,
        "D": head_dim,
        "DP": padded,
        "BLOCK": head_dim & -head_dim,
        "INVERSE": True,
        "DOT": dot,
        "PRECISION": "ieee",
        "B": 32,
        "K": rotate.matrix_rows(padded, dot.primitive_bitwidth // 8),
    }
    overlapping = {"PDL": True}
    ring = {**tables, "TABLE": table, "B": 128, **overlapping}
    exact, one_warp = {"enable_fp_fusion": False}, {"num_warps": 1}
    tiled = {**exact, "num_warps": constants.TILE_WARPS}
    finish = {**grouped, **rotated, "D": head_dim, "D_PADDED": padded, "MERGED": 16}
    finish["HEADS"] = constants.power_of_2(group)
    recomputed = {**grouped, **products, **tables, "PDL": True}
    tuning = workspace.Tuning.of(layout, DTYPES[dtype], fast=True, roomy=roomy)
    launch = {"num_stages": tuning.num_stages, "num_warps": tuning.num_warps}
    launch["maxnreg"] = tuning.max_registers
    counted = {**tables, "TABLE": table, "TIERS": tiers, **overlapping, "B": 1024, "SCAN": 1024}
    gathered = {**paged, **centred, **overlapping, "D": head_dim, "D_PADDED": padded}
    gathered |= {"STARTS": 64, "B": gather.READ_TILES * vectors}
    written = {**paged, **centred, **overlapping, "D": head_dim, "B": vectors}
    applied = {"HEADS": LAYERS * HEADS, "TABLE": table, "TIERS": tiers, "B": 256, "COUNT": 4096}
    sizes = [tier.tokens_per_page for tier in layout.tiers]
    reported = {
        "HEADS": LAYERS * HEADS,
        "HIGH": sizes[0],
        "LOW": sum(sizes[1:]),
        "MOST": 4,
        "B": 256,
    }
    decided = {**paged, "WINDOW": 64, "B": 512}
    decided_rows = {"BOUNDS": True, "B": rows.DECIDE_BLOCK, **overlapping}
    summed = {"T": rows.CENTRE_TOKENS, "C": rows.CENTRE_CHANNELS}
    centres = {**tables, **summed, "K": tiers[0].k, "D": head_dim, **overlapping}
    released = {"L": LAYERS, "H2": 2 * HEADS, "H2_PADDED": 2 * HEADS, "TABLE": table}
    released |= {"SCAN": 1024, **overlapping}
    appended = {**tables, "D": head_dim, "DP": padded, "PAGE": layout.page_bytes, "TIERS": tiers}
    appended |= {**centred, **rotated}
    return {
        "attend": (kernel("attend", "_attend_kernel"), attention, launch),
        "finish": (kernel("finish", "finish_kernel"), finish, {"num_stages": 2, "num_warps": 1}),
        "recompute": (
            kernel("finish", "recompute_kernel"),
            recomputed,
            {"num_stages": 2, "num_warps": 1},
        ),
        "prepare": (kernel("prepare", "_prepare_kernel"), listed, exact),
        "decide": (kernel("plan", "_decide_kernel"), decided, {}),
        "apply": (kernel("plan", "_apply_kernel"), applied, {}),
        "report": (kernel("report", "_report_kernel"), reported, {}),
        "finish plan": (kernel("plan", "_finish_kernel"), {}, one_warp),
        "append": (
            kernel("append", "_append_kernel"),
            appended,
            {**exact, "maxnreg": append.MAX_REGISTERS},
        ),
        "decide rows": (kernel("rows", "_decide_kernel"), decided_rows, {"num_warps": 8}),
        "fill rows": (
            kernel("rows", "_decide_kernel"),
            decided_rows | {"BOUNDS": False},
            {"num_warps": 8},
        ),
        "centre rows": (kernel("rows", "_centre_kernel"), centres, {"num_warps": 8}),
        "count": (kernel("store", "_count_kernel"), counted, {"num_warps": 8}),
        "enter": (kernel("store", "_enter_kernel"), ring, one_warp),
        "write": (kernel("store", "_write_kernel"), written, tiled),
        "count pages": (kernel("release", "_count_kernel"), released, {}),
        "give back": (kernel("release", "_give_back_kernel"), ring, one_warp),
        "gather": (kernel("gather", "_gather_kernel"), gathered, exact),
        "quantize": (kernel("quantize", "_quantize_kernel"), {"S": side, "T": vectors}, tiled),
        "dequantize": (kernel("quantize", "_dequantize_kernel"), {"S": side, "T": vectors}, tiled),
        "rotate": (kernel("rotate", "_rotate_kernel"), turned | overlapping, {"num_stages": 1}),
        "lse": (kernel("significance", "_lse_kernel"), scored, {"num_warps": 8}),
        "merge": (kernel("significance", "_merge_kernel"), merged, {}),
        "sum": (kernel("significance", "_sum_kernel"), summed_up, {"num_warps": 4}),
        "sum by lse": (
            kernel("significance", "_sum_kernel"),
            summed_up | {"GIVEN": True},
            {"num_warps": 4},
        ),
    }
