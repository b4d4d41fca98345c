"""Distances of next-token distributions, by hand; and what `eval --suite kld --engine vllm` refuses."""

import math

import numpy as np
import pytest

from diffkv.cli import main
from diffkv.lab.evaluation import english
from diffkv.lab.evaluation.divergence import compare, first_difference
from diffkv.quant import ConfigError


def test_divergence_by_hand():
    full = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]], np.float32))
    other = np.log(np.array([[[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]], np.float32))

    result = compare(full, other, [[0, 2]])

    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert result.kld == pytest.approx(np.array([[expected, 0.0]]), abs=1e-7)
    assert result.same.tolist() == [[False, True]]
    assert result.nll_full == pytest.approx(-np.log([[0.5, 0.1]]))
    assert result.nll == pytest.approx(-np.log([[0.25, 0.1]]))


def test_first_difference():
    same = np.array([[True, False, True], [True, True, True], [False, False, True]])
    assert first_difference(same).tolist() == [1, 3, 0]


def test_texts_follow_each_other_and_have_their_lengths():
    texts = english.cut(lambda text: list(text.encode()), 2, [100, 300])

    assert [len(text) for text in texts] == [100, 100, 300, 300]
    assert texts[2][:200] == texts[0] + texts[1]
    with pytest.raises(ConfigError, match="are more than the"):
        english.cut(lambda text: [1] * 50, 2, [100])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "fp8"], "--against is for --suite kld --engine vllm"),
        (["--engine", "vllm", "--contexts", "200"], "--contexts must be at least 258"),
        (["--engine", "vllm", "--num-texts", "0"], "--num-texts must be at least 1, got 0"),
        (
            ["--engine", "vllm", "--steps", "1"],
            "--steps must be at least 2 with --engine vllm, got 1",
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
