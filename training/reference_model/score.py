"""Scores a model folder on the tasks: prints a table, and the same as JSON in the last line.

    python training/reference_model/score.py src/diffkv/data/reference

Needs transformers and the folder alone. The prompt is full of facts or filler, the continuation
is teacher-forced. `accuracy` is the share of right answer tokens, `exact` the share of samples
whose answer tokens are all right; answer tokens that are copied from the question do not count.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from hard_tasks import HARD_EXAMS, hard_exam
from tasks import TASKS, Exam, exam
from transformers import AutoModelForCausalLM, PreTrainedModel

EXAMS = (*TASKS, *HARD_EXAMS)


@dataclass(frozen=True)
class Score:
    """Result of one task at one prompt length."""

    task: str
    num_prompt_tokens: int
    num_samples: int
    accuracy: float
    exact: float


@torch.no_grad()
def right_answers(model: PreTrainedModel, question: Exam) -> np.ndarray:
    """Tell of every scored token of the continuation whether the model ranks it first.

    Returns:
        [num_scored] bool.
    """
    token_ids = torch.tensor([question.prompt + question.continuation], device=model.device)
    num_answers = len(question.continuation)
    logits = model(token_ids, logits_to_keep=num_answers + 1).logits[0, :-1]
    is_right = logits.argmax(-1) == token_ids[0, -num_answers:]
    return is_right.cpu()[torch.tensor(question.is_scored)].numpy()


def score_task(
    model: PreTrainedModel, task: str, num_prompt_tokens: int, num_samples: int, seed: int
) -> Score:
    """Score one task at one prompt length on exams drawn from the seed."""
    rng = np.random.default_rng([seed, EXAMS.index(task), num_prompt_tokens])
    draw = exam if task in TASKS else hard_exam
    samples = [right_answers(model, draw(rng, task, num_prompt_tokens)) for _ in range(num_samples)]
    accuracy = float(np.concatenate(samples).mean())
    exact = float(np.mean([is_right.all() for is_right in samples]))
    return Score(task, num_prompt_tokens, num_samples, accuracy, exact)


def table(scores: Iterable[Score]) -> str:
    """Format the scores as a Markdown table, one row per task and length."""
    lines = ["| task | prompt tokens | samples | accuracy | exact |", "|---|---:|---:|---:|---:|"]
    for row in scores:
        lines.append(
            f"| {row.task} | {row.num_prompt_tokens} | {row.num_samples} "
            f"| {row.accuracy:.4f} | {row.exact:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=EXAMS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype))
    model.eval().to(args.device)
    scores = [
        score_task(model, task, num_prompt_tokens, args.samples, args.seed)
        for task in args.tasks
        for num_prompt_tokens in args.lengths
    ]
    print(table(scores))
    result = {"dtype": args.dtype, "seed": args.seed, "scores": [asdict(row) for row in scores]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
