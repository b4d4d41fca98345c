"""Launches that overlap: where a kernel waits for the ones ahead, and lets the next begin.

On GPUs that can (`constants.overlaps`) a launch of a decode step begins when every program of the one
ahead of it has called `launch_dependents`, or ended. What it then reads may not be there: only `wait`
returns after all launches ahead have ended and their writes can be seen. That holds for those further
ahead as well if every kernel that begins early waits itself before it ends.
"""

import triton
import triton.language as tl

from diffkv.kernels.triton.constants import INTERPRETED

if not INTERPRETED:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:
    gdc_launch_dependents = gdc_wait = None

__all__ = ["launch_dependents", "wait"]


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until what all launches ahead have written can be seen."""
    if PDL:
        gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next launch begin, once all programs have come here."""
    if PDL:
        gdc_launch_dependents()
