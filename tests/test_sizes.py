"""Sizes are read in one way, and options that take several values lose none."""

import argparse

import pytest

from diffkv.cli import (
    bench,
    calibrate,
    calibrate_questions,
    eval,
    generate,
    inspect,
    layout,
    plan,
    report,
)
from diffkv.cli.arguments import Joined, Listed
from diffkv.quant import ConfigError
from diffkv.sizes import parse_bytes, parse_tokens

GIB = 1 << 30
COMMANDS = (bench, calibrate, eval, generate, inspect, layout, plan, report)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("7", 7),
        ("512MiB", 512 << 20),
        ("2GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        ("2G", 2 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("1.5g", 1_500_000_000),
        ("80GB", 80 * 10**9),
        ("80gb", 80 * 10**9),
        ("1.5 GiB", 3 * GIB // 2),
        ("64 B", 64),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_bytes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("500", 500), ("32K", 32768), ("32k", 32000), ("1M", 1 << 20), ("1.5K", 1536)],
)
def test_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1", "12 Gb/s", "iB", "0", "0.2", "1e9", "5 iB", "9" * 5000, "9" * 400 + ".5"],
)
def test_bad_bytes(text):
    with pytest.raises(ConfigError, match="must be bytes or a number with a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "text", ["32KB", "32KiB", "5B", "0", "1.0001K", "many", "0.5", "9" * 400 + ".5K"]
)
def test_bad_tokens(text):
    with pytest.raises(ConfigError, match="must be a"):
        parse_tokens(text)


@pytest.mark.parametrize("text", ["1k", "2K", "25.6k", "3m", "3M", "1g", "1G", "2T", "1234"])
def test_what_vllm_reads_means_the_same_here(text):
    vllm = pytest.importorskip("vllm.utils.argparse_utils", reason="needs vLLM")
    assert parse_bytes(text) == vllm.human_readable_int(text)


def parser_of(command):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser


def actions(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from actions(each)
        else:
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_with_several_values_forgets_the_first(command):
    lists = [a for a in actions(parser_of(command)) if a.nargs == "+" and a.option_strings]
    for action in lists:
        assert isinstance(action, Listed), action.option_strings
    for action in actions(parser_of(command)):
        if "commas" in (action.help or ""):
            assert isinstance(action, Joined), action.option_strings


@pytest.mark.parametrize("command", [generate, inspect])
def test_prompts_add_up(command):
    parser = parser_of(command)
    args = parser.parse_args(["--prompt", "A", "B", "--kv-memory", "512MiB", "--prompt", "C"])
    assert args.prompt == ["A", "B", "C"]
    assert args.kv_memory == 512 << 20
    assert parser.parse_args([]).prompt is None


def test_a_default_gives_way_to_what_is_given():
    parser = parser_of(bench)
    default = parser.parse_args(["attention"])
    given = parser.parse_args(["attention", "--ctx", "1K", "--ctx", "2K", "--quant", "k8v8"])
    assert len(default.quant) == 3
    assert (given.ctx, given.quant) == ([1024, 2048], ["k8v8"])
    assert parser.parse_args(["attention"]).ctx == default.ctx


def test_names_between_commas_add_up():
    parser = parser_of(calibrate)
    needed = ["--data", "synth", "--max-loss", "1%"]
    assert parser.parse_args(needed).search is None
    assert calibrate_questions.SEARCH == "alpha_high,alpha_low"
    given = parser.parse_args([*needed, "--search", "alpha_high", "--search", "distinct"])
    assert given.search == "alpha_high,distinct"


def test_a_bad_size_is_refused_with_what_would_work(capsys):
    with pytest.raises(SystemExit):
        parser_of(generate).parse_args(["--kv-memory", "lots"])
    assert (
        "must be bytes or a number with a unit, as in 512MiB, 80GB or 2G, got 'lots'"
        in capsys.readouterr().err
    )
