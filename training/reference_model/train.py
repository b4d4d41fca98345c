r"""Trains a reference model from nothing, on one CPU core or on a GPU, then exports it.

    python training/reference_model/train.py --out src/diffkv/data/reference
    python training/reference_model/train.py --preset reference-128 --device cuda --workers 14 \
        --out src/diffkv/data/reference-128

On a CPU the run is a function of the seed, the schedule and the number of threads, on one kind of
CPU, as long as `--minutes` is enough for the schedule; otherwise the learning rate falls by the
clock. On a GPU it is not repeated bit by bit.
"""

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from export import export
from model import ReferenceModel
from presets import PRESETS, Preset
from streams import training_batch
from torch import Tensor

LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
DECAY_SHARE = 0.4
LAST_LEARNING_RATE_FACTOR = 0.02
OTHER_TOKEN_SHARE = 0.08
OTHER_TOKEN_WEIGHT = 0.05
STEPS_PER_REPORT = 50
STEPS_PER_CHECKPOINT = 200


@dataclass(frozen=True)
class Phase:
    """Steps of the schedule with one sequence length."""

    num_tokens: int
    batch_size: int
    num_steps: int


def parse_schedule(text: str) -> list[Phase]:
    """Read `T:batch:steps,...`."""
    return [Phase(*map(int, phase.split(":"))) for phase in text.split(",")]


def make_optimizers(model: ReferenceModel) -> list[torch.optim.Optimizer]:
    """Use Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [weight for weight in model.layers.parameters() if weight.dim() == 2]
    others = [weight for weight in model.layers.parameters() if weight.dim() != 2]
    others += [*model.embed_tokens.parameters(), *model.norm.parameters()]
    muon = torch.optim.Muon(
        matrices,
        lr=LEARNING_RATE,
        momentum=0.95,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm up linearly, hold, and fall linearly over the last part; `progress` in [0, 1)."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = max(LAST_LEARNING_RATE_FACTOR, min(1.0, (1 - progress) / DECAY_SHARE))
    return warmup * decay


def token_weights(is_answer: Tensor) -> Tensor:
    """Weight answers by 1 and a random few of the other tokens a little.

    Args:
        is_answer: [batch, num_tokens] bool.

    Returns:
        [batch, num_tokens] fp32, 0 where a token has no loss.
    """
    is_chosen = torch.rand(is_answer.shape) < OTHER_TOKEN_SHARE
    return torch.where(is_answer, 1.0, is_chosen.float() * OTHER_TOKEN_WEIGHT)


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Work:
    """One batch for a worker: its generator's seed, what to draw, and how much."""

    seed: tuple[int, int]
    preset: str
    phase: Phase


def _draw(work: _Work) -> Batch:
    """Draw one batch in a worker."""
    preset = PRESETS[work.preset]
    rng = np.random.default_rng(work.seed)
    size = (work.phase.batch_size, work.phase.num_tokens)
    return training_batch(rng, *size, preset.shares)


@contextmanager
def draw_batches(
    seed: int, preset: str, schedule: list[Phase], num_workers: int
) -> Iterator[Iterator[Batch]]:
    """The batches of the schedule, in order, drawn here or ahead of time by processes.

    Here one generator draws all batches; with processes each batch has its own, so that the
    number of processes changes nothing.
    """
    phases = [phase for phase in schedule for _ in range(phase.num_steps)]
    if num_workers == 0:
        rng, shares = np.random.default_rng(seed), PRESETS[preset].shares
        yield (training_batch(rng, p.batch_size, p.num_tokens, shares) for p in phases)
        return
    with multiprocessing.get_context("fork").Pool(num_workers) as pool:
        work = [_Work((seed, step), preset, phase) for step, phase in enumerate(phases)]
        yield pool.imap(_draw, work, chunksize=2)


@dataclass
class Report:
    """Losses and answers since the last line of the log."""

    tasks: tuple[str, ...]
    losses: list[float] = field(default_factory=list)
    num_right: np.ndarray = field(init=False)
    num_answers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Start at no answers."""
        self.num_right, self.num_answers = np.zeros(len(self.tasks)), np.zeros(len(self.tasks))

    def add(self, loss: float, is_right: np.ndarray, task_ids: np.ndarray) -> None:
        """Count one step: `is_right` and `task_ids` of its answers, [num_answers]."""
        self.losses.append(loss)
        self.num_right += np.bincount(task_ids, is_right, len(self.tasks))
        self.num_answers += np.bincount(task_ids, minlength=len(self.tasks))

    def line(self) -> str:
        """Write the mean loss and the share of right answers per task."""
        shares = self.num_right / np.maximum(1, self.num_answers)
        by_task = [f"{name} {share:.3f}" for name, share in zip(self.tasks, shares, strict=True)]
        return f"loss {np.mean(self.losses):.4f} {' '.join(by_task)}"


def train_step(
    model: ReferenceModel,
    optimizers: list[torch.optim.Optimizer],
    batch: Batch,
    report: Report,
) -> None:
    """Update the model in place by one batch."""
    device = model.embed_tokens.weight.device
    token_ids = torch.from_numpy(batch[0]).to(device)
    weights = token_weights(torch.from_numpy(batch[1])[:, 1:])
    has_loss = weights > 0
    row_tasks = torch.from_numpy(batch[2])[torch.nonzero(has_loss)[:, 0]]
    is_counted = weights[has_loss] == 1.0
    weights, has_loss = weights[has_loss].to(device), has_loss.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = model(token_ids, F.pad(has_loss, (0, 1)))
    logits, targets = logits.float(), token_ids[:, 1:][has_loss]
    losses = F.cross_entropy(logits, targets, reduction="none")
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    is_right = (logits.argmax(-1) == targets).cpu()[is_counted]
    report.add(loss.item(), is_right.numpy(), row_tasks[is_counted].numpy())


def train(
    model: ReferenceModel,
    preset: Preset,
    schedule: list[Phase],
    batches: Iterator[Batch],
    minutes: float,
    checkpoint: Path,
) -> None:
    """Run the schedule; prints a line every 50 steps and saves every 200."""
    optimizers = make_optimizers(model)
    num_steps = sum(phase.num_steps for phase in schedule)
    tasks = tuple(preset.shares)
    step, num_tokens, start, report = 0, 0, time.monotonic(), Report(tasks)
    for phase in schedule:
        for _ in range(phase.num_steps):
            time_share = (time.monotonic() - start) / 60 / minutes
            if time_share >= 1:
                break
            factor = learning_rate_factor(step, max(step / num_steps, time_share))
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * factor
            train_step(model, optimizers, next(batches), report)
            step += 1
            num_tokens += phase.batch_size * phase.num_tokens
            if step % STEPS_PER_REPORT == 0 or step == num_steps:
                elapsed_s = time.monotonic() - start
                print(
                    f"step {step}/{num_steps} T {phase.num_tokens} {report.line()} "
                    f"lr x{factor:.2f} tokens {num_tokens} {elapsed_s / 60:.1f} min "
                    f"{num_tokens / elapsed_s:.0f} tokens/s",
                    flush=True,
                )
                report = Report(tasks)
            if step % STEPS_PER_CHECKPOINT == 0:
                torch.save(model.state_dict(), checkpoint)
    torch.save(model.state_dict(), checkpoint)
    minutes_used = (time.monotonic() - start) / 60
    print(f"trained {step} steps, {num_tokens} tokens, {minutes_used:.1f} min")


def main() -> None:
    """Parse the command line, train and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="reference")
    parser.add_argument("--out", type=Path, required=True, help="folder for the exported model")
    parser.add_argument("--checkpoint", type=Path, default=Path("reference_model.pt"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw samples")
    parser.add_argument("--schedule", type=parse_schedule, help="instead of the preset's")
    parser.add_argument("--minutes", type=float, default=29.0, help="limit of the training time")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    preset = PRESETS[args.preset]
    schedule = args.schedule or parse_schedule(preset.schedule)
    model = ReferenceModel(preset.config)
    with draw_batches(args.seed, args.preset, schedule, args.workers) as batches:
        model.to(args.device)
        train(model, preset, schedule, batches, args.minutes, args.checkpoint)

    export(model.cpu().eval(), args.out)


if __name__ == "__main__":
    main()
