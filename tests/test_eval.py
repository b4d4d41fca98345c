"""Tasks are deterministic and well formed; a run prints what the schema says."""

import json
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra eval")

from diffkv.cli import main
from diffkv.cli.engine_options import model_folder
from diffkv.lab.evaluation import hf_runs
from diffkv.lab.evaluation.languages import LANGUAGES, English, ReferenceWords
from diffkv.lab.evaluation.other_formats import OTHER_FORMATS
from diffkv.lab.evaluation.results import TASKS, scores
from diffkv.lab.evaluation.runs import language_of
from diffkv.lab.evaluation.tasks import FILLER_TOKENS, SETTINGS, Sample, draw
from diffkv.lab.rows import Row, read
from diffkv.quant import DEFAULT_QUANT

NUM_TOKENS = 512
CASES = [
    (language, task, setting)
    for language in LANGUAGES.values()
    for task in language.tasks
    for setting in SETTINGS
]


@pytest.mark.parametrize(
    ("language", "task", "setting"), CASES, ids=[f"{c[0].name}-{c[1]}-{c[2]}" for c in CASES]
)
def test_samples_are_a_function_of_the_seed(language, task, setting, messages):
    first, again = (draw(task, language, setting, NUM_TOKENS, 3, 1) for _ in range(2))
    assert first == again
    assert first[0] != first[1]
    assert first != draw(task, language, setting, NUM_TOKENS, 3, 2)
    for sample in first:
        assert (sample.question == "") == (setting == "easy" and not sample.choices)
        right = language.separator.join(word for word, _ in sample.answer)
        assert language.score(right, sample.answer) == 1
        assert language.score("nothing", sample.answer) == 0


def test_reference_prompts_have_the_length_and_only_known_words():
    words = ReferenceWords()
    known = hf_runs.vocabulary_of(model_folder("reference"))
    for task in words.tasks:
        for setting in SETTINGS:
            for sample in draw(task, words, setting, NUM_TOKENS, 2, 0):
                answer = [word for word, _ in sample.answer]
                assert words.count(sample.prompt) == NUM_TOKENS
                assert set(f"{sample.prompt} {sample.question}".split() + answer) <= set(known)


def test_hard_prompts_end_in_filler():
    for sample in draw("retrieval", ReferenceWords(), "hard", NUM_TOKENS, 2, 0):
        assert not any(word[0] in "kv?" for word in sample.prompt.split()[-FILLER_TOKENS:])


def test_sum_goes_step_by_step():
    question, answer = ReferenceWords().ask_sum(["k3", "k8"], [5, 13])
    assert question == "sum sum k3 k8 ;"
    assert [word for word, _ in answer] == ["n0", "k3", "n5", "n5", "k8", "n13", "n2"]
    assert [word for word, scored in answer if scored] == ["n5", "n5", "n13", "n2"]


def test_a_choice_follows_the_last_word_of_the_question(messages):
    words = LANGUAGES["statements"]
    (easy,), (hard,) = (draw("cloze", words, setting, NUM_TOKENS, 1, 0) for setting in SETTINGS)
    (place, scored), *others = easy.answer
    assert scored and not others and place in easy.choices and len(set(easy.choices)) == 3
    begun = easy.prompt.splitlines()[-1]
    assert easy.question == " is" and f"{begun} is {place}." in easy.prompt
    assert hard.question == f"\n{begun} is" and hard.choices == easy.choices


def test_filler_is_plain_sentences(monkeypatch):
    plain = "The committee has met in the old house by the river once more."
    said = "So Mr. Smith said to all who were in the old house. It met for 5 days."
    text = f"HEADING\n\n{said} {plain} Yes."
    monkeypatch.setattr("diffkv.lab.evaluation.english.messages", lambda: {"one": text})
    assert LANGUAGES["statements"].sentence(np.random.default_rng(0)) == plain


def test_statements_are_scored_word_by_word():
    words = LANGUAGES["statements"]
    facts, question, answer = words.ask_copy(["anchor", "basket", "candle"])
    assert facts == ["The list is: anchor, basket, candle."] and question == "The list is: anchor,"
    assert words.score(" basket, candle.\nThe next", answer) == 1
    assert words.score(" candle, basket.", answer) == 0
    assert words.score(" basket", answer) == 0.5


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("It is 3.5.", "3.5", 1),
        ("It is 13.5.", "3.5", 0),
        ("That is $42, sir", "$42", 1),
        ("in **Zürich**", "Zürich", 1),
        ("Paris, of course", "paris.", 1),
        ("the amber-anchor", "amber anchor", 1),
        ("42", "4", 0),
    ],
)
def test_english_answers_are_found_with_their_signs(text, answer, score):
    assert English().score(text, ((answer, True),)) == score


def test_language_follows_the_vocabulary():
    assert isinstance(
        language_of(hf_runs.vocabulary_of(model_folder("reference")), None), ReferenceWords
    )
    assert isinstance(language_of(["hello", "world"], None), English)


def run(capsys, *options):
    sizes = () if "--suite" in options else ("--n", "2", "--tokens", "512")
    status = main(["eval", "--json", *sizes, *options])
    out, err = capsys.readouterr()
    return status, out, err


def test_two_samples_through_the_command(capsys):
    status, out, _ = run(capsys, "--tasks", "retrieval", "--seed", "3")
    assert status == 0 and out.count("\n") == 1
    row = Row.parse(out)
    assert (row.kind, row["model"], row["seed"], row["quant"]) == (
        TASKS,
        "reference",
        3,
        DEFAULT_QUANT,
    )
    easy, hard = scores(row)
    assert (easy.task, easy.setting, easy.n) == ("retrieval", "easy", 2)
    assert (hard.task, hard.setting, hard.n) == ("retrieval", "hard", 2)
    for score in (easy, hard):
        assert score.accuracy == score.accuracy_full == 1
        assert score.high + score.low + score.dropped == pytest.approx(1, abs=1e-4)
        assert 2 < score.ratio_bf16 < score.nominal_ratio_bf16
    assert row.provenance.commit and row.provenance.transformers


def test_methods_and_seeds_of_one_command_can_be_resumed(capsys, tmp_path):
    """Each cache and seed is a row, equal to that of a command of its own; a second run adds none."""
    methods, out = tmp_path / "methods.txt", tmp_path / "rows.jsonl"
    methods.write_text("# two\n--quant k8v4 --policy none\n\n--quant k8v4-k4v2 --alpha-high 1\n")
    options = ("--tasks", "sum", "--settings", "hard", "--rotate", "none")
    many = (*options, "--seed", "0", "1", "--methods", str(methods), "--out", str(out))
    assert run(capsys, *many)[0] == 0
    rows = read(out)
    asked = [(row["quant"], row["policy"], row["alpha_high"], row["seed"]) for row in rows]
    assert asked == [
        ("k8v4", "none", 0.0, 0),
        ("k8v4", "none", 0.0, 1),
        ("k8v4-k4v2", "paper", 1.0, 0),
        ("k8v4-k4v2", "paper", 1.0, 1),
    ]
    last = ("--quant", "k8v4-k4v2", "--alpha-high", "1", "--seed", "1")
    alone = Row.parse(run(capsys, *options, *last)[1])
    assert alone.case == rows[3].case
    assert scores(alone) == scores(rows[3])

    before = out.read_text()
    status, printed, _ = run(capsys, *many, "--resume")
    assert (status, printed, out.read_text()) == (0, before, before)


def test_formats_of_others_answer_too(capsys, tmp_path):
    methods = tmp_path / "methods.txt"
    methods.write_text("q8_0\n--quant k8v8\n")
    status, out, _ = run(capsys, "--tasks", "sum", "--methods", str(methods))
    assert status == 0
    other, ours = (Row.parse(line) for line in out.splitlines())
    assert (other["quant"], other["policy"], ours["quant"]) == ("q8_0", "none", "k8v8")
    for score in scores(other):
        assert score.accuracy == score.accuracy_full == 1 and score.high == 1
        assert score.ratio_bf16 == pytest.approx(128 / 68, rel=1e-5)


def test_choices_are_the_likeliest_of_the_words():
    model = hf_runs.load(model_folder("reference"), torch.float32, 4, "cpu")
    samples = [
        Sample("<bos> k1 v1 ; k2 v2 ; ? ? k1 k2 ; k1", "", (("v1", True),), ("v2", "v1", "v9")),
        Sample("<bos> k1 v1 ; k2 v2 ; ? ? k2 k1 ; k2", "", (("v2", True),), ("v2", "v1", "v9")),
        Sample("<bos> k1 v1 ; k2 v2 ; ? ? k2 k1 ; k2", "", (("v2", True),), ("v7", "v8")),
    ]
    texts, use = model.answer(samples, 1, None)
    assert texts[:2] == ["v1", "v2"] and texts[2] in ("v7", "v8") and use is None
    again, use = model.answer(samples, 1, OTHER_FORMATS["bf16"])
    assert again == texts and use.ratio_bf16 == 1
    with pytest.raises(ValueError, match="first tokens of choices must differ: v1, v1"):
        model.answer([replace(samples[0], choices=("v1", "v1"))], 1, None)


def test_a_window_forgets_what_is_asked_for(capsys):
    _, out, _ = run(
        capsys, "--tasks", "retrieval", "--quant", "k8v4", "--policy", "window:keep=0.3,sinks=4"
    )
    for score in scores(Row.parse(out)):
        assert score.accuracy < 0.7 and score.accuracy_full == 1
        assert score.ci95_high < 0
        assert score.dropped > 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--policy", "h2o"), "unknown policy 'h2o': there are paper"),
        (("--tasks", "recall"), "unknown task 'recall'"),
        (("--settings", "medium"), "there are easy, hard"),
        (("--policy", "none", "--alpha-low", "1"), "leave out --alpha-high"),
        (("--n", "1"), "at least 2"),
        (("--language", "latin"), "unknown language"),
        (("--texts", "x"), "--suite kld"),
        (("--against", "fp8"), "--against is for --suite kld"),
        (("--suite", "kld", "--n", "3"), "--n is for --suite synth"),
        (("--suite", "kld", "--tokens", "4096"), "--tokens is for --suite synth"),
        (("--suite", "kld", "--tasks", "pairs"), "leave out --tasks"),
        (("--suite", "lm-eval", "--tasks", "gsm8k", "--batch-size", "4"), "leave it out"),
        (("--suite", "lm-eval", "--tasks", "gsm8k", "--language", "english"), "for --suite synth"),
        (("--engine", "vllm", "--policy", "topk"), "by alpha_high and alpha_low: paper"),
        (("--engine", "vllm", "--settings", "hard"), "--settings easy"),
        (("--model", "/nowhere"), "cannot load /nowhere"),
        (("--suite", "kld", "--texts", "/nowhere"), "cannot read --texts"),
        (("--suite", "kld", "--seed", "1"), "leave out --seed"),
        (("--seed", "0", "-1"), "--seed must be at least 0, got -1"),
        (("--methods", "/nowhere"), "cannot read --methods"),
        (("--methods", "/dev/null"), "names no cache"),
        (("--resume",), "give --out"),
    ],
)
def test_refused_in_one_line(capsys, options, words):
    status, out, err = run(capsys, *options)
    assert (status, out) == (2, "")
    assert err.startswith("diffkv: ") and err.count("\n") == 1
    assert words in err


def test_answers_do_not_depend_on_the_batch(capsys):
    model = hf_runs.load(model_folder("reference"), torch.float32, 1, "cpu")
    many = hf_runs.HFModel(model.model, model._tokenizer, 4)
    samples = draw("sum", ReferenceWords(), "hard", 512, 3, 5)
    assert model.answer(samples, 6, None)[0] == many.answer(samples, 6, None)[0]


def test_draws_stay_what_they_are(messages):
    """Results are compared over versions: no task may draw other samples from the same seed."""
    digest = sha256()
    for language, task, setting in CASES:
        for sample in draw(task, language, setting, NUM_TOKENS, 2, 0):
            digest.update(json.dumps([sample.prompt, sample.question, sample.answer]).encode())
    assert digest.hexdigest()[:16] == "326308a32c36abc3"
