"""The operations for CPUs, in C++ that is compiled at first use.

Contracts are in `reference`. Results do not depend on the number of threads, nor on which other
requests are in a batch.
"""

from diffkv.kernels.cpu.decode import append, attend, plan_decode
from diffkv.kernels.cpu.quantize import dequantize, quantize
from diffkv.kernels.cpu.rotate import rotate
from diffkv.kernels.cpu.significance import significance
from diffkv.kernels.cpu.store import gather, release, store_prompt

__all__ = [
    "append",
    "attend",
    "dequantize",
    "gather",
    "plan_decode",
    "quantize",
    "release",
    "rotate",
    "significance",
    "store_prompt",
]
