"""`diffkv inspect`: what it reads is what the pool holds, and what it shows is what it read."""

import re
from pathlib import Path

import pytest
import small_pool
import torch

from diffkv import ops
from diffkv.cli import heatmap, main
from diffkv.lab.evaluation.results import HEADS
from diffkv.lab.rows import Row
from diffkv.policy import HIGH
from diffkv.quant import DEFAULT_QUANT
from diffkv.vllm_plugin.front.insight import _join_heads
from diffkv.vllm_plugin.worker.pages import read_pool, token_tiers

NUM_TOKENS = 12
ALPHAS = ("--alpha-high", "5", "--alpha-low", "0.04")


def test_a_request_is_read_over_all_of_its_rows() -> None:
    """A request of two rows of random tiers."""
    kernels = ops.load("cpu", "reference")
    state = small_pool.make_state("k8v4-k4v2", 128, 60)
    generator = torch.Generator().manual_seed(3)
    for layer in range(small_pool.NUM_LAYERS):
        tiers = torch.randint(0, 3, (small_pool.NUM_KV_HEADS, NUM_TOKENS), generator=generator)
        tiers[:, -small_pool.WINDOW :] = HIGH
        for slot, span in ((2, slice(0, 5)), (0, slice(5, NUM_TOKENS))):
            sums = torch.zeros(tiers[:, span].shape).tolist()
            rows = [(slot, range(span.start, span.stop))]
            small_pool.store(kernels, state, layer, rows, tiers[:, span].tolist(), sums)
        read = token_tiers(state, (2, 0), NUM_TOKENS)
        assert torch.equal(read[layer], tiers.to(torch.int8))
    (request,) = read_pool(state, [((2, 0), NUM_TOKENS)])
    assert request["num_tokens"] == NUM_TOKENS
    for digit, name in (("0", "high"), ("1", "low")):
        counts = [[head.count(digit) for head in heads] for heads in request["tiers"]]
        held = state.num_tokens[[2, 0], :, :, int(digit)].sum(0)
        assert counts == request[name] == held.tolist()


def test_heads_of_ranks_are_joined_by_layer() -> None:
    assert _join_heads([[[1, 2], [3, 4]], [[5], [6]]]) == [[1, 2, 5], [3, 4, 6]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, Path]:
    """One run of the command over the shipped prompts, as JSON and files."""
    folder = tmp_path_factory.mktemp("insight")
    arguments = ["inspect", "--out", str(folder), "--layer", "1", "--head", "1", *ALPHAS]
    assert main(arguments) == 0
    return Row.parse((folder / "inspect.json").read_text()), folder


def test_numbers(shown: tuple[Row, Path]) -> None:
    facts, _ = shown
    assert (facts.kind, facts["model"], facts["quant"]) == (HEADS, "reference", DEFAULT_QUANT)
    assert (facts["num_layers"], facts["num_kv_heads"], len(facts["prompts"])) == (3, 2, 8)
    assert facts["num_tokens"] == sum(prompt["num_tokens"] for prompt in facts["prompts"])
    for layer in range(3):
        for head in range(2):
            for tier in ("high", "low"):
                total = sum(prompt[tier][layer][head] for prompt in facts["prompts"])
                assert facts["shares"][tier][layer][head] == total / facts["num_tokens"]
            kept = [facts["shares"][tier][layer][head] for tier in ("high", "low", "dropped")]
            assert sum(kept) == pytest.approx(1)
            assert all(prompt["high"][layer][head] >= 64 for prompt in facts["prompts"])
    assert 0.05 < facts["mean"]["high"] < 0.5
    assert facts["mean"]["low"] > 0.3
    assert facts["mean"]["dropped"] > 0.05


def test_tokens_of_one_head(shown: tuple[Row, Path]) -> None:
    facts, _ = shown
    tokens, first = facts["tokens"], facts["prompts"][0]
    assert (tokens["layer"], tokens["head"]) == (1, 1)
    assert len(tokens["texts"]) == len(tokens["tiers"]) == first["num_tokens"]
    assert tokens["tiers"].count("0") == first["high"][1][1]
    assert tokens["tiers"].count("1") == first["low"][1][1]
    assert tokens["tiers"].endswith("0" * 64)
    assert tokens["texts"][0] == "<bos>"


def test_page_of_tokens(shown: tuple[Row, Path]) -> None:
    facts, folder = shown
    page = (folder / "tokens.html").read_text()
    spans = re.findall(r'^<span class="t(\d)" title="(\d+): (\w+)">(.*)</span>$', page, re.M)
    assert "".join(tier for tier, *_ in spans) == facts["tokens"]["tiers"]
    assert [int(position) for _, position, *_ in spans] == list(range(len(spans)))
    assert spans[0][3] == "&lt;bos&gt;"
    assert f">dropped: {facts['tokens']['tiers'].count('2')}</span>" in page


def test_picture(shown: tuple[Row, Path]) -> None:
    from matplotlib.image import imread

    pixels = imread(shown[1] / "heatmap.png")
    assert pixels.shape[0] > 200 and pixels.shape[1] > 600
    assert pixels.std() > 0.1


def test_maps_on_the_terminal(shown: tuple[Row, Path], capsys: pytest.CaptureFixture[str]) -> None:
    facts, _ = shown
    heatmap.print_maps(facts)
    out = capsys.readouterr().out
    rows = re.findall(r"^│ (\d) +│ +([\d.]+) +│ +([\d.]+) +│$", out, re.M)
    expected = [
        (str(layer), *(f"{share * 100:.1f}" for share in heads))
        for tier in ("high", "low", "dropped")
        for layer, heads in enumerate(facts["shares"][tier])
    ]
    assert rows == expected


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--layer", "3"), "diffkv: --layer must be in 0 .. 2, got 3"),
        (("--head", "-1"), "diffkv: --head must be in 0 .. 1, got -1"),
        (("--max-tokens", "0"), "diffkv: --max-tokens must be at least 1, got 0"),
        (("--out", "/dev/null/x"), "diffkv: cannot write to --out /dev/null/x: Not a directory"),
    ],
)
def test_refusals(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str
) -> None:
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [line]
