"""Whether keys and values fit what quantised vectors can be: looked at in the first prompts of a cache.

Scale and zero are float16, so elements beyond its largest saturate, and ones near its smallest vanish.
And what all keys of a head have in common, such as a large bias, widens the range of each vector, which
leaves few codes for what tells keys apart. A model with such keys or values must not lose silently.
"""

import torch
from torch import Tensor

from diffkv.quant import FLOAT16_MAX, MIN_SCALE

__all__ = ["COMMON", "LEAST", "ValueRange"]

LEAST = 8 * MIN_SCALE
"""Where a layer's largest element is below this, few of its elements are told apart."""

COMMON = 100.0 / 15
"""Norm of what a head's keys have in common, for each step of their codes, from which it is said.

With 4 bits it is 100: several times what the bundled models have, less than what costs them answers.
"""

LOOKS = 4
"""Prompts, or chunks of them, that are looked at in each layer."""


class ValueRange:
    """Notes the largest elements of each layer, on the device, without waiting for it.

    Args:
        num_layers: layers of the cache.
        device: the vectors' device.
        k_bits: fewest bits of a key in any tier.
        v_bits: fewest bits of a value in any tier.
        centred: whether keys are stored as differences from their row's centre.
    """

    def __init__(
        self, num_layers: int, device: torch.device, k_bits: int, v_bits: int, centred: bool
    ) -> None:
        self._k_bits, self._v_bits, self._centred = k_bits, v_bits, centred
        self._largest = torch.zeros(num_layers, 3, device=device)
        self._looks = [0] * num_layers
        self._is_read = True

    def look(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Note vectors as they are quantised: [num_tokens, num_kv_heads, head_dim], both."""
        if self._looks[layer] >= LOOKS or not key.numel():
            return
        self._looks[layer] += 1
        self._is_read = False
        common = key.float().mean(0).norm(dim=-1).amax()
        largest = torch.stack([key.abs().amax().float(), value.abs().amax().float(), common])
        torch.maximum(self._largest[layer], largest, out=self._largest[layer])

    def problem(self) -> str | None:
        """What does not fit, in a line; None if all does, or if nothing was looked at since.

        Waits for the device, so it is asked after a step. The first problem ends the search.
        """
        if self._is_read:
            return None
        self._is_read = True
        for layer, (key, value, common) in enumerate(self._largest.tolist()):
            found = (
                self._misfit(f"keys of layer {layer}", key, self._k_bits)
                or self._misfit(f"values of layer {layer}", value, self._v_bits)
                or self._hidden(layer, common)
            )
            if found:
                self._looks = [LOOKS] * len(self._looks)
                return found
        return None

    @staticmethod
    def _misfit(name: str, largest: float, bits: int) -> str | None:
        if bits == 16:
            return None
        if not largest <= FLOAT16_MAX:  # NaN too
            what = f"are cut off at {FLOAT16_MAX:g}"
        elif 0 < largest < LEAST:
            what = f"are hardly told apart below {LEAST:.0e}"
        else:
            return None
        return (
            f"{name} have elements up to {largest:.2g}, and quantised ones {what}: answers may be "
            f"wrong; compare with --quant k16v16, which keeps them"
        )

    def _hidden(self, layer: int, common: float) -> str | None:
        if self._k_bits == 16 or self._centred or common <= COMMON * (2**self._k_bits - 1):
            return None
        return (
            f"keys of layer {layer} have a part of norm {common:.0f} in common (a large bias, say), "
            f"which leaves few of their {self._k_bits}-bit codes for what tells them apart: answers may "
            f"be wrong; take keys of more bits, as in --quant k8v4"
        )
