"""Generate with an in-process engine, and count what its cache spent."""

import argparse
import contextlib
import gc
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffkv.quant import ConfigError
from diffkv.use import CacheUse
from diffkv.vllm_plugin.arguments import arguments_of, with_backends
from diffkv.vllm_plugin.front.config_file import with_config_file
from diffkv.vllm_plugin.front.memory import needed_bytes
from diffkv.vllm_plugin.options import Options

__all__ = [
    "Answer",
    "Result",
    "answer",
    "cache_use",
    "check_model",
    "engine",
    "engine_arguments",
    "engine_flags",
    "expected_lengths",
    "first_line",
    "generate",
    "refusals_in_one_line",
    "requests_in_one_line",
]

LETTERS_A_TOKEN = 2
"""Fewer than texts have, so that an estimate of their tokens is on the safe side."""

PYDANTIC_PREFIX = "Value error, "
"""How pydantic begins the message of a check that failed."""


@dataclass(frozen=True)
class Answer:
    """What an engine made of one prompt."""

    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Result:
    """The answers of a run, and what it spent.

    Attributes:
        answers: one for each prompt, in their order.
        cache: sums over requests when they ended; None with vLLM's own cache.
        preemptions: number of preemptions.
        page_bytes: size of a page; 0, like the next two, with vLLM's own cache.
        pages_peak: most pages held at once.
        running_peak: most requests at once.
    """

    answers: list[Answer]
    cache: CacheUse | None
    preemptions: int
    page_bytes: int = 0
    pages_peak: int = 0
    running_peak: int = 0


def check_model(model: str) -> None:
    """Refuse a folder that holds no model, before an engine says so at length.

    Raises:
        ConfigError: names the folder and what is missing.
    """
    path = Path(model)
    if "://" in model:  # an object store's, which vLLM fetches
        return
    looks_local = path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1
    if not looks_local:
        return
    if not path.is_dir():
        raise ConfigError(f"model folder {model} does not exist: give a folder or a model id")
    config = path / "config.json"
    if not config.is_file():
        raise ConfigError(f"model folder {model} has no config.json: it holds no model")
    try:
        settings = json.loads(config.read_text())
    except ValueError as error:
        raise ConfigError(f"{config} is not JSON: {error}") from None
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ConfigError(f"{config} has no model_type: it is no configuration of a model")
    weights = sorted(path.glob("*.safetensors"))
    if not weights and not any(path.glob("*.bin")):
        raise ConfigError(f"model folder {model} has no weights (*.safetensors or *.bin)")
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ConfigError(
                f"{file} is broken, copy or download it again: {first_line(error)}"
            ) from None


def first_line(error: Exception) -> str:
    """The line of an engine's error that says what is wrong, without what libraries put around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    checked = [line for line in lines if line.startswith(PYDANTIC_PREFIX)]
    if checked:
        return checked[0].removeprefix(PYDANTIC_PREFIX).split(" [type=")[0]
    return lines[0] if lines else repr(error)


def refuse_in_one_line(parser: Any, whose: str) -> None:
    """Make one of vLLM's argument parsers raise ConfigError where it would print its usage and exit."""

    def refuse(message: str) -> None:
        raise ConfigError(f"{message} (neither an option of diffkv nor of {whose})")

    parser.error = refuse


def engine_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Read command-line flags that are vLLM's own, under its own names.

    Raises:
        ConfigError: a flag that vLLM does not know, a bad value, or a file of flags (`--config`) that
            conflicts with the command.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False, allow_abbrev=False))

    refuse_in_one_line(parser, "vLLM's engine")
    for action in parser._actions:  # what is given counts, also where it is vLLM's default
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(with_config_file(parser, flags)))


def _checked(args: dict[str, Any], lengths: Sequence[int] | None) -> dict[str, Any]:
    """Refuse what DiffKV cannot do while a refusal is still one line, not a worker's traceback.

    Returns:
        The arguments; on a CPU with the KV memory that is needed, where they say nothing of memory.

    Raises:
        ConfigError: names what to change.
    """
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from diffkv.vllm_plugin.matrix import refuse
    from diffkv.vllm_plugin.options import options_of
    from diffkv.vllm_plugin.support import check_config, settle_prefix_caching

    if args.get("data_parallel_size", 1) > 1:  # LLM refuses it itself
        return args
    transfer, full = args.get("kv_transfer_config"), args
    if isinstance(transfer, dict):
        full = {**args, "kv_transfer_config": KVTransferConfig(**transfer)}
    config = EngineArgs(**full).create_engine_config(UsageContext.LLM_CLASS)
    options = options_of(config)
    if options is not None:
        check_config(config, options)
        caching = settle_prefix_caching(config, args.get("enable_prefix_caching"))
        args = {**args, "enable_prefix_caching": caching}
    elif transfer is not None:
        refuse(config)
    named = [args.get(name) for name in ("kv_cache_memory_bytes", "gpu_memory_utilization")]
    if named != [None, None] or config.device_config.device_type != "cpu":
        return args
    return {**args, "kv_cache_memory_bytes": needed_bytes(config, options, lengths)}


@contextlib.contextmanager
def refusals_in_one_line(
    args: dict[str, Any], lengths: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Start an engine inside: its failures to start are the user's to read, in one line.

    Args:
        args: arguments of vLLM's engine.
        lengths: tokens of each request to come, prompt and answer, if they are known.

    Yields:
        The arguments to start it with; on a CPU with the KV memory that is needed, where they say
        nothing of memory.

    Raises:
        ConfigError: what DiffKV or vLLM refuses of the engine's arguments.
    """
    try:
        yield _checked(args, lengths)
    except ConfigError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"vLLM cannot start: {first_line(error)}") from error


@contextlib.contextmanager
def requests_in_one_line() -> Iterator[None]:
    """Give vLLM requests inside: its refusals of them are the user's to read, in one line.

    Raises:
        ConfigError: what vLLM refuses.
    """
    from vllm.exceptions import VLLMClientError

    try:
        yield
    except (ValueError, VLLMClientError) as error:
        raise ConfigError(first_line(error)) from error


@contextlib.contextmanager
def engine(args: dict[str, Any], lengths: Sequence[int] | None = None) -> Iterator[Any]:
    """An engine for a while; arguments as of `refusals_in_one_line`."""
    from vllm import LLM

    with refusals_in_one_line(args, lengths) as settled:
        llm = LLM(**settled)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(
    prompts: Sequence[str],
    arguments: dict[str, Any],
    sampling: Sequence[dict[str, Any]],
    options: Options | None,
    progress: bool = True,
) -> Result:
    """Answer prompts with an engine of their own.

    Args:
        prompts: texts.
        arguments: arguments of vLLM's engine, the model among them.
        sampling: arguments of vLLM's SamplingParams, for each prompt.
        options: DiffKV's; None runs vLLM with its own cache.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: the engine cannot start, or a prompt does not fit the model.
    """
    args = engine_arguments(arguments, options)
    _sampling_params(sampling)  # bad ones are refused before the engine takes its time to start
    with engine(args, expected_lengths(prompts, sampling)) as llm:
        answers = answer(llm, prompts, sampling, progress)
        if options is None:
            return Result(answers, None, _preemptions(llm))
        ranks = llm.collective_rpc("diffkv_summary")
        totals = [rank["totals"] for rank in ranks]
        return Result(
            answers,
            cache_use(ranks),
            _preemptions(llm),
            ranks[0]["pool"]["page_bytes"],
            sum(each["pages_peak"] for each in totals),
            totals[0]["running_peak"],
        )


def expected_lengths(prompts: Sequence[str], sampling: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens of each request, answer included, as an estimate by its letters."""
    return [
        len(prompt) // LETTERS_A_TOKEN + each.get("max_tokens", 0)
        for prompt, each in zip(prompts, sampling, strict=True)
    ]


def engine_arguments(arguments: dict[str, Any], options: Options | None) -> dict[str, Any]:
    """Arguments of vLLM's engine for a run that is measured, with DiffKV or with vLLM's own cache.

    Unless asked for, prefix caching is off in both: a prompt that is read from a cache is not compressed
    anew.

    Raises:
        ConfigError: an argument that DiffKV sets itself was given, or another vLLM is installed.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from diffkv.vllm_plugin.support import check_version

    check_version()
    args = {"enable_prefix_caching": False, **arguments, "disable_log_stats": False}
    if options is None:
        return args
    ours = arguments_of(options)
    if "attention_config" in ours and "attention_config" in args:
        args["attention_config"] = with_backends(args["attention_config"])
    for name in ours:
        if name in args and name not in ("watermark", "attention_config"):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} does not go with DiffKV, which sets it: leave it out")
    return {**ours, **args}


def answer(
    llm: Any, prompts: Sequence[str], sampling: Sequence[dict[str, Any]], progress: bool = False
) -> list[Answer]:
    """Answer prompts with an engine that is running.

    Args:
        llm: vLLM's engine.
        prompts: texts.
        sampling: arguments of vLLM's SamplingParams, for each prompt.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: a prompt does not fit the model, or a bad argument of sampling.
    """
    _check_lengths(llm, prompts)
    params = _sampling_params(sampling)
    with requests_in_one_line():
        outputs = llm.generate(list(prompts), params, use_tqdm=progress)
    answers = []
    for output in outputs:
        first = output.outputs[0]
        length = len(output.prompt_token_ids)
        answers.append(Answer(length, list(first.token_ids), first.text, first.finish_reason))
    return answers


def _sampling_params(sampling: Sequence[dict[str, Any]]) -> list[Any]:
    from vllm import SamplingParams

    with requests_in_one_line():
        return [SamplingParams(**each) for each in sampling]


def _check_lengths(llm: Any, prompts: Sequence[str]) -> None:
    """Refuse a prompt that leaves no room for an answer, before there is a progress bar to disturb.

    Raises:
        ConfigError: says which prompt, and how long it is.
    """
    longest = llm.llm_engine.vllm_config.model_config.max_model_len
    tokenizer = llm.get_tokenizer()
    for number, prompt in enumerate(prompts, 1):
        num_tokens = len(tokenizer.encode(prompt))
        if num_tokens >= longest:
            raise ConfigError(
                f"prompt {number} has {num_tokens} tokens, but prompt and answer may have {longest} "
                f"together: shorten it, or raise --max-model-len"
            )


def _preemptions(llm: Any) -> int:
    return sum(
        int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )


def cache_use(ranks: list[dict[str, Any]]) -> CacheUse:
    """Join the ranks' summaries: bytes and pages add up, token counts are those of a head."""
    totals = [rank["totals"] for rank in ranks]
    tokens = totals[0]["num_tokens"]
    high, low, nominal_bits = (
        sum(each[name] for each in totals) / len(totals) for name in ("high", "low", "nominal_bits")
    )
    bf16 = sum(rank["pool"]["bf16_bytes_per_token"] for rank in ranks)
    return CacheUse(
        tokens,
        high,
        low,
        pages=sum(each["num_pages"] for each in totals),
        num_bytes=sum(each["num_bytes"] for each in totals),
        bf16_bytes=tokens * bf16,
        nominal_bytes=bf16 * nominal_bits / 16,
    )
