"""The search for thresholds against losses that are known, what it keeps, and the file it writes."""

import json

import pytest

from diffkv.cli import main
from diffkv.cli.calibrate import _share
from diffkv.cli.calibrate_questions import _check_full
from diffkv.lab.calibrate import file, questions
from diffkv.lab.calibrate.journal import Journal
from diffkv.lab.calibrate.search import (
    DISTINCT_GRID,
    HIGH_GRID,
    LOW_GRID,
    PUBLISHED,
    STEPS,
    Part,
    Setting,
    search,
    stages,
)
from diffkv.policy import Thresholds
from diffkv.quant import ConfigError
from diffkv.use import CacheUse
from diffkv.vllm_plugin.options import Options

NUM_SAMPLES = 40
SYNTH = ("--data", "synth", "--max-loss", "1%")


class Fake:
    """Losses are slopes times thresholds and times what is dropped by keys; bytes fall with both."""

    def __init__(self, high_slope, low_slope, base=0.0, distinct_slope=0.0):
        self.slopes = high_slope, low_slope, distinct_slope
        self.base = base
        self.calls = []

    def __call__(self, setting, samples):
        self.calls.append((setting, samples))
        alphas, dropped = setting.thresholds, 1 - setting.distinct
        high, low, distinct = self.slopes
        loss = self.base + high * alphas.alpha_high + low * alphas.alpha_low + distinct * dropped
        num = len(samples)
        num_bytes = num * 100 * (400 - alphas.alpha_high - alphas.alpha_low - 100 * dropped)
        use = CacheUse(100 * num, 50.0 * num, 25.0 * num, 9 * num, num_bytes, 100 * num * 1536, 1e3)
        return Part((loss,) * num, use)


@pytest.mark.parametrize("limit", [0.0, 0.009, 0.011, 0.031, 0.5])
def test_choice_is_that_of_a_full_sweep(limit):
    fake = Fake(0.01, 0.1)
    choice, curve = search(fake, NUM_SAMPLES, limit, has_low=True)
    high = max(alpha for alpha in HIGH_GRID if 0.01 * alpha <= limit)
    low = max(a for a in LOW_GRID if a <= high and 0.01 * high + 0.1 * a <= limit)
    assert choice.setting == Setting(Thresholds(high, low))
    assert choice.accepted and choice.n == NUM_SAMPLES
    assert choice.loss == pytest.approx(0.01 * high + 0.1 * low)
    assert choice.use.bytes_per_token == pytest.approx(400 - high - low)
    assert len(curve) <= 1 + 4 + 4  # bisections of 15 and 11
    assert len(curve) == len({point.setting for point in curve})


@pytest.mark.parametrize("limit", [0.001, 0.055, 0.0775, 0.4])
def test_share_of_keys_comes_last(limit):
    fake = Fake(0.01, 0.1, distinct_slope=0.1)
    choice, curve = search(fake, NUM_SAMPLES, limit, True, STEPS)
    before, _ = search(Fake(0.01, 0.1), NUM_SAMPLES, limit, True, PUBLISHED)
    thresholds, left = before.setting.thresholds, limit - before.loss
    if thresholds.alpha_high == 0:  # no low tokens: nothing to drop
        assert choice.setting == before.setting
        return
    share = min(share for share in DISTINCT_GRID if 0.1 * (1 - share) <= left + 1e-9)
    assert choice.setting == Setting(thresholds, share)
    shares = [point.setting.distinct for point in curve]
    assert shares == sorted(shares, key=lambda share: share < 1)
    assert all(p.setting.thresholds == thresholds for p in curve if p.setting.distinct < 1)


def test_only_what_was_asked_for_is_searched():
    _, curve = search(Fake(0.0, 0.0), NUM_SAMPLES, 0.01, True, ("alpha_high", "distinct"))
    assert {point.setting.thresholds.alpha_low for point in curve} == {0.0}
    assert curve[-1].setting == Setting(Thresholds(HIGH_GRID[-1], 0.0), DISTINCT_GRID[-1])
    _, curve = search(Fake(0.0, 0.0), NUM_SAMPLES, 0.01, True, PUBLISHED)
    assert {point.setting.distinct for point in curve} == {1.0}


def test_one_tier_has_one_threshold():
    choice, curve = search(Fake(0.0, 0.1), NUM_SAMPLES, 0.009, has_low=False)
    assert choice.setting.thresholds == Thresholds(0.08, 0.08)
    for point in curve:
        assert point.setting.thresholds.alpha_high == point.setting.thresholds.alpha_low


def test_nothing_fits():
    choice, curve = search(Fake(0.01, 0.1, base=0.2), NUM_SAMPLES, 0.01, has_low=True)
    assert choice is None
    assert [point.setting for point in curve] == [Setting(Thresholds(0, 0))]
    assert not curve[0].accepted


def test_a_bad_setting_is_given_up_early_and_a_good_one_never():
    fake = Fake(0.1, 1.0)
    search(fake, NUM_SAMPLES, 0.01, has_low=True)
    asked = {}
    for setting, samples in fake.calls:
        asked[setting] = asked.get(setting, 0) + len(samples)
    assert asked[Setting(Thresholds(0.0, 0.0))] == NUM_SAMPLES
    assert asked[Setting(Thresholds(5.0, 0.0))] == NUM_SAMPLES // 8


@pytest.mark.parametrize("num", [1, 2, 7, 8, 9, 100])
def test_stages_cover_every_sample_once(num):
    assert [i for part in stages(num) for i in part] == list(range(num))


def test_a_stopped_run_goes_on(tmp_path):
    path, identity = tmp_path / "c.partial", {"model": "m", "seed": 0}
    fake = Fake(0.01, 0.1, distinct_slope=0.01)
    first = search(Journal(path, identity).kept(fake), NUM_SAMPLES, 0.02, True, STEPS)
    num_calls = len(fake.calls)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:10])  # stopped in the middle of a line
    journal = Journal(path, identity)
    assert journal.num_found == 3
    again = search(journal.kept(fake), NUM_SAMPLES, 0.02, True, STEPS)
    assert again == first
    assert len(fake.calls) == 2 * num_calls - 3
    assert len(path.read_text().splitlines()) == 1 + num_calls
    with pytest.raises(ConfigError, match=r"is of another run \(other seed\)"):
        Journal(path, {**identity, "seed": 1})


def test_scores():
    place = questions.Question("p", questions.as_answer("k1 v2", questions.PLACE), 4)
    assert [place.score(text) for text in (" k1 v2 ;", "k1 v3", "v2 k1", "")] == [1, 0.5, 0, 0]
    words = questions.as_answer("42 apples", questions.ANYWHERE)
    anywhere = questions.Question("p", words, 4, questions.ANYWHERE)
    assert [anywhere.score(text) for text in ("It is 42 Apples.", "42", "")] == [1, 0, 0]
    assert questions.agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert questions.agreement([1, 2], [1, 2]) == 1
    assert questions.agreement([1], [1, 2]) == 0.5


def test_generated_questions():
    found = questions.synthetic("reference", 512, 12, seed=1)
    assert len(found) == 12
    assert {len(question.prompt.split()) for question in found} == {512}
    assert all(question.score(" ".join(w for w, _ in question.answer)) == 1 for question in found)
    assert questions.digest(found) != questions.digest(questions.synthetic("reference", 512, 12, 2))


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5%", 0.005), ("0.02", 0.02)])
def test_shares(text, share):
    assert _share(text) == pytest.approx(share)


def calibration(model_file, quant="k8v4-k4v2", steps=PUBLISHED):
    choice, curve = search(Fake(0.01, 0.1), NUM_SAMPLES, 0.0161, True, steps)
    assert choice.setting.thresholds == Thresholds(1.5, 0.0)
    return file.Calibration(
        max_loss=0.016,
        model=file.Model(name="reference", config_sha256=file.model_digest(model_file)),
        data=file.Data(source="d", samples=NUM_SAMPLES, seed=0, sha256="0", metric="right_words"),
        choice=file.Choice.of(choice, quant=quant, window=32),
        source=file.Source(command="diffkv calibrate", versions={}),
        curve=[file.CurvePoint.of(point) for point in curve],
    )


def test_file_round_trip_and_digest(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"hidden_size": 8, "transformers_version": "1"}))
    made = calibration(config)
    made.write(tmp_path / "c.toml")
    assert file.read(tmp_path / "c.toml") == made
    config.write_text(json.dumps({"transformers_version": "2", "hidden_size": 8}, indent=1))
    assert file.model_digest(config) == made.model.config_sha256
    config.write_text(json.dumps({"hidden_size": 16}))
    assert file.model_digest(config) != made.model.config_sha256


def test_values_that_an_engine_takes(tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    values = calibration(config).values()
    assert (values["alpha_high"], values["policy"]) == (1.5, "paper")
    made = calibration(config, steps=STEPS)
    assert made.choice.distinct == DISTINCT_GRID[-1]
    made.write(tmp_path / "c.toml")
    options = Options.parse(file.read(tmp_path / "c.toml").values())
    assert options.prompt_policy().distinct == DISTINCT_GRID[-1]
    assert options.thresholds() == Thresholds(1.5, 0.0)


def test_files_without_a_share_are_read(tmp_path):
    config = tmp_path / "config.json"
    config.write_text("{}")
    calibration(config).write(tmp_path / "c.toml")
    text = (tmp_path / "c.toml").read_text()
    older = "".join(line for line in text.splitlines(True) if not line.startswith("distinct"))
    assert older != text
    (tmp_path / "c.toml").write_text(older)
    assert file.read(tmp_path / "c.toml") == calibration(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = [", "is not TOML"),
        ("x = 1", "is no file of diffkv calibrate: max_loss: Field required"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        file.read(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.jsonl", "--max-loss", "1%"), "cannot read"),
        (("--data", "synth", "--max-loss", "120%"), "a share of 0 to 1, as 1% or 0.01"),
        (("--data", "synth", "--max-loss", "1%", "--samples", "0"), "--samples must be at least 1"),
        (("--data", "synth", "--max-loss", "1%", "--out", "/no/c.toml"), "/no is no folder"),
        (("--data", "synth", "--max-loss", "1%", "--quant", "k3v3"), "k_bits must be one of"),
        ((*SYNTH, "--search", "beta"), "'beta': there are alpha_high, alpha_low, distinct"),
        ((*SYNTH, "--search", "distinct"), "says which are: name both"),
        ((*SYNTH, "--search", "alpha_high,distinct", "--quant", "k8v4"), "k8v4 has no low tier"),
    ],
)
def test_options_are_refused(capsys, arguments, message):
    try:
        status = main(["calibrate", *arguments])
    except SystemExit as refused:
        status = refused.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1+1", "answer": ""}', "line 1 is no JSON object with"),
        ('{"prompt": "1+1", "answer": "?!"}', "has no word that could be found"),
        ('{"prompt": "1+1", "answer": ["2", "two"]}', "must be a text or a number, got"),
    ],
)
def test_answers_that_cannot_be_found_are_refused(tmp_path, capsys, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    data = ("--data", str(tmp_path / "q.jsonl"), "--max-loss", "1%", "--match", "anywhere")
    assert main(["calibrate", *data, "--out", str(tmp_path / "c.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_model_that_answers_nothing_right_cannot_lose():
    _check_full([1.0, 0.0], questions.RIGHT_WORDS)
    _check_full([[1, 2], [3]], questions.AGREEMENT)
    with pytest.raises(ConfigError, match="full precision has 0% of the answers right"):
        _check_full([0.0] * 8, questions.RIGHT_WORDS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--segment", "64"), "leave out --segment"),
        (("--alpha-high", "3"), "thresholds, window, segment and policy: leave out --alpha-high"),
        (("--policy", "paper"), "leave out --policy"),
        (("--preset", "auto", "--quant", "k8v4"), "leave out --quant and --preset"),
        ((), "is of reference, and reference has another configuration: calibrate it"),
    ],
)
def test_a_calibration_stands_alone_and_is_of_one_model(tmp_path, capsys, flags, message):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"hidden_size": 8}))
    calibration(config).write(tmp_path / "c.toml")
    for command in (["generate", "--prompt", "x"], ["serve", "reference"]):
        arguments = [*command, "--calibration", str(tmp_path / "c.toml"), *flags]
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
