"""What the shipped models are trained on: the evaluation's facts and questions, as endless streams.

A sample of the evaluation has one load and one question. A training sample has a load of its own, and
asks until it is full, so that most of its tokens teach something. Every function takes a seeded
generator and a length and returns two lists of that length: token ids, and for each token whether it is
an answer, i.e. determined by what stands before.

Keys of two words come from a small grid, so that each differs in one word from many others: a lookup has
to tell them apart by half of what a key says.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from vocabulary import BOS, TOKEN_IDS, WORDS

from diffkv.lab.evaluation.tasks import pick, pick_any, scatter

MAX_COPY_TOKENS = 200
MAX_LISTED_KEYS = 23
MAX_PAIRS = 256
NUM_KEYS = len(WORDS.keys)

Sample = tuple[list[int], list[bool]]
TaskFunction = Callable[[np.random.Generator, int], Sample]


class Stream:
    """Words under construction, with their answer mask; starts with the bos token."""

    def __init__(self) -> None:
        """Start."""
        self.words, self.is_answer = [BOS], [False]

    def __len__(self) -> int:
        """Tokens so far."""
        return len(self.words)

    def give(self, text: str | Iterable[str], answer: bool = False) -> None:
        """Append words, all of them answers or none."""
        words = text.split() if isinstance(text, str) else list(text)
        self.words += words
        self.is_answer += [answer] * len(words)

    def cut(self, num_tokens: int) -> Sample:
        """The ids of the first `num_tokens` tokens, and their mask."""
        ids = [TOKEN_IDS[word] for word in self.words[:num_tokens]]
        return ids, self.is_answer[:num_tokens]

    def scatter(self, rng: np.random.Generator, facts: Sequence[str], num_tokens: int) -> None:
        """Append facts, and filler between them."""
        self.give(" ".join(scatter(rng, WORDS, facts, num_tokens)))

    def ask(self, key: str, value: str) -> None:
        """Append a question `? k17 v42 ;`, whose value is an answer."""
        self.give(f"? {key}")
        self.give(value, answer=True)
        self.give(";")


def facts_of(keys: Sequence[str], values: Sequence[str]) -> list[str]:
    """Each key with its value."""
    return [WORDS.fact(key, value) for key, value in zip(keys, values, strict=True)]


def recall(rng: np.random.Generator, num_tokens: int) -> Sample:
    """`k17 v42 ;` facts, mixed with questions `? k17 v42 ;` about those already given."""
    filler_share = rng.choice([0, 0, 0.3, 0.6])
    skew = rng.choice([0.0, 0.0, 1.0])
    fact_share = rng.choice([0.4, 0.7, 1.0])
    most = int((num_tokens - 1) * (1 - filler_share) * 0.45 / 3)
    num_facts = min(NUM_KEYS, int(rng.integers(max(2, most // 4), max(3, most) + 1)))
    keys, values = pick(rng, WORDS.keys, num_facts), pick_any(rng, WORDS.values, num_facts)
    popularity = np.cumsum(1 / (1 + rng.permutation(num_facts)) ** skew)

    stream, num_given = Stream(), 0
    while len(stream) < num_tokens:
        if rng.random() < filler_share * 0.5:
            stream.give(WORDS.sentence(rng))
        elif num_given < num_facts and (num_given == 0 or rng.random() < fact_share):
            stream.give(WORDS.fact(keys[num_given], values[num_given]))
            num_given += 1
        else:
            threshold = rng.random() * popularity[num_given - 1]
            asked = int(np.searchsorted(popularity[:num_given], threshold, side="right"))
            asked = min(asked, num_given - 1)
            stream.ask(keys[asked], values[asked])
    return stream.cut(num_tokens)


def needle(rng: np.random.Generator, num_tokens: int) -> Sample:
    """One to five facts in filler, then questions about them."""
    num_facts = int(rng.integers(1, 6))
    keys, values = pick(rng, WORDS.keys, num_facts), pick_any(rng, WORDS.values, num_facts)
    stream = Stream()
    num_body_tokens = num_tokens - 1 - min(8 * num_facts, num_tokens // 3)
    stream.scatter(rng, facts_of(keys, values), num_body_tokens)
    while len(stream) < num_tokens:
        asked = int(rng.integers(0, num_facts))
        stream.ask(keys[asked], values[asked])
    return stream.cut(num_tokens)


def far_needle(rng: np.random.Generator, num_tokens: int) -> Sample:
    """A few facts in filler, then nothing but filler, then the questions."""
    num_facts = int(rng.integers(1, 17))
    keys, values = pick(rng, WORDS.keys, num_facts), pick_any(rng, WORDS.values, num_facts)
    num_end_tokens = int(rng.integers(num_tokens // 8, num_tokens // 2))
    stream = Stream()
    stream.scatter(rng, facts_of(keys, values), num_tokens - 1 - num_end_tokens)
    stream.scatter(rng, [], num_end_tokens // 2)
    while len(stream) < num_tokens:
        asked = int(rng.integers(0, num_facts))
        stream.ask(keys[asked], values[asked])
    return stream.cut(num_tokens)


def chain(rng: np.random.Generator, num_tokens: int) -> Sample:
    """Shuffled links of one cycle over the keys, then walks `@ k17 k42 k5 ...`."""
    most = min(NUM_KEYS, (num_tokens - 4) // 4)
    num_keys = int(rng.integers(max(3, most // 3), most + 1))
    keys = pick(rng, WORDS.keys, num_keys)
    links = [WORDS.link(keys[i], keys[(i + 1) % num_keys]) for i in rng.permutation(num_keys)]
    num_walk_tokens = int(rng.integers(num_tokens // 8, num_tokens // 3))
    has_filler = rng.random() < 1 / 3

    stream = Stream()
    stream.scatter(rng, links, num_tokens - num_walk_tokens if has_filler else 0)
    while len(stream) < num_tokens:
        at = int(rng.integers(0, num_keys))
        _walk(stream, [*keys[at:], *keys[:at]])
    return stream.cut(num_tokens)


def _walk(stream: Stream, keys: Sequence[str]) -> None:
    """Append a walk from the first key along all others, which are answers."""
    stream.give(WORDS.ask_chain(keys[0], keys[1:])[0])
    stream.give(" ".join(keys[1:]), answer=True)
    stream.give(";")


def copy(rng: np.random.Generator, num_tokens: int) -> Sample:
    """`copy <sequence> again <the same sequence>`, repeated, sometimes after filler."""
    has_filler = rng.random() < 1 / 3
    most = max(4, min(num_tokens // 2 - 2, MAX_COPY_TOKENS))
    stream = Stream()
    if has_filler:
        stream.scatter(rng, [], int(rng.integers(1, num_tokens // 2)))
    while len(stream) < num_tokens:
        num_copied = int(rng.integers(3, most))
        copied = pick(rng, (*WORDS.keys, *WORDS.values), num_copied)
        stream.give(WORDS.ask_copy(copied)[1])
        stream.give(copied, answer=True)
        if has_filler:
            stream.give(WORDS.sentence(rng))
    return stream.cut(num_tokens)


def running_sum(rng: np.random.Generator, num_tokens: int) -> Sample:
    """`k3 n5 ;` facts, then sums `sum n0 k3 n5 n5 k8 n9 n14 ...` of asked keys, modulo 16.

    In one sample of three the keys are asked beforehand, `sum sum k3 k8 ; n0 k3 n5 n5 ...`,
    which makes the whole sum an answer.
    """
    most = min(NUM_KEYS, max(3, (num_tokens - 2) // 8))
    num_facts = int(rng.integers(max(2, most // 3), most + 1))
    keys, numbers = pick(rng, WORDS.keys, num_facts), pick_any(rng, WORDS.numbers, num_facts)
    num_sum_tokens = int(rng.integers(num_tokens // 4, num_tokens // 2))
    has_filler = rng.random() < 1 / 3
    is_listed = rng.random() < 1 / 3

    stream = Stream()
    facts = [WORDS.number_fact(key, number) for key, number in zip(keys, numbers, strict=True)]
    stream.scatter(rng, facts, num_tokens - num_sum_tokens if has_filler else 0)
    while len(stream) < num_tokens:
        if is_listed:
            num_asked = int(rng.integers(2, max(3, min(MAX_LISTED_KEYS, num_tokens // 8) + 1)))
            asked = rng.permutation(num_facts)[:num_asked]
        else:
            asked = rng.integers(0, num_facts, int(rng.integers(4, 40)))
        question, answer = WORDS.ask_sum([keys[i] for i in asked], [numbers[i] for i in asked])
        stream.give(question if is_listed else "sum")
        for word, is_scored in answer:
            stream.give(word, answer=is_listed or is_scored)
        stream.give(";")
    return stream.cut(num_tokens)


def key_list(rng: np.random.Generator, num_tokens: int) -> Sample:
    """Facts, then a list of keys `? ? k3 k9 ;` and the answer `k3 v7 k9 v1 ...`."""
    most_asked = max(2, min(MAX_LISTED_KEYS, num_tokens // 8 - 1))
    num_asked = int(rng.integers(2, most_asked + 1))
    num_body_tokens = num_tokens - 3 - 3 * num_asked
    most = max(3, min(NUM_KEYS, num_body_tokens // 3))
    num_facts = int(rng.integers(max(2, num_asked // 2), most + 1))
    keys, values = pick(rng, WORDS.keys, num_facts), pick_any(rng, WORDS.values, num_facts)
    has_filler = rng.random() < 1 / 2

    stream = Stream()
    stream.scatter(rng, facts_of(keys, values), num_body_tokens if has_filler else 0)
    while len(stream) < num_tokens:
        asked = rng.permutation(num_facts)[:num_asked]
        question, answer = WORDS.ask_values([keys[i] for i in asked], [values[i] for i in asked])
        stream.give(question)
        stream.give((word for word, _ in answer), answer=True)
    return stream.cut(num_tokens)


def draw_pairs(rng: np.random.Generator, num_pairs: int) -> list[str]:
    """Draw different keys of two words out of a grid that is hardly larger than needed.

    The words of either side come from the same vocabulary, so the order of the two matters.
    """
    side = min(NUM_KEYS, int(np.ceil(np.sqrt(num_pairs * rng.uniform(1.0, 2.0)))))
    first, second = pick(rng, WORDS.keys, side), pick(rng, WORDS.keys, side)
    cells = rng.permutation(side * side)[:num_pairs]
    return [f"{first[cell // side]} {second[cell % side]}" for cell in cells]


def pairs(rng: np.random.Generator, num_tokens: int) -> Sample:
    """`k17 k4 v42 ;` facts, then, or among them, questions `? k17 k4 v42 ;`."""
    most = max(2, min(MAX_PAIRS, (num_tokens - 2) // 5))
    num_facts = int(rng.integers(max(2, most // 3), most + 1))
    keys, values = draw_pairs(rng, num_facts), pick_any(rng, WORDS.values, num_facts)
    facts = facts_of(keys, values)
    is_mixed, has_filler = rng.random() < 0.5, rng.random() < 1 / 3
    shares = _popularity(rng, num_facts) if rng.random() < 0.5 else None
    stream = Stream()
    if not is_mixed:
        stream.scatter(rng, facts, num_tokens - num_tokens // 5 if has_filler else 0)
    asked = iter(rng.choice(num_facts, num_tokens, p=shares))
    num_given = 0 if is_mixed else num_facts
    while len(stream) < num_tokens:
        if num_given < num_facts and (num_given == 0 or rng.random() < 0.6):
            stream.give(facts[num_given])
            num_given += 1
            continue
        i = next(asked)
        if i >= num_given:
            i = int(rng.integers(0, num_given))
        stream.ask(keys[i], values[i])
        if has_filler and rng.random() < 0.1:
            stream.give(WORDS.sentence(rng))
    return stream.cut(num_tokens)


def _popularity(rng: np.random.Generator, num_facts: int) -> np.ndarray:
    """Probability that a question asks for each fact, by Zipf's law over a random order."""
    weights = 1 / (1 + rng.permutation(num_facts))
    return weights / weights.sum()


def pair_chain(rng: np.random.Generator, num_tokens: int) -> Sample:
    """Shuffled links `k1 k2 k3 k4 ;` of one cycle over pairs, then `@ k1 k2 k3 k4 k5 k6 ...`."""
    most = max(3, min(MAX_PAIRS, (num_tokens - 5) // 7))
    num_nodes = int(rng.integers(max(3, most // 3), most + 1))
    nodes = draw_pairs(rng, num_nodes)
    links = [WORDS.link(nodes[i - 1], nodes[i]) for i in rng.permutation(num_nodes)]
    has_filler = rng.random() < 1 / 3
    stream = Stream()
    num_body_tokens = num_tokens - int(rng.integers(num_tokens // 8, num_tokens // 3))
    stream.scatter(rng, links, num_body_tokens if has_filler else 0)
    while len(stream) < num_tokens:
        at = int(rng.integers(0, num_nodes))
        _walk(stream, [*nodes[at:], *nodes[:at]])
    return stream.cut(num_tokens)


TASKS: dict[str, TaskFunction] = {
    "recall": recall,
    "needle": needle,
    "chain": chain,
    "copy": copy,
    "sum": running_sum,
    "list": key_list,
    "pairs": pairs,
    "pair_chain": pair_chain,
    "far_needle": far_needle,
}
"""Every stream by name; the order belongs to the seeds."""


def training_batch(
    rng: np.random.Generator, batch_size: int, num_tokens: int, shares: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a batch of samples, the task of each by its share.

    Args:
        rng: source of all choices.
        batch_size: samples.
        num_tokens: of each.
        shares: of tasks, by name, in the order of `TASKS`.

    Returns:
        token_ids: [batch_size, num_tokens] int64.
        is_answer: [batch_size, num_tokens] bool.
        task_ids: [batch_size] int64, index into `shares`.
    """
    tasks = [TASKS[name] for name in shares]
    task_ids = rng.choice(len(tasks), batch_size, p=list(shares.values()))
    samples = [tasks[task](rng, num_tokens) for task in task_ids]
    token_ids = np.array([ids for ids, _ in samples], dtype=np.int64)
    is_answer = np.array([mask for _, mask in samples], dtype=bool)
    return token_ids, is_answer, task_ids
