"""Values for fields of requests: those that make sense to a server, and those that make none."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "CHAT",
    "COMPLETION",
    "GOOD_SETTINGS",
    "JUNK",
    "LARGE",
    "MESSAGES",
    "MESSAGES_API",
    "MODEL",
    "MODEL_LEN",
    "RESPONSES",
    "TIER_SETTINGS",
    "TOKENIZE",
    "XARGS",
]

MODEL = "reference"
MODEL_LEN = 512

JUNK: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "x",
    "\U0001f999\u0000\u202e",
    "\ud800",
    -1,
    0,
    1,
    1.5,
    -0.5,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    2**31,
    2**63,
    -(2**63) - 1,
    10**40,
    "9" * 40,
    [],
    [None],
    [[[]]],
    {},
    {"a": {"b": [1, {"c": None}]}},
    ["x", 1, {}],
    {"type": "text"},
    {"": ""},
)
"""Values for any field."""

LARGE = 10**9
STRUCTURED: tuple[Any, ...] = (
    {"choice": ["k1", "v2"]},
    {"choice": []},
    {"regex": "k[0-9]"},
    {"regex": "("},
    {"json": "{"},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    {"json_object": True},
    {"grammar": 'root ::= "k1" | "v1"'},
    {"grammar": "nonsense"},
    {"choice": ["k1"], "regex": "a"},
    {"structural_tag": "{}"},
)
FORMATS: tuple[Any, ...] = (
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema"},
    {"type": "nonsense"},
    {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}},
)
GOOD_SETTINGS: tuple[dict[str, Any], ...] = (
    {"diffkv": "off"},
    {"diffkv": "on"},
    {"diffkv_alpha_high": 0},
    {"diffkv_alpha_low": "0"},
    {"diffkv_alpha_low": " 0 "},
    {"diffkv": "on", "diffkv_alpha_high": 0.0},
    {"diffkv_alpha_high": -0.0},
)
"""DiffKV's own that every engine takes."""

TIER_SETTINGS: tuple[dict[str, Any], ...] = (
    {"diffkv_alpha_high": 2},
    {"diffkv_alpha_high": 1e308},
    {"diffkv_alpha_high": "1.5"},
    {"diffkv_alpha_high": "1_0"},
    {"diffkv_alpha_high": "\u0663"},
)
"""Those that engines with two tiers take, and others refuse."""

XARGS: tuple[Any, ...] = (
    *GOOD_SETTINGS,
    *TIER_SETTINGS,
    {},
    {"other": 1},
    {"other": [1, "a"]},
    {"DIFFKV": "off"},
    {"diffkv": "of"},
    {"diffkv": ""},
    {"diffkv": "OFF"},
    {"diffkv": ["off"]},
    {"diffkv": 1},
    {"diffkv": math.nan},
    {"diffkv_alpha_high": -1},
    {"diffkv_alpha_high": math.nan},
    {"diffkv_alpha_low": math.inf},
    {"diffkv_alpha_high": 10**400},
    {"diffkv_alpha_high": "x"},
    {"diffkv_alpha_high": [1]},
    {"diffkv_alpha_high": []},
    {"diffkv_alpha_high": True},
    {"diffkv_alpha_low": 2, "diffkv_alpha_high": 1},
    {"diffkv": "off", "diffkv_alpha_high": 0},
    {"diffkv_alpha": 1},
    {"diffkv ": "off"},
    {"diffkv_alpha_low": None},
    {"diffkv_alpha_high": {}},
    {"diffkv\u0000": 1},
    {"diffkv": "\ud800"},
    "diffkv",
    [1],
)
"""Per-request settings: DiffKV's own, right and wrong, and others', which are let through."""

SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "n": (1, 2, 3, 0, -1, 16385, LARGE),
    "seed": (0, 7, 2**63 - 1, 2**63),
    "stop": ([" ;"], ";", [], [""], "", ["a"] * 5, "v"),
    "top_p": (1, 0.5, 0, 1.1),
    "top_k": (-1, 0, 1, 5, -2, LARGE),
    "min_p": (0, 0.1, 1, -1),
    "logit_bias": ({"20": 5}, {"20": -100, "21": 100}, {"512": 1}, {"-1": 1}, {"x": 1}),
    "frequency_penalty": (0, 0.5, -2, 3),
    "presence_penalty": (0, 0.5, 2, -3),
    "repetition_penalty": (1, 1.2, 0, -1),
    "min_tokens": (0, 1, 5, -1, LARGE),
    "stop_token_ids": ([3], [], [-1], [512], [LARGE]),
    "ignore_eos": (True, False),
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (True, False),
    "allowed_token_ids": ([20, 21, 22], [], [512], [-1]),
    "bad_words": (["k1"], ["v1", "v2"], [""], []),
    "truncate_prompt_tokens": (1, 5, -1, 0, LARGE),
    "truncation_side": ("left", "right", "top"),
    "logprob_token_ids": ([20, 21], [512]),
    "prompt_logprobs": (0, 1, 3, -1, 21),
    "length_penalty": (1, 0, -1),
    "use_beam_search": (True, False),
    "structured_outputs": STRUCTURED,
    "response_format": FORMATS,
    "priority": (0, 1, -5, 2**63),
    "cache_salt": ("a", "b", "b" * 128, "", "b" * 129, "a@b"),
    "kv_transfer_params": ({}, {"do_remote_prefill": True}, {"do_remote_decode": True, "x": []}),
    "return_token_ids": (True, False),
    "return_tokens_as_token_ids": (True,),
    "stream_options": ({"include_usage": True}, {"continuous_usage_stats": True}, {"x": 1}),
    "repetition_detection": ({"max_pattern_size": 2, "min_count": 2}, {"min_count": -1}),
    "request_id": ("a", "", "a" * 4000, "one\ntwo"),
    "session_id": ("a",),
    "user": ("somebody",),
    "model": (MODEL, "", "no-such-model"),
    "vllm_xargs": XARGS,
    "no_such_field": (1,),
}

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
PART = {"type": "text", "text": "<bos> k1 v2 ; ? k1"}
MESSAGES: tuple[Any, ...] = (
    [],
    [{}],
    [{"role": "user"}],
    [{"role": "nobody", "content": "k1"}],
    ["k1"],
    [[]],
    "k1",
    [{"role": "user", "content": [PART, PART]}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    [{"role": "system", "content": "k1"}, {"role": "assistant", "content": "v1"}],
    [{"role": "tool", "content": "v1", "tool_call_id": "a"}],
    [{"role": "user", "content": {}}],
    [{"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}],
)
CHAT: Mapping[str, tuple[Any, ...]] = {
    **SAMPLING,
    "max_completion_tokens": (1, 8, 0, -1, LARGE),
    "logprobs": (True, False),
    "top_logprobs": (0, 2, 21, -1),
    "echo": (True, False),
    "add_generation_prompt": (True, False),
    "continue_final_message": (True, False),
    "chat_template": ("{{ messages }}", "{% bad", ""),
    "chat_template_kwargs": ({"a": 1},),
    "tools": ([TOOL], [], [{}]),
    "tool_choice": ("none", "auto", "required", {"type": "function", "function": {"name": "look"}}),
    "reasoning_effort": ("low", "nonsense"),
    "thinking_token_budget": (0, 5, -1),
    "documents": ([{"text": "k1"}],),
}
COMPLETION: Mapping[str, tuple[Any, ...]] = {
    **SAMPLING,
    "logprobs": (0, 1, 3, 20, 21, -1),
    "echo": (True, False),
    "suffix": ("k1",),
    "add_special_tokens": (True, False),
    "prompt_embeds": ("AAAA",),
}
RESPONSES: Mapping[str, tuple[Any, ...]] = {
    **{
        name: SAMPLING[name]
        for name in (
            "top_p",
            "top_k",
            "seed",
            "stop",
            "stop_token_ids",
            "ignore_eos",
            "logit_bias",
            "priority",
            "presence_penalty",
            "repetition_penalty",
            "cache_salt",
            "structured_outputs",
            "vllm_xargs",
            "kv_transfer_params",
            "skip_special_tokens",
            "include_stop_str_in_output",
            "request_id",
            "model",
        )
    },
    "instructions": ("k1 v2 ;", ""),
    "previous_response_id": ("resp_x", ""),
    "store": (False, True),
    "top_logprobs": (0, 2, 21),
    "include": (["message.output_text.logprobs"], ["x"]),
    "truncation": ("auto", "disabled", "x"),
    "text": ({"format": {"type": "text"}}, {"format": {"type": "json_object"}}, {"format": 1}),
    "tools": ([{"type": "function", "name": "look", "parameters": {"type": "object"}}], [{}]),
    "tool_choice": ("none", "auto", "required"),
    "reasoning": ({"effort": "low"}, {"effort": "x"}),
    "metadata": ({"a": "b"},),
    "service_tier": ("auto", "x"),
}
MESSAGES_API: Mapping[str, tuple[Any, ...]] = {
    "system": ("k1 v2 ;", [PART], ""),
    "stop_sequences": ([";"], [""]),
    "top_k": SAMPLING["top_k"],
    "top_p": SAMPLING["top_p"],
    "tools": ([{"name": "look", "input_schema": {"type": "object"}}], [{}]),
    "tool_choice": ({"type": "auto"}, {"type": "x"}),
    "thinking": ({"type": "disabled"},),
    "cache_salt": SAMPLING["cache_salt"],
    "vllm_xargs": XARGS,
    "kv_transfer_params": SAMPLING["kv_transfer_params"],
}
TOKENIZE: Mapping[str, tuple[Any, ...]] = {
    "add_special_tokens": (True, False),
    "return_token_strs": (True, False),
    "model": SAMPLING["model"],
}
