"""A model that cannot be had is one line, without what libraries say of their retries."""

import pytest

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: E402

from diffkv.cli import main  # noqa: E402
from diffkv.cli.models import check_hub  # noqa: E402
from diffkv.quant import ConfigError  # noqa: E402


def no_network(model, file):
    import logging

    for retry in range(5):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying [Retry %s/5]", retry)
    raise LocalEntryNotFoundError("Cannot find it in the local cache.\nMore lines.")


@pytest.mark.parametrize(
    "line",
    [
        ["generate", "--model", "no/such", "--prompt", "a"],
        ["inspect", "--model", "no/such", "--prompt", "a"],
        ["eval", "--model", "no/such"],
        ["serve", "no/such"],
        ["plan", "--model", "no/such", "--gpu-memory", "80GB"],
    ],
)
def test_one_line(monkeypatch, capfd, line):
    pytest.importorskip("vllm", reason="needs vLLM")
    monkeypatch.setattr(hub, "hf_hub_download", no_network)
    assert main(line) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        "diffkv: cannot get config.json of no/such from the Hub: Cannot find it in the local cache.\n"
    )


def test_what_is_there_or_not_ours_to_judge_passes(monkeypatch, tmp_path):
    def no_config(model, file):
        raise EntryNotFoundError("404")

    monkeypatch.setattr(hub, "hf_hub_download", no_config)
    check_hub(str(tmp_path))
    check_hub("gpt2")
    check_hub("owner/model-with-params-json")
    monkeypatch.setattr(hub, "hf_hub_download", no_network)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda model, file: "/there/config.json")
    check_hub("owner/cached")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda model, file: None)
    with pytest.raises(ConfigError, match="owner/gone"):
        check_hub("owner/gone")
