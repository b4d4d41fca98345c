"""Tasks that tell ways of compressing a cache apart; no torch in here. Vocabulary as in `tasks.py`.

A key here is two words from a small grid, so that every key differs in one word from many others:
a lookup has to tell them apart by half of what a key says. Questions stand among the facts, so that
some facts are asked again and again, and at the end, after filler after filler.
"""

import numpy as np
from tasks import (
    ASK,
    BOS,
    END,
    EXAM_ASKED,
    FIRST_KEY,
    NUM_KEYS,
    TASKS,
    WALK,
    Exam,
    Sample,
    Stream,
    draw_keys,
    draw_values,
    exam,
    pair_facts,
    sentence,
    with_filler,
)

MAX_PAIRS = 256
FAR_TOKENS = 160
CHAIN_STEPS = 240
SKEW = 1.0


def draw_pairs(rng: np.random.Generator, num_pairs: int) -> list[list[int]]:
    """Draw different keys of two words out of a grid that is hardly larger than needed.

    The words of either side come from the same vocabulary, so the order of the two matters.
    """
    side = min(NUM_KEYS, int(np.ceil(np.sqrt(num_pairs * rng.uniform(1.0, 2.0)))))
    first, second = rng.permutation(NUM_KEYS)[:side], rng.permutation(NUM_KEYS)[:side]
    cells = rng.permutation(side * side)[:num_pairs]
    return [[FIRST_KEY + int(first[c // side]), FIRST_KEY + int(second[c % side])] for c in cells]


def popularity_order(rng: np.random.Generator, num_facts: int) -> np.ndarray:
    """Probability that a question asks for each fact, by Zipf's law over a random order."""
    weights = 1 / (1 + rng.permutation(num_facts)) ** SKEW
    return weights / weights.sum()


def pairs(rng: np.random.Generator, num_tokens: int) -> Sample:
    """`k17 k4 v42 ;` facts, then, or among them, questions `? k17 k4 v42 ;`."""
    most = max(2, min(MAX_PAIRS, (num_tokens - 2) // 5))
    num_facts = int(rng.integers(max(2, most // 3), most + 1))
    keys, values = draw_pairs(rng, num_facts), draw_values(rng, num_facts)
    facts = [[*key, value, END] for key, value in zip(keys, values, strict=True)]
    is_mixed, has_filler = rng.random() < 0.5, rng.random() < 1 / 3
    shares = popularity_order(rng, num_facts) if rng.random() < 0.5 else None
    stream = Stream()
    if not is_mixed:
        num_body_tokens = num_tokens - num_tokens // 5 if has_filler else 0
        stream.give(with_filler(rng, facts, num_body_tokens))
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
        stream.give([ASK, *keys[i]])
        stream.give([values[i]], answer=True)
        stream.give([END])
        if has_filler and rng.random() < 0.1:
            stream.give(sentence(rng))
    return stream.cut(num_tokens)


def pair_chain(rng: np.random.Generator, num_tokens: int) -> Sample:
    """Shuffled links `k1 k2 k3 k4 ;` of one cycle over pairs, then `@ k1 k2 k3 k4 k5 k6 ...`."""
    most = max(3, min(MAX_PAIRS, (num_tokens - 5) // 7))
    num_nodes = int(rng.integers(max(3, most // 3), most + 1))
    nodes = draw_pairs(rng, num_nodes)
    links = [[*nodes[i - 1], *nodes[i], END] for i in rng.permutation(num_nodes)]
    has_filler = rng.random() < 1 / 3
    stream = Stream()
    num_body_tokens = num_tokens - int(rng.integers(num_tokens // 8, num_tokens // 3))
    stream.give(with_filler(rng, links, num_body_tokens if has_filler else 0))
    while len(stream) < num_tokens:
        at = int(rng.integers(0, num_nodes))
        stream.give([WALK, *nodes[at]])
        for step in range(1, num_nodes):
            stream.give(nodes[(at + step) % num_nodes], answer=True)
        stream.give([END])
    return stream.cut(num_tokens)


def far_needle(rng: np.random.Generator, num_tokens: int) -> Sample:
    """A few facts in filler, then nothing but filler, then the questions."""
    num_facts = int(rng.integers(1, 17))
    keys, values = draw_keys(rng, num_facts), draw_values(rng, num_facts)
    num_end_tokens = int(rng.integers(num_tokens // 8, num_tokens // 2))
    stream = Stream()
    stream.give(with_filler(rng, pair_facts(keys, values), num_tokens - 1 - num_end_tokens))
    stream.give(with_filler(rng, [], num_end_tokens // 2))
    while len(stream) < num_tokens:
        asked = int(rng.integers(0, num_facts))
        stream.give([ASK, keys[asked]])
        stream.give([values[asked]], answer=True)
        stream.give([END])
    return stream.cut(num_tokens)


HARD_TASKS = {**TASKS, "pairs": pairs, "pair_chain": pair_chain, "far_needle": far_needle}
HARD_TASK_SHARES = {
    "recall": 0.18,
    "needle": 0.04,
    "chain": 0.16,
    "copy": 0.06,
    "sum": 0.06,
    "list": 0.1,
    "pairs": 0.18,
    "pair_chain": 0.16,
    "far_needle": 0.06,
}
HARD_EXAMS = ("pairs", "pair_chain", "far_needle", "hot", "long_chain")


def hard_exam(rng: np.random.Generator, task: str, num_prompt_tokens: int) -> Exam:
    """Draw an exam of one of `HARD_EXAMS` or of a task of `tasks.py`; facts and filler fill the prompt.

    `hot` asks by Zipf's law through the whole prompt and goes on asking so; `long_chain` is `chain`
    with 240 steps; the question of `far_needle` and the facts lie 160 tokens of filler apart.
    """
    if task == "long_chain":
        return exam(rng, "chain", num_prompt_tokens, num_asked=CHAIN_STEPS)
    if task == "far_needle":
        question = exam(rng, "needle", num_prompt_tokens - FAR_TOKENS, 16, 16)
        ask = question.prompt[-2:]
        prompt = [*question.prompt[:-2], *with_filler(rng, [], FAR_TOKENS), *ask]
        return Exam(prompt, question.continuation, question.is_scored)
    if task == "pairs":
        return _pairs_exam(rng, num_prompt_tokens)
    if task == "pair_chain":
        nodes = draw_pairs(rng, min(MAX_PAIRS, (num_prompt_tokens - 4) // 5))
        links = [[*nodes[i - 1], *nodes[i], END] for i in rng.permutation(len(nodes))]
        body = with_filler(rng, links, num_prompt_tokens - 4)
        walk = [word for node in nodes[: CHAIN_STEPS // 2] for word in node]
        return Exam([BOS, *body, WALK, *nodes[-1]], walk, [True] * len(walk))
    if task == "hot":
        return _hot_exam(rng, num_prompt_tokens)
    return exam(rng, task, num_prompt_tokens)


def _pairs_exam(rng: np.random.Generator, num_prompt_tokens: int) -> Exam:
    """Facts of confusable keys fill the prompt; the first question ends it."""
    num_facts = min(MAX_PAIRS, (num_prompt_tokens - 4) // 4)
    keys, values = draw_pairs(rng, num_facts), draw_values(rng, num_facts)
    facts = [[*key, value, END] for key, value in zip(keys, values, strict=True)]
    body = with_filler(rng, facts, num_prompt_tokens - 4)
    asked = rng.permutation(num_facts)[: EXAM_ASKED["recall"]]
    return _asking([BOS, *body], [keys[i] for i in asked], [values[i] for i in asked])


def _hot_exam(rng: np.random.Generator, num_prompt_tokens: int) -> Exam:
    """Facts first, then questions by Zipf's law up to the end of the prompt, and beyond it."""
    num_facts = min(NUM_KEYS, num_prompt_tokens // 6)
    keys, values = draw_keys(rng, num_facts), draw_values(rng, num_facts)
    shares = popularity_order(rng, num_facts)
    prompt = [BOS, *(word for fact in pair_facts(keys, values) for word in fact)]
    while len(prompt) + 6 <= num_prompt_tokens:
        i = rng.choice(num_facts, p=shares)
        prompt += [ASK, keys[i], values[i], END]
    asked = rng.choice(num_facts, EXAM_ASKED["recall"], p=shares)
    return _asking(prompt, [[keys[i]] for i in asked], [values[i] for i in asked])


def _asking(body: list[int], keys: list[list[int]], values: list[int]) -> Exam:
    """End the prompt by the first question, and put the others into the continuation."""
    stream = Stream()
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        stream.give([ASK, *key] if i else [])
        stream.give([value], answer=True)
        stream.give([END])
    return Exam([*body, ASK, *keys[0]], stream.token_ids[1:], stream.is_answer[1:])
