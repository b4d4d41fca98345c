"""Generate with an in-process engine, and count what its cache spent."""

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
from diffkv.vllm_plugin import engine_args
from diffkv.vllm_plugin.options import Options

__all__ = [
    "Answer",
    "Result",
    "as_answer",
    "cache_use",
    "check_lengths",
    "check_model",
    "engine",
    "engine_flags",
    "first_line",
    "generate",
    "refusals_in_one_line",
    "turned_on",
]

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
    """What a run made and spent.

    Attributes:
        answers: in the order of the prompts.
        cache: what requests held when they ended; None with vLLM's own cache.
        preemptions: of requests.
        page_bytes: of a page, as the next two 0 with vLLM's own cache.
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
        ConfigError: a flag that vLLM does not know, or a bad value.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))

    refuse_in_one_line(parser, "vLLM's engine")
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(list(flags)))
    return {name: value for name, value in given.items() if value != defaults[name]}


def _check_before_workers(args: dict[str, Any]) -> None:
    """Refuse what DiffKV cannot do while a refusal is still one line, not a worker's traceback.

    Raises:
        ConfigError: names what to change.
    """
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from diffkv.vllm_plugin.matrix import refuse
    from diffkv.vllm_plugin.options import options_of
    from diffkv.vllm_plugin.support import check_config

    transfer = args.get("kv_transfer_config")
    if transfer is None or args.get("data_parallel_size", 1) > 1:  # the latter LLM refuses itself
        return
    if isinstance(transfer, dict):
        args = {**args, "kv_transfer_config": KVTransferConfig(**transfer)}
    config = EngineArgs(**args).create_engine_config(UsageContext.LLM_CLASS)
    options = options_of(config)
    if options is None:
        refuse(config)
    else:
        check_config(config, options)


@contextlib.contextmanager
def refusals_in_one_line(args: dict[str, Any]) -> Iterator[None]:
    """Start an engine inside: its failures to start are the user's to read, in one line.

    Raises:
        ConfigError: what DiffKV or vLLM refuses of the engine's arguments.
    """
    try:
        _check_before_workers(args)
        yield
    except ConfigError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"vLLM cannot start: {first_line(error)}") from error


@contextlib.contextmanager
def engine(args: dict[str, Any]) -> Iterator[Any]:
    """An engine for a while."""
    from vllm import LLM

    with refusals_in_one_line(args):
        llm = LLM(**args)
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
        arguments: of vLLM's engine, the model among them.
        sampling: arguments of vLLM's SamplingParams, for each prompt.
        options: DiffKV's; None runs vLLM with its own cache.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: the engine cannot start, or a prompt does not fit the model.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    from diffkv.vllm_plugin.support import check_version

    check_version()
    args = {**arguments, "disable_log_stats": False}
    if options is not None:
        args = turned_on(options, args)
    try:
        params = [SamplingParams(**each) for each in sampling]
    except (ValueError, VLLMClientError) as error:
        raise ConfigError(first_line(error)) from error
    with engine(args) as llm:
        check_lengths(llm, prompts)
        try:
            outputs = llm.generate(list(prompts), params, use_tqdm=progress)
        except (ValueError, VLLMClientError) as error:
            raise ConfigError(first_line(error)) from error
        answers = [as_answer(output) for output in outputs]
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


def as_answer(output: Any) -> Answer:
    """What vLLM made of a prompt, in our words."""
    first = output.outputs[0]
    prompt_tokens = len(output.prompt_token_ids)
    return Answer(prompt_tokens, list(first.token_ids), first.text, first.finish_reason)


def check_lengths(llm: Any, prompts: Sequence[str]) -> None:
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


def turned_on(options: Options, arguments: dict[str, Any]) -> dict[str, Any]:
    """Add what turns DiffKV on to an engine's arguments, of which its watermark may be another.

    Raises:
        ConfigError: an argument that DiffKV sets itself was given.
    """
    ours = engine_args(**options.to_dict())
    for name in ours:
        if name in arguments and name != "watermark":
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} does not go with DiffKV, which sets it: leave it out")
    return {**ours, **arguments}


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
