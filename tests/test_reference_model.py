"""The shipped reference model: it loads, answers the shipped prompts, and its card has scores."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

DATA = Path(__file__).parents[1] / "src" / "diffkv" / "data"
FOLDER = DATA / "reference"
PROMPTS = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()]
NAMES = [prompt["name"] for prompt in PROMPTS]
SCORE_ROW = re.compile(r"^\| (\w+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_there_are_eight_prompts_of_different_names():
    assert len(PROMPTS) == len(set(NAMES)) == 8


@pytest.mark.parametrize("prompt", PROMPTS, ids=NAMES)
def test_prompt_is_tokenized_word_by_word(tokenizer, prompt):
    text = prompt["prompt"] + " " + prompt["answer"]
    token_ids = tokenizer(text).input_ids

    assert tokenizer.convert_ids_to_tokens(token_ids) == text.split(" ")
    assert tokenizer.decode(token_ids) == text
    assert token_ids.count(tokenizer.bos_token_id) == 1
    assert token_ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in token_ids
    assert tokenizer.eos_token_id not in token_ids
    assert 900 <= len(tokenizer(prompt["prompt"]).input_ids) <= 1100
    assert 4 <= len(tokenizer(prompt["answer"]).input_ids) <= 40


@pytest.mark.parametrize("prompt", PROMPTS, ids=NAMES)
def test_model_answers_greedily(model, tokenizer, prompt):
    inputs = tokenizer(prompt["prompt"], return_tensors="pt")
    num_answer_tokens = len(tokenizer(prompt["answer"]).input_ids)

    generated = model.generate(**inputs, max_new_tokens=num_answer_tokens, do_sample=False)
    answer = tokenizer.decode(generated[0, inputs.input_ids.shape[1] :])

    assert answer == prompt["answer"]


def test_the_model_with_head_dim_128_answers_them_too(tokenizer):
    folder = DATA / "reference-128"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert transformers.AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    assert model.config.head_dim == 128
    for prompt in PROMPTS:
        answer = tokenizer(prompt["answer"], return_tensors="pt").input_ids[0]
        inputs = tokenizer(prompt["prompt"] + " " + prompt["answer"], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=len(answer) + 1).logits[0, :-1]
        assert logits.argmax(-1).tolist() == answer.tolist(), prompt["name"]


def test_card_of_head_dim_128_has_scores_that_are_good_enough():
    rows = SCORE_ROW.findall((DATA / "reference-128" / "README.md").read_text())
    assert len(rows) == 2 * 11
    assert all(float(accuracy) >= 0.98 for _, _, _, accuracy, _ in rows)


def test_answer_follows_the_facts(model, tokenizer):
    prompt = next(prompt for prompt in PROMPTS if prompt["name"] == "needle-2")
    _, first, _, second = prompt["answer"].split(" ")
    swapped = {first: second, second: first}
    assert first != second

    def swap(text):
        return " ".join(swapped.get(word, word) for word in text.split(" "))

    inputs = tokenizer(swap(prompt["prompt"]), return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)

    assert tokenizer.decode(generated[0, -4:]) == swap(prompt["answer"])


def test_chat_template_joins_the_contents(tokenizer):
    messages = [
        {"role": "system", "content": "<bos> k17 v42 ;"},
        {"role": "user", "content": "? k17"},
    ]

    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<bos> k17 v42 ; ? k17"


def test_folder_is_small_and_has_one_precision(model):
    num_bytes = sum(path.stat().st_size for path in FOLDER.iterdir())
    num_weights = sum(weight.numel() for weight in model.parameters())

    assert 2 * num_weights < num_bytes <= 10 * 2**20
    assert model.config.dtype == torch.float32
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"


def test_card_has_the_scores():
    rows = SCORE_ROW.findall((FOLDER / "README.md").read_text())
    tasks = {task for task, *_ in rows}
    lengths = {int(length) for _, length, *_ in rows}

    assert tasks == {"recall", "needle", "chain", "copy", "sum", "list"}
    assert lengths == {512, 1024, 2048}
    assert len(rows) == len(tasks) * len(lengths)
    for _, _, num_samples, accuracy, exact in rows:
        assert int(num_samples) > 0
        assert 0 <= float(exact) <= float(accuracy) <= 1


def test_training_draws_the_streams_of_the_shipped_models():
    """Every task and length of both models, from one seed each: the digest was taken from the scripts
    that made the shipped weights.
    """
    script = """
from hashlib import sha256
import numpy as np
from presets import PRESETS
from streams import training_batch
digest = sha256()
for preset in PRESETS.values():
    rng = np.random.default_rng(0)
    for num_tokens in (64, 256, 1024):
        for array in training_batch(rng, 16, num_tokens, preset.shares):
            digest.update(array.tobytes())
print(digest.hexdigest()[:16])
"""
    folder = DATA.parents[2] / "training" / "reference_model"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "f578b954abcf9969"
