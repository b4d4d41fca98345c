"""Ask a chat model of your own over a compressed cache, with the settings published for it.

    .venv/bin/python examples/chat.py --model meta-llama/Meta-Llama-3-8B-Instruct
    .venv/bin/python examples/chat.py --model Qwen/Qwen2.5-7B-Instruct --uncompressed
    .venv/bin/python examples/chat.py --model Qwen/Qwen3-8B-AWQ --preset qwq-32b --thinking --samples 4
    .venv/bin/python examples/chat.py --model QuixiAI/Qwen3-30B-A3B-AWQ --tensor-parallel-size 2

`--preset auto` recognises the models that thresholds are published for, and takes the default for all
others. On a CPU, VLLM_CPU_OMP_THREADS_BIND='0|1' gives each of two ranks a core, and vLLM has no AWQ
kernel for experts there without AMX: take a model in bfloat16.
"""

import argparse
import os
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput

from diffkv import presets
from diffkv.cli.models import load_config
from diffkv.vllm_plugin import engine_args

QUESTIONS = (
    "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Think step by step.",
    "Name five rivers of Europe and the seas that they flow into.",
)
THINKING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "seed": 0}
"""What the authors of Qwen 3 ask for: decoded greedily, thinking models repeat themselves."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or a model id")
    parser.add_argument("--preset", default=presets.AUTO, help="as of diffkv serve (default: auto)")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--thinking", action="store_true", help="sample, and hide the thoughts")
    parser.add_argument("--samples", type=int, default=1, help="answers per question, if sampled")
    parser.add_argument("--max-tokens", type=int, help="default: 512, with --thinking 16384")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument(
        "--uncompressed", action="store_true", help="answer again with every token kept high"
    )
    args = parser.parse_args()
    if args.samples > 1 and not args.thinking:
        parser.error("--samples needs --thinking: greedy answers are all the same")
    return args


def show(title: str, answer: CompletionOutput, thinking: bool) -> None:
    print(f"-- {title}: {len(answer.token_ids)} tokens, ended by {answer.finish_reason}")
    text = answer.text
    if thinking:
        thoughts, ended, text = text.partition("</think>")
        print(f"({len(thoughts)} characters of thoughts)")
        text = text if ended else "no answer yet: raise --max-tokens"
    print(f"{text.strip()}\n")


def report(rank: int, summary: dict[str, Any]) -> None:
    totals, bf16 = summary["totals"], summary["pool"]["bf16_bytes_per_token"]
    tokens, high, low = totals["num_tokens"], totals["high"], totals["low"]
    per_token = totals["num_bytes"] / tokens
    print(
        f"rank {rank}: {tokens} tokens, means over heads: {high:.0f} high, {low:.0f} low, "
        f"{max(0, tokens - high - low):.0f} dropped; {per_token:.0f} bytes a token, bf16 {bf16}: "
        f"{bf16 / per_token:.2f} times smaller"
    )


def main() -> None:
    args = parse()
    if args.preset == presets.AUTO:
        preset, why = presets.choose(load_config(args.model))
    else:
        preset = presets.find(args.preset)
        why = preset.description
    print(f"preset {preset.name} ({why})\n")
    llm = LLM(
        args.model,
        enforce_eager=True,
        tensor_parallel_size=args.tensor_parallel_size,
        **engine_args(
            preset.quant,
            alpha_high=preset.alpha_high,
            alpha_low=preset.alpha_low,
            window=preset.window,
            policy=preset.policy,
        ),
    )
    questions = args.question or QUESTIONS
    chats = [[{"role": "user", "content": question}] for question in questions]
    settings = {"compressed": {}, "all tokens high": {"diffkv": "off"}}
    for name in list(settings)[: 2 if args.uncompressed else 1]:
        params = SamplingParams(
            **(THINKING if args.thinking else {"temperature": 0}),
            n=args.samples,
            max_tokens=args.max_tokens or (16384 if args.thinking else 512),
            extra_args=settings[name],
        )
        outputs = llm.chat(chats, params, use_tqdm=False)
        for question, output in zip(questions, outputs, strict=True):
            for answer in output.outputs:
                show(f"{question} ({name})", answer, args.thinking)

    for rank, summary in enumerate(llm.collective_rpc("diffkv_summary")):
        report(rank, summary)


if __name__ == "__main__":
    main()
