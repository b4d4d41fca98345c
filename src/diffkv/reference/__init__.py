"""The contract of every operation, in plain torch: short, float32, loops allowed.

`kernels.cpu` and `kernels.triton` have the same names with the same signatures.
"""

from diffkv.reference.decode import append, attend, plan_decode
from diffkv.reference.quantize import dequantize, quantize
from diffkv.reference.rotate import rotate
from diffkv.reference.significance import significance
from diffkv.reference.store import gather, release, store_prompt

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
