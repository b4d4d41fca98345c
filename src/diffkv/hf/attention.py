"""The attention function that transformers calls, and how a model gets it."""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

__all__ = ["IMPLEMENTATION", "attach", "detach"]

IMPLEMENTATION = "diffkv"
"""Name of the attention implementation, as `attn_implementation` takes it."""

UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
"""Arguments of an attention function that change what it computes in a way that the pages cannot."""

NOT_USED = (
    "use_cache=False hands whole sequences over at every step, and a model attached to DiffKV keeps "
    "them: leave it out, or call diffkv.hf.detach(model)"
)
NO_CACHE = (
    "this model is attached to DiffKV, and a forward pass came without its cache: pass "
    "past_key_values=DiffKVHFCache(model, ...), or call diffkv.hf.detach(model); guidance_scale is not "
    "supported, because generate's second forward pass has a cache of its own"
)

_before_attach: "weakref.WeakKeyDictionary[PreTrainedModel, str]" = weakref.WeakKeyDictionary()


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; shapes are [batch, heads, tokens, head_dim]."""
    cache, layer = getattr(key, "diffkv", (None, 0))
    uses_cache = kwargs.get("use_cache") is not False
    if cache is None:
        raise ValueError(NO_CACHE if uses_cache else NOT_USED)
    if not uses_cache and query.shape[2] > 1:
        raise ValueError(NOT_USED)
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if asked or dropout:
        raise ValueError(
            f"{type(module).__name__} wants {', '.join(asked) or 'dropout'}: not supported by DiffKV"
        )
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("a compressed cache has no gradients: use torch.no_grad()")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache._attend(layer, query, key, value, scale, attention_mask), None


def _padding_mask(
    attention_mask: Tensor | None = None, mask_function: Any = causal_mask_function, **kwargs: Any
) -> Tensor | None:
    """The mask that transformers makes for `_attention`: which tokens are no padding, or None.

    Raises:
        ValueError: the model attends otherwise than to all tokens before.
    """
    if mask_function is not causal_mask_function:
        raise ValueError(
            "this model, or this input, wants a mask that is not plainly causal (tokens that see later "
            "ones, or several texts packed in one row): not supported by DiffKV"
        )
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model attend by DiffKV; it then needs a DiffKVHFCache in every forward pass.

    Returns:
        The model.
    """
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    if before != IMPLEMENTATION:
        _before_attach[model] = before
        model.set_attn_implementation(IMPLEMENTATION)
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`.

    Returns:
        The model.
    """
    before = _before_attach.pop(model, None)
    if before is not None:
        model.set_attn_implementation(before)
    return model
