"""The OpenAI server: one process for all tests, then one that plain vLLM flags started."""

import contextlib
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import stepping
from conftest import MODEL
from servers import BIND, DIFFKV, Server, running

KV_BYTES = 24 << 20
MODEL_LEN = 2048
# Prompts of eight requests fit one step: borders of chunks would depend on the company, and show.
FLAGS = (
    "--max-model-len", str(MODEL_LEN), "--enforce-eager", "--dtype", "float32",
    "--kv-cache-memory-bytes", str(KV_BYTES), "--max-num-seqs", "8",
    "--max-num-batched-tokens", str(8 * MODEL_LEN),
)  # fmt: skip


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def tokens_of(gauges: dict[str, float]) -> float:
    """Tokens of all rows that are there, mean over heads."""
    return sum(gauges[f"diffkv_tokens_{name}"] for name in ("high", "low", "dropped"))


PROMPT = "<bos> k1 v2 ; k3 v4 ; k5 v6 ; k7 v8 ; ? k5"
LONG = stepping.shipped_prompts()


@pytest.fixture(scope="class")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running([*DIFFKV, "reference", *FLAGS, "--drops"], log) as server:
        yield server


class TestServer:
    @pytest.fixture
    def client(self, server: Server) -> openai.OpenAI:
        return client_of(server)

    def test_banner(self, server: Server) -> None:
        log = server.log.read_text()
        assert "DiffKV k8v8-k4v2: alpha_high 20" in log
        assert "DiffKV capacity in tokens: " in log
        assert "Traceback" not in log

    def test_completion_and_logprobs(self, client: openai.OpenAI) -> None:
        done = client.completions.create(
            model="reference", prompt=PROMPT, max_tokens=2, temperature=0, logprobs=3
        )
        (choice,) = done.choices
        assert choice.text.split() == ["v6", ";"]
        assert choice.finish_reason == "length"
        assert done.usage is not None and done.usage.prompt_tokens == 15
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None and choice.logprobs.top_logprobs
        assert len(choice.logprobs.token_logprobs) == 2
        for chosen, top in zip(
            choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ):
            assert chosen is not None and top is not None
            assert -0.7 < chosen <= 0 and chosen == max(top.values())

    def test_streaming_equals_the_whole(self, client: openai.OpenAI) -> None:
        arguments = {"model": "reference", "prompt": LONG[3], "max_tokens": 40, "temperature": 0}
        whole = client.completions.create(**arguments).choices[0].text
        pieces = [
            event.choices[0].text for event in client.completions.create(**arguments, stream=True)
        ]
        assert len(pieces) > 20
        assert "".join(pieces) == whole
        assert whole.split()[:4] == ["k111", "v125", "k210", "v8"]

    def test_chat(self, client: openai.OpenAI) -> None:
        done = client.chat.completions.create(
            model="reference",
            messages=[
                {"role": "user", "content": "<bos> k1 v2 ; k3 v4 ;"},
                {"role": "user", "content": "? k3"},
            ],
            max_completion_tokens=2,
            temperature=0,
        )
        content = done.choices[0].message.content
        assert content is not None and content.split() == ["v4", ";"]

    def test_stop_and_several_answers(self, client: openai.OpenAI) -> None:
        stopped = client.completions.create(
            model="reference", prompt=PROMPT, max_tokens=20, temperature=0, stop=[" ;"]
        ).choices[0]
        assert (stopped.text.strip(), stopped.finish_reason) == ("v6", "stop")
        several = client.completions.create(
            model="reference", prompt=LONG[2], max_tokens=8, n=2, temperature=1
        ).choices
        assert [choice.index for choice in several] == [0, 1]
        # asked for one of several keys by name, the model is sure
        assert several[0].text == several[1].text != ""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"diffkv_alpha_high": -1}, "diffkv_alpha_high must be a number of 0 or more, got -1"),
            ({"diffkv_alpha_low": "nan"}, "diffkv_alpha_low must be a number of 0 or more"),
            ({"diffkv": "of"}, 'diffkv must be "on" or "off"'),
            ({"diffkv_alfa": 1}, "unknown setting 'diffkv_alfa'"),
            ({"diffkv_alpha_high": 1, "diffkv_alpha_low": 2}, "alpha_high must be at least"),
        ],
    )
    def test_bad_settings(
        self, client: openai.OpenAI, settings: dict[str, float | str], message: str
    ) -> None:
        arguments = {
            "model": "reference", "prompt": PROMPT, "extra_body": {"vllm_xargs": settings},
        }  # fmt: skip
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refusal:
                client.completions.create(**arguments, stream=stream)
            assert refusal.value.status_code == 400
            assert message in str(refusal.value)

    def test_settings(self, client: openai.OpenAI) -> None:
        for settings in ({"diffkv": "off"}, {"diffkv_alpha_high": 1, "diffkv_alpha_low": 0.01}):
            done = client.completions.create(
                model="reference", prompt=LONG[0], max_tokens=4, temperature=0,
                extra_body={"vllm_xargs": settings},
            )  # fmt: skip
            assert done.choices[0].text.split() == ["k92", "v1", "k252", "v99"]

    def test_prompt_that_is_too_long(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match=f"maximum context length is {MODEL_LEN}"):
            client.completions.create(model="reference", prompt="w0 " * 2100, max_tokens=1)

    def test_gauges(self, server: Server, client: openai.OpenAI) -> None:
        idle = server.wait_until_empty()
        assert idle["vllm:kv_cache_usage_perc"] == 0
        kept, kept_tokens = idle["diffkv_pages_held"], tokens_of(idle)  # rows of earlier requests
        assert idle["diffkv_pages_total"] == idle["diffkv_pages_free"] + kept > 1000
        seen: list[dict[str, float]] = []
        with ThreadPoolExecutor(1) as pool:
            for attempt in range(20):  # a slow machine may answer a request between two readings
                answer = pool.submit(
                    client.completions.create, model="reference", prompt=LONG[0], max_tokens=900,
                    temperature=0,
                    extra_body={"ignore_eos": True, "cache_salt": f"gauges {attempt}"},
                )  # fmt: skip
                while not answer.done():
                    found = server.metrics()
                    if found["vllm:kv_cache_usage_perc"]:
                        seen.append(found)
                answer.result()
                if len(seen) >= 2:
                    break
                idle = server.wait_until_empty()
                kept, kept_tokens, seen = idle["diffkv_pages_held"], tokens_of(idle), []
        assert len(seen) >= 2
        for found in seen:
            total = found["diffkv_pages_total"]
            assert found["diffkv_pages_free"] + found["diffkv_pages_held"] == total
            assert 0 < tokens_of(found) - kept_tokens <= 1071 + 900
        busy = seen[-1]
        held = busy["diffkv_pages_held"] - kept
        assert held > 200
        # One request: blocks for the pages of each of its two rows, and what the next token may need
        pages = busy["vllm:kv_cache_usage_perc"] * busy["diffkv_pages_total"]
        assert held <= pages + 6 < held + 24
        assert 250 < busy["diffkv_bytes_per_token"] < 768
        server.wait_until_empty()

    def test_clients_that_disconnect(self, server: Server) -> None:
        """Eight run at once: of sixteen some are queued, some mid-stream when their client goes."""
        arguments = {
            "model": "reference", "max_tokens": 60, "temperature": 0, "stream": True,
            "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        prompts = [LONG[i % len(LONG)] for i in range(16)]
        alone = [
            "".join(
                event.choices[0].text
                for event in client_of(server).completions.create(prompt=prompt, **arguments)
            )
            for prompt in LONG
        ]
        rng = random.Random(0)
        leaves_after = {i: rng.choice([0, 1, 5, 20]) for i in rng.sample(range(16), 8)}
        texts: dict[int, str] = {}

        def ask(i: int) -> None:
            client = client_of(server)
            pieces: list[str] = []
            if leaves_after.get(i) == 0:
                with contextlib.suppress(openai.APITimeoutError):
                    client.with_options(timeout=0.3).completions.create(
                        prompt=prompts[i], **arguments
                    )
                client.close()
                return
            stream = client.completions.create(prompt=prompts[i], **arguments)
            for event in stream:
                pieces.append(event.choices[0].text)
                if len(pieces) == leaves_after.get(i):
                    stream.close()
                    return
            texts[i] = "".join(pieces)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(texts) == set(range(16)) - set(leaves_after)
        assert texts == {i: alone[i % len(LONG)] for i in texts}
        server.wait_until_empty()

    def test_the_example_client(self, server: Server) -> None:
        example = Path(__file__).parents[2] / "examples" / "client.py"
        done = subprocess.run(
            [sys.executable, str(example), f"{server.url}/v1"],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("k92 v1 k252 v99") == 2
        assert "400" in done.stdout
        server.wait_until_empty()

    def test_the_engine_had_no_error(self, server: Server) -> None:
        """Last: what all of the above made it say; errors of requests are the API process's."""
        lines = server.log.read_text().splitlines()
        assert [line for line in lines if "(EngineCore" in line and "ERROR" in line] == []


def test_plain_vllm_with_documented_flags(tmp_path: Path) -> None:
    from diffkv.vllm_plugin.front.server import serve_flags
    from diffkv.vllm_plugin.options import Options

    flags = serve_flags(Options(quant="k8v8", alpha_low=0.0))
    (config,) = [json.loads(f) for f in flags if f.startswith("{")]
    assert config["kv_connector_extra_config"]["quant"] == "k8v8"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL,
        "--served-model-name", "plain", *FLAGS, *flags,
    ]  # fmt: skip
    with running(command, tmp_path / "log") as server:
        done = client_of(server).completions.create(
            model="plain", prompt=LONG[0], max_tokens=4, temperature=0
        )
        assert done.choices[0].text.split() == ["k92", "v1", "k252", "v99"]
        with pytest.raises(openai.BadRequestError, match="got -2"):
            client_of(server).completions.create(
                model="plain", prompt=PROMPT, extra_body={"vllm_xargs": {"diffkv_alpha_low": -2}}
            )
        found = server.wait_until_empty()
        assert (
            found["diffkv_pages_free"] + found["diffkv_pages_held"] == found["diffkv_pages_total"]
        )
        assert "DiffKV k8v8: alpha_high" in server.log.read_text()


def test_two_replicas(tmp_path: Path) -> None:
    """Data parallelism: two engines behind one address, each with a pool of its own."""
    command = [*DIFFKV, "reference", *FLAGS, "--data-parallel-size", "2"]
    with running(command, tmp_path / "log", {BIND: "0|1"}) as server:

        def ask(prompt: str) -> str:
            done = client_of(server).completions.create(
                model="reference", prompt=prompt, max_tokens=8, temperature=0
            )
            return done.choices[0].text

        alone = [ask(prompt) for prompt in LONG]
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, LONG)) == alone
        assert alone[0].split()[:4] == ["k92", "v1", "k252", "v99"]
        found = server.wait_until_empty()
        assert (
            found["diffkv_pages_free"] + found["diffkv_pages_held"] == found["diffkv_pages_total"]
        )
        served = [
            float(line.rsplit(" ", 1)[1])
            for line in httpx.get(f"{server.url}/metrics").text.splitlines()
            if line.startswith("diffkv_prompts_compressed_total{")
        ]
        assert len(served) == 2 and min(served) > 0 and sum(served) == 2 * len(LONG)
