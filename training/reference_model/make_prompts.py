"""Makes the shipped prompts: drawn from a seed, kept where the model is right by a clear margin.

    python training/reference_model/make_prompts.py src/diffkv/data/reference \
        src/diffkv/data/prompts.jsonl

Each line holds a name, the prompt and the answer as text. The prompt alone determines the
answer, and the model gives it greedily, in float32 and in bfloat16.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tasks import Exam, exam, vocabulary
from transformers import AutoModelForCausalLM, PreTrainedModel

SHORTEST_PROMPT, LONGEST_PROMPT = 960, 1090
SMALLEST_MARGIN = 2.0
MAX_DRAWS = 100


@dataclass(frozen=True)
class PromptKind:
    """What one shipped prompt asks: an exam of `task` with so many facts and asked facts."""

    name: str
    task: str
    num_facts: int
    num_asked: int


# The first answer token comes out of the prefill, which reads no cache: no single-token answers.
KINDS = (
    PromptKind("needle-2", "list", 2, 2),
    PromptKind("needle-5", "list", 5, 5),
    PromptKind("recall-128", "list", 128, 8),
    PromptKind("recall-256", "list", 256, 20),
    PromptKind("chain-128", "chain", 128, 24),
    PromptKind("chain-250", "chain", 250, 32),
    PromptKind("copy-100", "copy", 100, 40),
    PromptKind("sum-128", "sum", 128, 12),
)


@torch.no_grad()
def smallest_margin(model: PreTrainedModel, question: Exam) -> float:
    """Return the least lead in logits of a right answer token over its best rival.

    Negative where the model would answer wrong.
    """
    token_ids = torch.tensor([question.prompt + question.continuation])
    num_answers = len(question.continuation)
    logits = model(token_ids, logits_to_keep=num_answers + 1).logits[0, :-1].float()
    answers = token_ids[0, -num_answers:, None]
    right = logits.gather(1, answers)[:, 0]
    rivals = logits.scatter(1, answers, -torch.inf).amax(-1)
    return (right - rivals).min().item()


def draw_prompt(
    rng: np.random.Generator, kind: PromptKind, models: list[PreTrainedModel]
) -> tuple[Exam, int, float]:
    """Draw exams until every model answers one with the margin.

    Returns:
        The exam, the number of draws, and the smallest margin over the models in logits.

    Raises:
        ValueError: none of the draws has the margin.
    """
    for num_draws in range(1, MAX_DRAWS + 1):
        num_prompt_tokens = int(rng.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1))
        question = exam(rng, kind.task, num_prompt_tokens, kind.num_facts, kind.num_asked)
        margin = min(smallest_margin(model, question) for model in models)
        if margin > SMALLEST_MARGIN:
            return question, num_draws, margin
    raise ValueError(f"kind: no {kind.name} prompt has the margin after {MAX_DRAWS} draws")


def main() -> None:
    """Parse the command line, draw the prompts and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="model folder")
    parser.add_argument("out", type=Path, help="file of JSON lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    models = [
        AutoModelForCausalLM.from_pretrained(args.folder, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    texts = vocabulary()
    lines = []
    for i, kind in enumerate(KINDS):
        rng = np.random.default_rng([args.seed, i])
        question, num_draws, margin = draw_prompt(rng, kind, models)
        prompt = " ".join(texts[token] for token in question.prompt)
        answer = " ".join(texts[token] for token in question.continuation)
        lines.append(json.dumps({"name": kind.name, "prompt": prompt, "answer": answer}) + "\n")
        print(
            f"{kind.name:<10} prompt {len(question.prompt)} answer {len(question.continuation):>2} "
            f"tokens, draws {num_draws}, smallest margin {margin:.2f}"
        )
    args.out.write_text("".join(lines))


if __name__ == "__main__":
    main()
