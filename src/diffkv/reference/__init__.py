"""The contract of every operation, in plain torch: short, float32, loops allowed.

`kernels.cpu` and `kernels.triton` have the same names with the same signatures.
"""

from diffkv.reference.decode import append as append
from diffkv.reference.decode import attend as attend
from diffkv.reference.decode import plan_decode as plan_decode
from diffkv.reference.quantize import dequantize as dequantize
from diffkv.reference.quantize import quantize as quantize
from diffkv.reference.report import report as report
from diffkv.reference.rotate import rotate as rotate
from diffkv.reference.rows import centre_rows as centre_rows
from diffkv.reference.rows import decide_rows as decide_rows
from diffkv.reference.significance import significance as significance
from diffkv.reference.store import gather as gather
from diffkv.reference.store import release as release
from diffkv.reference.store import store_prompt as store_prompt
