"""Formats of other engines: values computed by hand, by llama.cpp's and vLLM's own rules."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra eval")

from diffkv.cli import main
from diffkv.cli.engine_options import model_folder
from diffkv.lab.evaluation import hf_runs, kld
from diffkv.lab.evaluation.dense_cache import DenseCache
from diffkv.lab.evaluation.distances import Reading
from diffkv.lab.evaluation.engine import NamedCache
from diffkv.lab.evaluation.other_formats import OTHER_FORMATS, OtherFormat
from diffkv.lab.evaluation.results import scores
from diffkv.lab.provenance import collect
from diffkv.lab.rows import Writer, read
from diffkv.quant import ConfigError

F32, F16 = np.float32, np.float16


def vector(*first, size=32):
    """A vector that begins with these elements and goes on with zeros."""
    return torch.tensor([*first, *[0.0] * (size - len(first))])


def round_trip(name, x):
    return OTHER_FORMATS[name].round_trip(x)


def llama_q8_0(block):
    """quantize_row_q8_0_ref and dequantize_row_q8_0 of llama.cpp, element by element."""
    d = F32(np.abs(block).max()) / F32(127)
    inverse = F32(1) / d if d else F32(0)
    codes = []
    for x in block:
        exact = float(F32(x) * inverse)
        codes.append(int(np.sign(exact)) * int(abs(exact) + 0.5))
    return [F32(code) * F32(F16(d)) for code in codes]


def llama_q4_0(block):
    """quantize_row_q4_0_ref and dequantize_row_q4_0 of llama.cpp, element by element."""
    most = largest = F32(0)
    for x in block:
        if most < abs(x):
            most, largest = abs(x), x
    d = largest / F32(-8)
    inverse = F32(1) / d if d else F32(0)
    codes = [min(15, int(F32(x) * inverse + F32(8.5))) for x in block]
    return [F32(code - 8) * F32(F16(d)) for code in codes]


def test_q8_0_by_hand():
    # amax 127 makes the scale 1: halves go away from zero, and 0.49999997 is less than one
    x = vector(127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 0.4)
    assert round_trip("q8_0", x).tolist() == vector(127, 1, -1, 2, 3, -3, 0, 0).tolist()
    # codes are by amax / 127 in float32, what is read is by that in fp16: 1 / 127 is 0.00787354
    scale = float(F32(F16(1 / 127)))
    assert scale != F32(1 / 127)
    x = vector(1.0, -0.5, 0.01)
    assert round_trip("q8_0", x).tolist() == vector(127 * scale, -64 * scale, scale).tolist()


def test_q4_0_by_hand():
    # The largest is 8, so the scale is -1, and the codes are floor(8.5 - x): 0, 16, 5, 12, 8
    x = vector(8.0, -7.6, 3.4, -3.5, 0.5)
    assert round_trip("q4_0", x).tolist() == vector(8, -7, 3, -4, 0).tolist()
    # The first of two that are as large sets the sign
    x = vector(-8.0, 8.0)
    assert round_trip("q4_0", x).tolist() == vector(-8, 7).tolist()


@pytest.mark.parametrize(("name", "rule"), [("q8_0", llama_q8_0), ("q4_0", llama_q4_0)])
def test_llamas_rules_element_by_element(name, rule):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator) * torch.logspace(-4, 3, 40)[:, None]
    x[0], x[1, :32] = 0.0, 3.0
    expected = [[*rule(row[:32]), *rule(row[32:])] for row in x.numpy()]
    assert np.array_equal(round_trip(name, x).numpy(), np.array(expected, F32))


def test_fp8_saturates():
    x = torch.tensor([1000.0, -1000.0, 448.0, 1.06, 1.07, 2.0**-9, 2.0**-11])
    expected = [448.0, -448.0, 448.0, 1.0, 1.125, 2.0**-9, 0.0]
    assert round_trip("fp8", x).tolist() == expected


def test_int4_by_hand():
    # From -5 to 10: the scale is 1, the zero 5; the scale loses its last four bits, which 1.0 has not
    x = vector(-5.0, 10.0, 2.4, 2.5, -0.5, size=8)
    assert (
        round_trip("int4_per_token_head-unrotated", x).tolist()
        == vector(-5, 10, 2, 3, -0.0, size=8).tolist()
    )
    # All positive: the zero would be below 0, so that codes begin at 0
    x = torch.linspace(10, 25, 16)
    assert round_trip("int4_per_token_head-unrotated", x).tolist() == [
        *(float(min(15, i)) for i in range(10, 26))
    ]


def test_a_rotation_spreads_an_outlier():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=generator)
    x[:, 3] = 40.0
    errors = {
        name: float((round_trip(name, x) - x)[:, 4:].square().mean())
        for name in ("int4_per_token_head", "int4_per_token_head-unrotated")
    }
    assert errors["int4_per_token_head"] < errors["int4_per_token_head-unrotated"] / 4
    exact = OtherFormat("exact", "us", 32, lambda x: x)
    rotated = OTHER_FORMATS["int4_per_token_head"].round_trip.func(exact.round_trip, x)
    assert torch.allclose(rotated, x, atol=1e-4)


def test_bytes_of_a_vector():
    found = {name: each.vector_bytes(64) for name, each in OTHER_FORMATS.items()}
    assert found == {
        "bf16": 128,
        "fp8": 64,
        "q8_0": 68,
        "q4_0": 36,
        "int4_per_token_head": 36,
        "int4_per_token_head-unrotated": 36,
    }
    with pytest.raises(ConfigError, match="q8_0 has blocks of 32: head_dim 80 is no multiple"):
        OTHER_FORMATS["q8_0"].vector_bytes(80)


@pytest.fixture(scope="module", name="model")
def _model():
    return hf_runs.load(model_folder("reference"), torch.float32, 2, "cpu")


def test_a_dense_cache_attends_to_what_is_stored(model):
    """The prompt is exact; later tokens see what it became, and the use is what it takes."""
    zeros = OtherFormat("zeros", "us", 8, torch.zeros_like)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    exact, other = model.full_cache(8), model.make_cache(zeros, 8)
    assert torch.equal(model.forward(exact, ids[:, :4]), model.forward(other, ids[:, :4]))
    assert not torch.equal(model.forward(exact, ids[:, 4:]), model.forward(other, ids[:, 4:]))
    assert all(bool((layer.values[:, :, :5] == 0).all()) for layer in other.layers)
    use, config = other.use(), model.model.config
    vectors = 2 * 5 * config.num_hidden_layers * config.num_key_value_heads
    assert (use.tokens, use.num_bytes) == (5, vectors * 64)
    assert use.ratio_bf16 == use.nominal_ratio_bf16 == 2
    with pytest.raises(ValueError, match="only a cache in another format"):
        DenseCache(config, 8).use()


METHODS = "bf16\nq8_0\n# ours\n--quant k16v16\n--quant k2v2\n--quant k8v4 --policy topk:keep=0.5\n"


def test_methods_through_the_command_and_resumed(capsys, tmp_path, monkeypatch):
    methods, out = tmp_path / "methods.txt", tmp_path / "rows.jsonl"
    methods.write_text(METHODS)
    command = [
        *("eval", "--suite", "kld", "--methods", str(methods), "--against", "fp8,q8_0"),
        *("--contexts", "128", "192", "--num-texts", "2", "--steps", "8", "--batch-size", "3"),
        *("--out", str(out), "--json"),
    ]
    assert main(command) == 0
    found = {row["cache"]: scores(row) for row in read(out)}
    capped = "k8v4 policy=topk:keep=0.5"
    assert list(found) == ["fp8", "q8_0", "bf16", "k16v16", "k2v2", capped]
    every = {name: cells[0] for name, cells in found.items()}
    for cells in found.values():
        assert [cell.context for cell in cells] == ["all", 128, 192]
        assert [(cell.n, cell.steps) for cell in cells] == [(4, 32), (2, 16), (2, 16)]
    assert every["k16v16"].kld_mean <= 1e-6 and every["k16v16"].diverged == 0
    assert every["k16v16"].first_divergence == 8
    means = [every[name].kld_mean for name in ("bf16", "q8_0", "fp8", "k2v2")]
    assert means == sorted(means)
    assert every["bf16"].ratio_bf16 == 1
    assert every["q8_0"].ratio_bf16 == pytest.approx(128 / 68, rel=1e-5)
    assert every[capped].dropped > 0.2
    # Each length has its own pages; all texts together have their mean
    less, more = sorted(cell.bytes_per_token for cell in found["k2v2"][1:])
    assert less < every["k2v2"].bytes_per_token < more

    before = out.read_text()
    monkeypatch.setattr(kld, "_read_full", None)
    monkeypatch.setattr(kld, "_read", None)
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert out.read_text() == before == capsys.readouterr().out


def test_a_text_longer_than_the_model_reads_is_refused(capsys, model):
    longest = model.longest
    command = ["eval", "--suite", "kld", "--contexts", str(2 * longest), "--steps", "8"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert f"--contexts must be at most {longest} for reference, got {2 * longest}" in err


def test_figures_do_not_depend_on_batches(model):
    """Two texts at once or one by one: the same distances and the same first differences."""
    ids = torch.randint(4, 300, (2, 96), generator=torch.Generator().manual_seed(1)).tolist()
    reading = Reading([ids[0], ids[1], ids[0][:80]], 6)
    cache = NamedCache("q4_0", OTHER_FORMATS["q4_0"])
    rows = []
    for size in (1, 2):
        engine = hf_runs.HFModel(model.model, model._tokenizer, size)
        (row,) = kld.rows(engine, "m", [cache], reading, Writer(collect("cpu")))
        rows.append(scores(row))
    for one, two in zip(*rows, strict=True):
        assert one.kld_mean == pytest.approx(two.kld_mean, rel=1e-3)
        assert one.first_divergence == two.first_divergence
        assert one.bytes_per_token == two.bytes_per_token
