"""Chat over several turns: each prompt is the whole conversation, most of which is in the cache already.

    .venv/bin/python examples/chat_turns.py
    .venv/bin/python examples/chat_turns.py --model Qwen/Qwen2.5-7B-Instruct --no-prefix-caching

A turn goes on from the tokens that the one before has left in the cache, compressed. A client of
`diffkv serve` finds their number in `usage.prompt_tokens_details.cached_tokens`, if the server was
started with --enable-prompt-tokens-details.
"""

import argparse
import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams

from diffkv.cli.engine_options import model_folder
from diffkv.vllm_plugin import engine_args

SYSTEM = (
    "You are a patient guide to the night sky. You answer in plain words, with one example that can be "
    "seen without a telescope, and you never use more than three sentences."
)
QUESTIONS = (
    "Why do stars twinkle?",
    "Then why do planets twinkle less?",
    "Which of them can I see best in the evening?",
    "How do I find it in the sky?",
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a model that chats (default: smollm2)")
    parser.add_argument("--question", action="append", help="a turn; may be given several times")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer (default: 64)")
    parser.add_argument("--no-prefix-caching", action="store_true", help="compute every turn anew")
    return parser.parse_args()


def main() -> None:
    args = parse()
    llm = LLM(
        model_folder(args.model),
        enforce_eager=True,
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=not args.no_prefix_caching,
        disable_log_stats=False,  # for the time to the first token
        **engine_args(),
    )
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    chat = [{"role": "system", "content": SYSTEM}]
    for number, question in enumerate(args.question or QUESTIONS, 1):
        chat.append({"role": "user", "content": question})
        (output,) = llm.chat(chat, params, use_tqdm=False)
        answer = output.outputs[0].text
        chat.append({"role": "assistant", "content": answer})
        print(
            f"turn {number}: a prompt of {len(output.prompt_token_ids)} tokens, "
            f"{output.num_cached_tokens} of them cached; first token after "
            f"{output.metrics.first_token_latency * 1e3:.0f} ms\n"
            f"  {question}\n  {answer.strip()}"
        )


if __name__ == "__main__":
    main()
