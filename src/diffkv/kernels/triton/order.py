"""Launches that overlap: where a kernel waits for the ones ahead, and lets the next begin.

On GPUs that can (`constants.overlaps`) a launch that is given `overlap` begins when every program of
the one ahead of it has called `launch_dependents`, or ended. What it then reads may not be there: only
`wait` returns after all launches ahead have ended and their writes can be seen. That holds for those
further ahead as well if every kernel that begins early waits itself before it ends. A launch that is not
given it begins when all ahead of it have ended.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from diffkv.kernels.triton.constants import INTERPRETED, overlaps

if not INTERPRETED:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
else:
    gdc_launch_dependents = gdc_wait = None

__all__ = ["launch_dependents", "overlap", "wait"]


@functools.cache
def overlap(device: torch.device) -> dict[str, Any]:
    """What a launch is given, so that it may begin before the one ahead has ended, where it can."""
    return {"PDL": True, "launch_pdl": True} if overlaps(device) else {"PDL": False}


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
