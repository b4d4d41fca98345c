"""The operations for CPUs, in C++ that is compiled at first use.

Contracts are in `reference`. Results do not depend on the number of threads, nor on which other
requests are in a batch.
"""

from diffkv.kernels.cpu.decode import append as append
from diffkv.kernels.cpu.decode import attend as attend
from diffkv.kernels.cpu.decode import plan_decode as plan_decode
from diffkv.kernels.cpu.quantize import dequantize as dequantize
from diffkv.kernels.cpu.quantize import quantize as quantize
from diffkv.kernels.cpu.report import report as report
from diffkv.kernels.cpu.rotate import rotate as rotate
from diffkv.kernels.cpu.rows import centre_rows as centre_rows
from diffkv.kernels.cpu.rows import decide_rows as decide_rows
from diffkv.kernels.cpu.significance import significance as significance
from diffkv.kernels.cpu.store import gather as gather
from diffkv.kernels.cpu.store import release as release
from diffkv.kernels.cpu.store import store_prompt as store_prompt
