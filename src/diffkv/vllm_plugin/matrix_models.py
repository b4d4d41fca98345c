"""Models and layers in the table of what works with DiffKV."""

from diffkv.vllm_plugin import layers
from diffkv.vllm_plugin.matrix_row import (
    FAMILIES,
    NOT_TRIED,
    REFUSALS,
    REFUSED,
    TESTS,
    WITHOUT,
    WORKS,
    Row,
)

__all__ = ["MODELS"]

_STARTS = (f"{TESTS}test_refused_models.py::test_refused_before_a_worker_starts", *REFUSALS)
_DIVIDED = (
    f"{TESTS}test_divided.py::test_lossless_tokens_equal_stock",
    f"{TESTS}test_divided.py::test_tokens_equal_stock_in_several_processes",
    f"{TESTS}test_divided.py::test_tokens_of_two_ranks_equal_stock",
    f"{TESTS}test_divided.py::test_lossy_drift_is_bounded",
)
_IMAGES = (
    f"{TESTS}test_multimodal.py::test_tokens_equal_stock_and_only_the_same_picture_is_found",
    f"{TESTS}test_multimodal.py::test_lossy_drift_is_bounded",
)
_STATES = (
    f"{TESTS}test_states.py::test_lossless_tokens_equal_stock",
    f"{TESTS}test_states.py::test_tokens_of_two_ranks_in_several_processes_equal_stock",
    f"{TESTS}test_states.py::test_lossy_drift_is_bounded",
)
_LAYERS = ("tests/test_support_matrix.py::test_layer_refusals",)
_HYBRIDS = (
    "tests/gpu/test_hybrids.py::test_lossless_is_as_near_as_stock",
    "tests/gpu/test_hybrids.py::test_lossy_drift_is_bounded",
)


_ON_GPUS = tuple(
    Row(
        "models", f"{feature}, on a GPU", WORKS,
        "other layers keep vLLM's own backends and cache; with vLLM's second model runner", "", _HYBRIDS,
    )
    for feature in (
        "sliding windows in some layers (Gemma 3)",
        "chunked local attention in some layers (Llama 4)",
        "recurrent states beside full attention (Granite 4, Falcon-H1)",
        "linear attention beside full attention (Qwen3-Next)",
    )
)  # fmt: skip

MODELS = (
    *(
        Row("models", name, WORKS, "a tiny checkpoint equals vLLM's own cache", "", FAMILIES)
        for name in (
            "Llama 2 (MHA)", "Llama 3 (GQA)", "Mistral", "Mixtral",
            "Qwen 2.5 (QKV bias, tied embeddings)", "Qwen 3 (QK norm)", "Qwen 3 MoE",
            "head_dim 64, 80, 96, 128, 256",
        )
    ),
    Row(
        "models", "multimodal models", WORKS,
        "a tiny Idefics3 with images equals vLLM's own cache; prefixes are found where images are the "
        "same; by hand: Qwen 2.5 VL",
        "", _IMAGES,
    ),
    Row(
        "models", "recurrent states beside full attention (Granite 4, Falcon-H1), on a CPU", WORKS,
        "states keep vLLM's cache, and the KV memory is divided at the start; by hand: Qwen3-Next in "
        "bfloat16",
        "", _STATES,
    ),
    Row(
        "models", "Mamba's first version beside full attention (Jamba), on a CPU", REFUSED,
        "vLLM itself has no CPU kernel for it (selective_scan_fwd)", WITHOUT + ", on a GPU", _STARTS,
        lambda config: config.device_config.device_type == "cpu" and layers.has_mamba1(config),
        "Mamba's first version on a CPU, nor does vLLM",
    ),
    Row(
        "models", "linear attention (Qwen3-Next) on a CPU in another dtype than bfloat16", REFUSED,
        "vLLM's CPU kernel has that one only", "pass --dtype bfloat16", _STARTS,
        lambda config: config.device_config.device_type == "cpu"
        and layers.has_linear_attention(config)
        and str(config.model_config.dtype) != "torch.bfloat16",
        "linear attention in {config.model_config.dtype} on a CPU, nor does vLLM",
    ),
    Row(
        "models", "recurrent states in all layers (Mamba)", REFUSED, "no layer is left to compress",
        WITHOUT, _STARTS, layers.has_states_only, "models without layers that have full attention",
    ),
    Row(
        "models", "sliding windows in some layers (Gemma 3), on a CPU", WORKS,
        "those layers keep vLLM's cache, and the KV memory is divided at the start", "", _DIVIDED,
    ),
    Row(
        "models", "chunked local attention in some layers (Llama 4), on a CPU", WORKS,
        "likewise", "", (f"{TESTS}test_divided.py::test_chunks_equal_stock",),
    ),
    *_ON_GPUS,
    Row("models", "other recurrent states beside full attention (Jamba), on a GPU", NOT_TRIED),
    Row(
        "models", "sliding windows in all layers (Mistral 7B v0.1)", REFUSED,
        "no layer is left to compress",
        "pass --disable-sliding-window, which limits the context to the window, or serve the model "
        "without DiffKV",
        (f"{TESTS}test_models.py::test_sliding_window_is_refused_unless_disabled", *REFUSALS),
        layers.has_windows_only, "models with a sliding window in every layer",
        layer_argument="sliding_window",
    ),
    Row(
        "models", "attention in both directions over images (PaliGemma)", REFUSED,
        "only causal attention is implemented", WITHOUT, REFUSALS,
        lambda config: config.model_config.is_mm_prefix_lm,
    ),
    Row(
        "models", "MLA", REFUSED, "its cache is compressed already", "serve them without DiffKV",
        _STARTS, lambda config: config.model_config.use_mla,
        "MLA models (their cache is compressed already)",
    ),
    Row(
        "models", "encoder-decoder models", REFUSED, "only decoder attention is implemented",
        "serve them without DiffKV", _STARTS,
        lambda config: config.model_config.is_encoder_decoder,
    ),
    Row(
        "models", "models that do not generate", REFUSED, "pooling needs no cache",
        "serve them without DiffKV", _STARTS,
        lambda config: config.model_config.runner_type != "generate",
    ),
    Row(
        "models", "ALiBi", REFUSED, "the kernels have no position bias", WITHOUT,
        (*_STARTS, *_LAYERS), layers.has_alibi, layer_argument="alibi_slopes",
    ),
    Row(
        "models", "soft cap on attention scores", REFUSED, "the kernels have none", WITHOUT,
        (*_STARTS, *_LAYERS),
        lambda config: bool(
            getattr(config.model_config.hf_text_config, "attn_logit_softcapping", None)
        ),
        layer_argument="logits_soft_cap",
    ),
    Row(
        "models", "attention sinks as parameters (gpt-oss)", REFUSED, "the kernels have none", WITHOUT,
        (*_STARTS, *_LAYERS),
        lambda config: getattr(config.model_config.hf_text_config, "model_type", None) == "gpt_oss",
        layer_argument="sinks",
    ),
    Row(
        "models", "layers that share a KV cache", REFUSED, "each layer has pages of its own", WITHOUT,
        _LAYERS, layer_argument="kv_sharing",
    ),
)  # fmt: skip
