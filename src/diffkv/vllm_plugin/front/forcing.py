"""An engine that reads given tokens after its prompts, and writes what it would have said to a file."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from diffkv.quant import ConfigError
from diffkv.use import CacheUse
from diffkv.vllm_plugin.front.offline import engine, engine_arguments, requests_in_one_line
from diffkv.vllm_plugin.front.session import Meter
from diffkv.vllm_plugin.options import Options

__all__ = ["ForcedEngine", "Script", "cache_dtypes", "forced_engine"]

PROCESSOR = "diffkv.vllm_plugin.worker.forced:Forced"


@dataclass(frozen=True)
class Script:
    """A prompt, and the tokens that follow it; none: those that the engine chooses itself."""

    prompt: list[int]
    tokens: list[int]


class ForcedEngine:
    """An engine that is running. See `forced_engine`."""

    def __init__(self, llm: Any, options: Options | None) -> None:
        self._llm = llm
        self._meter = Meter(llm, options)

    @property
    def vocabulary(self) -> int:
        """Entries of a distribution."""
        size: int = self._llm.llm_engine.vllm_config.model_config.get_vocab_size()
        return size

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and what follows it."""
        length: int = self._llm.llm_engine.vllm_config.model_config.max_model_len
        return length

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's own opening."""
        # verbose: a text may be longer than the model's context before it is cut
        ids: list[int] = self._llm.get_tokenizer().encode(text, verbose=False)
        return ids

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a user's message and the opening of its answer, by the model's chat template.

        A model without a template gets the bare text.
        """
        messages = [{"role": "user", "content": text}]
        tokenizer = self._llm.get_tokenizer()
        if not tokenizer.chat_template:
            return self.encode(text)
        opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer.encode(opened, add_special_tokens=False)
        return ids

    @property
    def end(self) -> int | None:
        """The token that ends an answer."""
        token: int | None = self._llm.get_tokenizer().eos_token_id
        return token

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        text: str = self._llm.get_tokenizer().decode(list(token_ids), skip_special_tokens=True)
        return text

    def read(
        self,
        scripts: Sequence[Script],
        steps: int,
        file: Path,
        report: Callable[[int], None] = lambda done: None,
    ) -> tuple[list[list[int]], CacheUse]:
        """Read scripts, all at once as far as there is room.

        Args:
            scripts: to read.
            steps: distributions of each: that after the prompt is the first.
            file: is written: a numpy array [scripts, steps, vocabulary] of float32 log-probabilities.
            report: is told how many scripts are done.

        Returns:
            Tokens of each script, and what their caches held when they ended.

        Raises:
            ConfigError: a script that does not fit the model.
        """
        from vllm import SamplingParams

        shape = (len(scripts), steps, self.vocabulary)
        np.lib.format.open_memmap(file, "w+", np.float32, shape).flush()
        llm_engine = self._llm.llm_engine
        for row, script in enumerate(scripts):
            asked = {"file": str(file), "row": row, "tokens": script.tokens}
            params = SamplingParams(
                temperature=0.0,
                max_tokens=steps,
                ignore_eos=True,
                detokenize=False,
                extra_args={"forced": asked},
            )
            with requests_in_one_line():
                llm_engine.add_request(str(row), {"prompt_token_ids": script.prompt}, params)
        tokens: dict[int, list[int]] = {}
        while llm_engine.has_unfinished_requests():
            for output in llm_engine.step():
                if output.finished:
                    tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
                    report(len(tokens))
        lengths = [len(script.prompt) + steps - 1 for script in scripts]
        return [tokens[row] for row in range(len(scripts))], self._use(lengths)

    def _use(self, lengths: Sequence[int]) -> CacheUse:
        """What requests of these lengths held when they ended, by the meter or in vLLM's own blocks."""
        use = self._meter.take()
        if use is not None:
            return use
        layers = [
            spec for rank in self._llm.collective_rpc("get_kv_cache_spec") for spec in rank.values()
        ]
        blocks = [-(-n // spec.block_size) for n in lengths for spec in layers]
        block_bytes = [spec.page_size_bytes for _ in lengths for spec in layers]
        tokens = sum(lengths)
        return CacheUse(
            tokens,
            high=tokens,
            pages=sum(blocks),
            num_bytes=sum(num * size for num, size in zip(blocks, block_bytes, strict=True)),
            bf16_bytes=tokens * sum(s.num_kv_heads * 2 * s.head_size * 2 for s in layers),
            # vLLM tells no codes from their scales
            nominal_bytes=tokens * sum(s.page_size_bytes / s.block_size for s in layers),
        )


def cache_dtypes() -> tuple[str, ...]:
    """Names that vLLM has for caches of its own, on whatever device."""
    from vllm.config.cache import CacheDType

    return get_args(CacheDType)


def _check_cache_dtype(name: str) -> None:
    """Refuse a cache that vLLM has not on this device, before an engine starts.

    On a GPU vLLM looks for a backend that has it, and says itself if there is none; on a CPU it does not
    look.

    Raises:
        ConfigError: says what there is.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    names = [each for each in CPUAttentionBackend.supported_kv_cache_dtypes if each != "auto"]
    if name not in names:
        raise ConfigError(f"vLLM has no such cache on a CPU: there are {', '.join(names)}")


@contextlib.contextmanager
def forced_engine(arguments: dict[str, Any], options: Options | None) -> Iterator[ForcedEngine]:
    """An engine for a while.

    Args:
        arguments: of vLLM's engine, the model among them.
        options: DiffKV's; None runs vLLM with its own cache.

    Raises:
        ConfigError: the engine cannot start.
    """
    if name := arguments.get("kv_cache_dtype"):
        _check_cache_dtype(name)
    args = engine_arguments(arguments, options)
    args["logits_processors"] = [*args.get("logits_processors", ()), PROCESSOR]
    # A step's tokens are to be there when the next one begins
    with engine({**args, "async_scheduling": False}) as llm:
        yield ForcedEngine(llm, options)
