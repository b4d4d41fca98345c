"""The operations for NVIDIA GPUs, in Triton.

Contracts are in `reference`. The operations of a decode step neither wait for the device nor allocate
once they have run at a size, so that a step can be captured in a CUDA graph. Results do not depend on
which other requests are in a batch, but attention's last bits on whether they are a crowd (`attend`).
"""

from diffkv.kernels.triton.append import append as append
from diffkv.kernels.triton.attend import attend as attend
from diffkv.kernels.triton.gather import gather as gather
from diffkv.kernels.triton.plan import plan_decode as plan_decode
from diffkv.kernels.triton.quantize import dequantize as dequantize
from diffkv.kernels.triton.quantize import quantize as quantize
from diffkv.kernels.triton.release import release as release
from diffkv.kernels.triton.report import report as report
from diffkv.kernels.triton.rotate import rotate as rotate
from diffkv.kernels.triton.rows import centre_rows as centre_rows
from diffkv.kernels.triton.rows import decide_rows as decide_rows
from diffkv.kernels.triton.significance import significance as significance
from diffkv.kernels.triton.store import store_prompt as store_prompt
