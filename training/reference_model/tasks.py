"""Vocabulary and synthetic retrieval tasks of the reference model; no torch in here.

Every task function takes a seeded generator and a length and returns two lists of that length:
the token ids, and for each token whether it is an answer, i.e. determined by what stands before.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_KEYS = 256
NUM_VALUES = 128
NUM_NUMBERS = 16
NUM_WORDS = 96
VOCAB_MULTIPLE = 16

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", ";", "?", "@", "copy", "again", "sum", ".")
PAD, BOS, EOS, END, ASK, WALK, COPY, AGAIN, SUM, STOP = range(len(SPECIAL_TOKENS))
FIRST_KEY = len(SPECIAL_TOKENS)
FIRST_VALUE = FIRST_KEY + NUM_KEYS
FIRST_NUMBER = FIRST_VALUE + NUM_VALUES
FIRST_WORD = FIRST_NUMBER + NUM_NUMBERS
NUM_USED_TOKENS = FIRST_WORD + NUM_WORDS
VOCAB_SIZE = -(-NUM_USED_TOKENS // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

MAX_COPY_TOKENS = 200
MAX_LISTED_KEYS = 23

_WORD_RANKS = np.arange(1, NUM_WORDS + 1)
WORD_PROBABILITIES = (1 / _WORD_RANKS) / (1 / _WORD_RANKS).sum()

Sample = tuple[list[int], list[bool]]
TaskFunction = Callable[[np.random.Generator, int], Sample]


def vocabulary() -> list[str]:
    """Return the text of every token, in order of token id."""
    tokens = list(SPECIAL_TOKENS)
    tokens += [f"k{i}" for i in range(NUM_KEYS)]
    tokens += [f"v{i}" for i in range(NUM_VALUES)]
    tokens += [f"n{i}" for i in range(NUM_NUMBERS)]
    tokens += [f"w{i}" for i in range(NUM_WORDS)]
    tokens.append("<unk>")
    return tokens + [f"<r{i}>" for i in range(VOCAB_SIZE - len(tokens))]


class Stream:
    """A token sequence under construction, with its answer mask."""

    def __init__(self) -> None:
        """Start with the bos token."""
        self.token_ids = [BOS]
        self.is_answer = [False]

    def __len__(self) -> int:
        """Return the number of tokens so far."""
        return len(self.token_ids)

    def give(self, token_ids: Iterable[int], answer: bool = False) -> None:
        """Append tokens, all of them answers or none."""
        before = len(self.token_ids)
        self.token_ids.extend(int(token) for token in token_ids)
        self.is_answer.extend([answer] * (len(self.token_ids) - before))

    def cut(self, num_tokens: int) -> Sample:
        """Return the first `num_tokens` tokens and their mask."""
        return self.token_ids[:num_tokens], self.is_answer[:num_tokens]


def sentence(rng: np.random.Generator) -> list[int]:
    """Draw one filler sentence of 2 to 8 words, frequent words first, closed by a stop."""
    num_words = rng.integers(2, 9)
    words = rng.choice(NUM_WORDS, num_words, p=WORD_PROBABILITIES)
    return [FIRST_WORD + int(word) for word in words] + [STOP]


def with_filler(rng: np.random.Generator, facts: Sequence[list[int]], num_tokens: int) -> list[int]:
    """Put filler sentences at random places between the facts, to `num_tokens` tokens in all.

    The order of the facts stays. The last sentence drawn loses its first words where it is too
    long. Facts that alone are longer than `num_tokens` come back without filler.
    """
    sentences: list[list[int]] = []
    missing = num_tokens - sum(len(fact) for fact in facts)
    while missing > 0:
        sentences.append(sentence(rng)[-missing:])
        missing -= len(sentences[-1])
    places = rng.permutation(len(facts) + len(sentences))
    is_fact = places < len(facts)
    next_fact, next_sentence = iter(facts), iter(sentences)
    segments = (next(next_fact) if here else next(next_sentence) for here in is_fact)
    return [token for segment in segments for token in segment]


def draw_keys(rng: np.random.Generator, num_keys: int) -> list[int]:
    """Draw different keys."""
    return [FIRST_KEY + int(key) for key in rng.permutation(NUM_KEYS)[:num_keys]]


def draw_values(rng: np.random.Generator, num_values: int) -> list[int]:
    """Draw values, repeats allowed."""
    return [FIRST_VALUE + int(value) for value in rng.integers(0, NUM_VALUES, num_values)]


def draw_numbers(rng: np.random.Generator, num_numbers: int) -> list[int]:
    """Draw numbers, repeats allowed."""
    return [FIRST_NUMBER + int(number) for number in rng.integers(0, NUM_NUMBERS, num_numbers)]


def pair_facts(keys: Sequence[int], values: Sequence[int]) -> list[list[int]]:
    """Write each key with its value as a fact `key value ;`."""
    return [[key, value, END] for key, value in zip(keys, values, strict=True)]


def sum_steps(asked: Sequence[int], number_of: dict[int, int]) -> list[list[int]]:
    """Write the steps `key number total` of a sum modulo the number of numbers."""
    steps, total = [], 0
    for key in asked:
        total = (total + number_of[key] - FIRST_NUMBER) % NUM_NUMBERS
        steps.append([key, number_of[key], FIRST_NUMBER + total])
    return steps


def recall(rng: np.random.Generator, num_tokens: int) -> Sample:
    """`k17 v42 ;` facts, mixed with questions `? k17 v42 ;` about those already given."""
    filler_share = rng.choice([0, 0, 0.3, 0.6])
    skew = rng.choice([0.0, 0.0, 1.0])
    fact_share = rng.choice([0.4, 0.7, 1.0])
    most = int((num_tokens - 1) * (1 - filler_share) * 0.45 / 3)
    num_facts = min(NUM_KEYS, int(rng.integers(max(2, most // 4), max(3, most) + 1)))
    keys, values = draw_keys(rng, num_facts), draw_values(rng, num_facts)
    popularity = np.cumsum(1 / (1 + rng.permutation(num_facts)) ** skew)

    stream, num_given = Stream(), 0
    while len(stream) < num_tokens:
        if rng.random() < filler_share * 0.5:
            stream.give(sentence(rng))
        elif num_given < num_facts and (num_given == 0 or rng.random() < fact_share):
            stream.give([keys[num_given], values[num_given], END])
            num_given += 1
        else:
            threshold = rng.random() * popularity[num_given - 1]
            asked = int(np.searchsorted(popularity[:num_given], threshold, side="right"))
            asked = min(asked, num_given - 1)
            stream.give([ASK, keys[asked]])
            stream.give([values[asked]], answer=True)
            stream.give([END])
    return stream.cut(num_tokens)


def needle(rng: np.random.Generator, num_tokens: int) -> Sample:
    """One to five facts in filler, then questions `? k17 v42 ;` about them."""
    num_facts = int(rng.integers(1, 6))
    keys, values = draw_keys(rng, num_facts), draw_values(rng, num_facts)
    num_body_tokens = num_tokens - 1 - min(8 * num_facts, num_tokens // 3)
    stream = Stream()
    stream.give(with_filler(rng, pair_facts(keys, values), num_body_tokens))
    while len(stream) < num_tokens:
        asked = int(rng.integers(0, num_facts))
        stream.give([ASK, keys[asked]])
        stream.give([values[asked]], answer=True)
        stream.give([END])
    return stream.cut(num_tokens)


def chain(rng: np.random.Generator, num_tokens: int) -> Sample:
    """Shuffled links `k17 k42 ;` of one cycle over the keys, then a walk `@ k17 k42 k5 ...`."""
    most = min(NUM_KEYS, (num_tokens - 4) // 4)
    num_keys = int(rng.integers(max(3, most // 3), most + 1))
    keys = draw_keys(rng, num_keys)
    successor = {key: keys[(i + 1) % num_keys] for i, key in enumerate(keys)}
    links = [[keys[i], successor[keys[i]], END] for i in rng.permutation(num_keys)]
    num_walk_tokens = int(rng.integers(num_tokens // 8, num_tokens // 3))
    has_filler = rng.random() < 1 / 3

    stream = Stream()
    stream.give(with_filler(rng, links, num_tokens - num_walk_tokens if has_filler else 0))
    while len(stream) < num_tokens:
        key = keys[rng.integers(0, num_keys)]
        stream.give([WALK, key])
        for _ in range(num_keys - 1):
            key = successor[key]
            stream.give([key], answer=True)
        stream.give([END])
    return stream.cut(num_tokens)


def copy(rng: np.random.Generator, num_tokens: int) -> Sample:
    """`copy <sequence> again <the same sequence>`, repeated, sometimes after filler."""
    has_filler = rng.random() < 1 / 3
    most = max(4, min(num_tokens // 2 - 2, MAX_COPY_TOKENS))
    stream = Stream()
    if has_filler:
        stream.give(with_filler(rng, [], int(rng.integers(1, num_tokens // 2))))
    while len(stream) < num_tokens:
        num_copied = int(rng.integers(3, most))
        copied = rng.permutation(NUM_KEYS + NUM_VALUES)[:num_copied] + FIRST_KEY
        stream.give([COPY, *copied, AGAIN])
        stream.give(copied, answer=True)
        if has_filler:
            stream.give(sentence(rng))
    return stream.cut(num_tokens)


def running_sum(rng: np.random.Generator, num_tokens: int) -> Sample:
    """`k3 n5 ;` facts, then sums `sum n0 k3 n5 n5 k8 n9 n14 ...` of asked keys, modulo 16.

    In one sample of three the keys are asked beforehand, `sum sum k3 k8 ; n0 k3 n5 n5 ...`,
    which makes the whole sum an answer.
    """
    most = min(NUM_KEYS, max(3, (num_tokens - 2) // 8))
    num_facts = int(rng.integers(max(2, most // 3), most + 1))
    keys, numbers = draw_keys(rng, num_facts), draw_numbers(rng, num_facts)
    number_of = dict(zip(keys, numbers, strict=True))
    num_sum_tokens = int(rng.integers(num_tokens // 4, num_tokens // 2))
    has_filler = rng.random() < 1 / 3
    is_listed = rng.random() < 1 / 3

    stream = Stream()
    num_body_tokens = num_tokens - num_sum_tokens if has_filler else 0
    stream.give(with_filler(rng, pair_facts(keys, numbers), num_body_tokens))
    while len(stream) < num_tokens:
        if is_listed:
            num_asked = int(rng.integers(2, max(3, min(MAX_LISTED_KEYS, num_tokens // 8) + 1)))
            asked = [keys[i] for i in rng.permutation(num_facts)[:num_asked]]
            stream.give([SUM, SUM, *asked, END])
        else:
            asked = [keys[i] for i in rng.integers(0, num_facts, int(rng.integers(4, 40)))]
            stream.give([SUM])
        stream.give([FIRST_NUMBER], answer=is_listed)
        for key, number, total in sum_steps(asked, number_of):
            stream.give([key], answer=is_listed)
            stream.give([number, total], answer=True)
        stream.give([END])
    return stream.cut(num_tokens)


def key_list(rng: np.random.Generator, num_tokens: int) -> Sample:
    """Facts, then a list of keys `? ? k3 k9 ;` and the answer `k3 v7 k9 v1 ...`."""
    most_asked = max(2, min(MAX_LISTED_KEYS, num_tokens // 8 - 1))
    num_asked = int(rng.integers(2, most_asked + 1))
    num_body_tokens = num_tokens - 3 - 3 * num_asked
    most = max(3, min(NUM_KEYS, num_body_tokens // 3))
    num_facts = int(rng.integers(max(2, num_asked // 2), most + 1))
    keys, values = draw_keys(rng, num_facts), draw_values(rng, num_facts)
    has_filler = rng.random() < 1 / 2

    stream = Stream()
    stream.give(with_filler(rng, pair_facts(keys, values), num_body_tokens if has_filler else 0))
    while len(stream) < num_tokens:
        asked = rng.permutation(num_facts)[:num_asked]
        stream.give([ASK, ASK, *(keys[i] for i in asked), END])
        for i in asked:
            stream.give([keys[i], values[i]], answer=True)
    return stream.cut(num_tokens)


TASKS: dict[str, TaskFunction] = {
    "recall": recall,
    "needle": needle,
    "chain": chain,
    "copy": copy,
    "sum": running_sum,
    "list": key_list,
}
TASK_SHARES = {
    "recall": 0.35,
    "needle": 0.1,
    "chain": 0.2,
    "copy": 0.1,
    "sum": 0.1,
    "list": 0.15,
}
EXAM_FACTS = {"needle": 5, "copy": 100}
EXAM_ASKED = {"recall": 24, "needle": 5, "chain": 64, "copy": 100, "sum": 16, "list": 20}


def training_batch(
    rng: np.random.Generator,
    batch_size: int,
    num_tokens: int,
    task_of: Mapping[str, TaskFunction] = TASKS,
    shares: Mapping[str, float] = TASK_SHARES,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a batch of samples, the task of each by its share.

    Returns:
        token_ids: [batch_size, num_tokens] int64.
        is_answer: [batch_size, num_tokens] bool.
        task_ids: [batch_size] int64, index into `task_of`.
    """
    tasks = list(task_of.values())
    task_ids = rng.choice(len(tasks), batch_size, p=[shares[name] for name in task_of])
    samples = [tasks[task](rng, num_tokens) for task in task_ids]
    token_ids = np.array([ids for ids, _ in samples], dtype=np.int64)
    is_answer = np.array([mask for _, mask in samples], dtype=bool)
    return token_ids, is_answer, task_ids


@dataclass(frozen=True)
class Exam:
    """A prompt of full load and its only right continuation.

    `is_scored` leaves out of the continuation what a model finds in the question itself.
    """

    prompt: list[int]
    continuation: list[int]
    is_scored: list[bool]


def exam(
    rng: np.random.Generator,
    task: str,
    num_prompt_tokens: int,
    num_facts: int | None = None,
    num_asked: int | None = None,
) -> Exam:
    """Draw an exam; the facts and filler fill the prompt, the question ends it.

    Args:
        rng: source of all choices.
        task: name in `TASKS`.
        num_prompt_tokens: length of the prompt.
        num_facts: facts, links or copied tokens in the prompt; None: the number for the task.
        num_asked: asked facts or steps of the walk; None: the number for the task.

    Returns:
        The exam. In `recall` and `needle` all questions but the first stand in the continuation.
    """
    num_facts = num_facts or EXAM_FACTS.get(task, min(NUM_KEYS, num_prompt_tokens // 4))
    num_asked = min(num_facts, num_asked or EXAM_ASKED[task])
    stream = Stream()
    if task == "copy":
        facts = []
        copied = [FIRST_KEY + int(i) for i in rng.permutation(NUM_KEYS + NUM_VALUES)[:num_facts]]
        question = [COPY, *copied, AGAIN]
        stream.give(copied[:num_asked], answer=True)
    elif task == "chain":
        keys = draw_keys(rng, num_facts)
        facts = [[keys[i - 1], keys[i], END] for i in rng.permutation(num_facts)]
        question = [WALK, keys[-1]]
        stream.give(keys[:num_asked], answer=True)
    else:
        keys = draw_keys(rng, num_facts)
        values = (draw_numbers if task == "sum" else draw_values)(rng, num_facts)
        facts = pair_facts(keys, values)
        value_of = dict(zip(keys, values, strict=True))
        asked = [keys[i] for i in rng.permutation(num_facts)[:num_asked]]
        question = _ask(stream, task, asked, value_of)
    num_body_tokens = num_prompt_tokens - 1 - len(question)
    prompt = [BOS, *with_filler(rng, facts, num_body_tokens), *question]
    return Exam(prompt, stream.token_ids[1:], stream.is_answer[1:])


def _ask(stream: Stream, task: str, asked: list[int], value_of: dict[int, int]) -> list[int]:
    """Append the answers about `asked` to the stream and return the question before them."""
    if task == "sum":
        stream.give([FIRST_NUMBER])
        for key, number, total in sum_steps(asked, value_of):
            stream.give([key])
            stream.give([number, total], answer=True)
        return [SUM, SUM, *asked, END]
    if task == "list":
        for key in asked:
            stream.give([key])
            stream.give([value_of[key]], answer=True)
        return [ASK, ASK, *asked, END]
    for i, key in enumerate(asked):
        stream.give([ASK, key] if i else [])
        stream.give([value_of[key]], answer=True)
        stream.give([END])
    return [ASK, asked[0]]
