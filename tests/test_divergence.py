"""Distances of next-token distributions, by hand; and what `eval --suite kld` refuses."""

import math
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffkv.cli import eval_methods, main, texts
from diffkv.cli.texts import DEFAULT_CONTEXT
from diffkv.lab.evaluation import english
from diffkv.lab.evaluation.divergence import Divergence, compare, first_difference
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.options import Options


def test_divergence_by_hand():
    full = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]]).log()
    other = torch.tensor([[[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]]).log()

    result = compare(full, other, torch.tensor([[0, 2]]))

    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert result.kld == pytest.approx(np.array([[expected, 0.0]]), abs=1e-7)
    assert result.same.tolist() == [[False, True]]
    assert result.nll_full == pytest.approx(-np.log([[0.5, 0.1]]))
    assert result.nll == pytest.approx(-np.log([[0.25, 0.1]]))


def test_parts_are_joined():
    full, tokens = torch.randn(2, 3, 5).log_softmax(-1), torch.randint(5, (2, 3))
    other = torch.randn(2, 3, 5).log_softmax(-1)
    whole = compare(full, other, tokens)

    rows = [compare(full[[i]], other[[i]], tokens[[i]]) for i in range(2)]
    steps = [compare(full[:, [i]], other[:, [i]], tokens[:, [i]]) for i in range(3)]

    for joined in (Divergence.join(rows, 0), Divergence.join(steps, 1)):
        for name, values in vars(whole).items():
            assert np.array_equal(vars(joined)[name], values), name


def test_first_difference():
    same = np.array([[True, False, True], [True, True, True], [False, False, True]])
    assert first_difference(same).tolist() == [1, 3, 0]


def test_texts_are_the_beginnings_of_messages_and_then_what_follows(messages):
    first, *others = (list(text.encode()) for text in messages.values())

    found = english.cut(lambda text: [1, *text.encode()], 4, [100, 300])

    beginnings = [[1, *ids[:299]] for ids in (first, *others)]
    assert found[:4] == [*(text[:100] for text in beginnings), [1, *first[99:198]]]
    assert found[4:] == [*beginnings, [1, *first[299:598]]]
    with pytest.raises(ConfigError, match="give 0 texts of 100 tokens, not 2"):
        english.cut(lambda text: list(text.encode())[:50], 2, [100])


@pytest.mark.parametrize(("longest", "length"), [(2048, 2048), (8192, DEFAULT_CONTEXT)])
def test_texts_are_no_longer_than_the_model_reads(messages, longest, length):
    args = Namespace(contexts=None, num_texts=2, steps=8, texts=None, model="m")
    reader = SimpleNamespace(longest=longest, encode=lambda text: [1, *text.encode()])
    read = texts.reading(args, None, reader)
    assert [len(text) for text in read.texts] == [length] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "fp9"], "'fp9' is neither a format of others (bf16, fp8, q8_0, q4_0,"),
        (["--engine", "vllm", "--contexts", "200"], "--contexts must be at least 258"),
        (["--engine", "vllm", "--num-texts", "0"], "--num-texts must be at least 1, got 0"),
        (
            ["--engine", "vllm", "--steps", "1"],
            "--steps must be at least 2, got 1",
        ),
        (
            ["--engine", "vllm", "--against", "fp9"],
            "--against fp9: neither bf16, nor a cache of vLLM's",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, capsys):
    assert main(["eval", "--suite", "kld", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q8_1", "line 2: 'q8_1' is neither a format of others (bf16, fp8, q8_0, q4_0,"),
        ("q8_0 q4_0", "a line has options of the cache or one name, got 'q8_0 q4_0'"),
        ("q8_0 --quant k8v8", "a line has options of the cache or one name, got 'q8_0'"),
        ("--quantum k8v8", "a line has options of the cache or one name, got '--quantum k8v8'"),
    ],
)
def test_lines_of_methods_that_are_refused(line, message, capsys, tmp_path):
    methods = tmp_path / "methods.txt"
    methods.write_text(f"# one\n{line}\n")

    assert main(["eval", "--suite", "kld", "--methods", str(methods)]) == 2

    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


@pytest.mark.parametrize(
    ("options", "policy", "name"),
    [
        ({}, None, "k8v8-k4v2"),
        ({"alpha_high": 20, "alpha_low": 0.0, "rotate": "hadamard"}, "paper", "k8v8-k4v2"),
        ({"alpha_high": 1.0, "alpha_low": 0.02}, None, "k8v8-k4v2 alpha_high=1 alpha_low=0.02"),
        ({"quant": "k8v4", "segment": 0}, "topk:keep=0.5", "k8v4 segment=0 policy=topk:keep=0.5"),
        ({"quant": "k16v16", "rotate": "hadamard"}, None, "k16v16 rotate=hadamard"),
    ],
)
def test_names_say_what_differs_from_defaults(options, policy, name):
    assert eval_methods.words(Options(**options), policy) == name
