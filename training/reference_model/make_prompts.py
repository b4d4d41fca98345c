"""Makes the shipped prompts: drawn from a seed, kept where the model is right by a clear margin.

    python training/reference_model/make_prompts.py src/diffkv/data/reference \
        src/diffkv/data/prompts.jsonl

Each line holds a name, the prompt and the answer as text. The prompt alone determines the
answer, and the model gives it greedily, in float32 and in bfloat16.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from vocabulary import TOKEN_IDS, WORDS

from diffkv.lab.evaluation import tasks
from diffkv.lab.evaluation.tasks import Parts, pick

SHORTEST_PROMPT, LONGEST_PROMPT = 960, 1090
SMALLEST_MARGIN = 2.0
MAX_DRAWS = 100


Make = Callable[[np.random.Generator, int, int], Parts]
"""(generator, number of facts, number of asked ones) -> facts, question and answer."""


def of_task(task: Callable[..., Parts]) -> Make:
    """A task of the evaluation, with a load of its own."""
    return lambda rng, num_facts, num_asked: task(rng, WORDS, 0, 0, num_facts, num_asked)


def copy(rng: np.random.Generator, num_facts: int, num_asked: int) -> Parts:
    """A list of keys and values, of which the first are asked for."""
    facts, question, answer = WORDS.ask_copy(pick(rng, (*WORDS.keys, *WORDS.values), num_facts))
    return Parts(facts, question, answer[:num_asked])


# The first answer token comes out of the prefill, which reads no cache: no single-token answers.
KINDS = (
    ("needle-2", of_task(tasks.retrieval), 2, 2),
    ("needle-5", of_task(tasks.retrieval), 5, 5),
    ("recall-128", of_task(tasks.retrieval), 128, 8),
    ("recall-256", of_task(tasks.retrieval), 256, 20),
    ("chain-128", of_task(tasks.chain), 128, 24),
    ("chain-250", of_task(tasks.chain), 250, 32),
    ("copy-100", copy, 100, 40),
    ("sum-128", of_task(tasks.running_sum), 128, 12),
)
"""Name, task, facts and asked facts of each prompt."""


@torch.no_grad()
def smallest_margin(model: PreTrainedModel, prompt: str, answer: str) -> float:
    """The least lead in logits of a right answer token over its best rival.

    Negative where the model would answer wrong.
    """
    token_ids = torch.tensor([[TOKEN_IDS[word] for word in f"{prompt} {answer}".split()]])
    num_answers = len(answer.split())
    logits = model(token_ids, logits_to_keep=num_answers + 1).logits[0, :-1].float()
    answers = token_ids[0, -num_answers:, None]
    right = logits.gather(1, answers)[:, 0]
    rivals = logits.scatter(1, answers, -torch.inf).amax(-1)
    return (right - rivals).min().item()


def draw_prompt(
    rng: np.random.Generator, make: Make, load: tuple[int, int], models: list[PreTrainedModel]
) -> tuple[str, str, int, float]:
    """Draw questions until every model answers one with the margin.

    Returns:
        The prompt, the answer, the number of draws, and the smallest margin over the models in logits.

    Raises:
        ValueError: none of the draws has the margin.
    """
    for num_draws in range(1, MAX_DRAWS + 1):
        num_tokens = int(rng.integers(SHORTEST_PROMPT, LONGEST_PROMPT + 1))
        sample = tasks.compose(rng, WORDS, "easy", num_tokens, make(rng, *load))
        answer = " ".join(word for word, _ in sample.answer)
        margin = min(smallest_margin(model, sample.prompt, answer) for model in models)
        if margin > SMALLEST_MARGIN:
            return sample.prompt, answer, num_draws, margin
    raise ValueError(f"no prompt has the margin after {MAX_DRAWS} draws")


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
    lines = []
    for i, (name, make, *load) in enumerate(KINDS):
        rng = np.random.default_rng([args.seed, i])
        prompt, answer, num_draws, margin = draw_prompt(rng, make, (load[0], load[1]), models)
        lines.append(json.dumps({"name": name, "prompt": prompt, "answer": answer}) + "\n")
        print(
            f"{name:<10} prompt {len(prompt.split())} answer {len(answer.split()):>2} "
            f"tokens, draws {num_draws}, smallest margin {margin:.2f}"
        )
    args.out.write_text("".join(lines))


if __name__ == "__main__":
    main()
