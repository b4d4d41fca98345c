"""Recurrent states beside attention, by config.json: which layers of a model have one, and of what size.

The sizes are those of vLLM's `MambaStateShapeCalculator`: a short convolution's last inputs, in the
model's dtype, and the state itself.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["ATTENTION", "DTYPE_BYTES", "NO_STATES", "States", "states_of"]

ATTENTION = ("full_attention", "attention")
"""Kinds of layers with full attention and no state, as config.json names them."""

RECURRENT = ("linear_attention", "mamba")
"""Kinds of layers with a state; the first is what transformers has come to call them all."""

QWEN_INTERVAL = 4
"""Of Qwen's layers every fourth has full attention, where config.json says nothing of it."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of an element, by the dtype's name."""


class States(NamedTuple):
    """Recurrent states of a model.

    Attributes:
        num_layers: layers with one.
        attend: whether those have full attention, too.
        num_bytes: of one request's in one layer, all tensor-parallel ranks together.
    """

    num_layers: int = 0
    attend: bool = False
    num_bytes: int = 0


NO_STATES = States()


def states_of(text: Mapping[str, Any], num_layers: int, element_bytes: int) -> States | None:
    """Find out what states the layers of a model have; None where that is not known.

    Args:
        text: content of a config.json, or its `text_config`.
        num_layers: layers of the model.
        element_bytes: bytes of an element of the model's dtype.

    Raises:
        KeyError: a size is missing.
    """
    kinds = list(text.get("layers_block_type") or text.get("layer_types") or ())
    num_recurrent = sum(kind in RECURRENT for kind in kinds)
    recurrent_bytes = DTYPE_BYTES.get(str(text.get("mamba_ssm_dtype")), element_bytes)
    if "linear_key_head_dim" in text:
        num_keys, num_values = (int(text[f"linear_num_{of}_heads"]) for of in ("key", "value"))
        key_dim, value_dim = (int(text[f"linear_{of}_head_dim"]) for of in ("key", "value"))
        interval = int(text.get("full_attention_interval") or QWEN_INTERVAL)
        num = num_recurrent if kinds else num_layers - num_layers // interval
        inputs = 2 * num_keys * key_dim + num_values * value_dim
        history = int(text["linear_conv_kernel_dim"]) - 1
        state = num_values * value_dim * key_dim
        return States(num, False, inputs * history * element_bytes + state * recurrent_bytes)
    attend = text.get("model_type") == "falcon_h1"  # in every layer, beside the state
    if "mamba_n_heads" in text and (attend or num_recurrent):
        expanded = int(text["mamba_expand"]) * int(text["hidden_size"])
        inner, size = int(text.get("mamba_d_ssm") or expanded), int(text["mamba_d_state"])
        inputs = inner + 2 * int(text["mamba_n_groups"]) * size
        num_bytes = inputs * (int(text["mamba_d_conv"]) - 1) + inner * size
        num = num_layers if attend else num_recurrent
        return States(num, attend, num_bytes * element_bytes)
    lightning = any(kind != 1 for kind in text.get("attn_type_list") or ())
    if lightning or any(name.startswith(("mamba_", "ssm_")) for name in text):
        return None
    return NO_STATES
