"""Settings are checked behind vLLM's key check, on parsed JSON, before a stream's headers are sent."""

import asyncio
import json
import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from servers import free_port
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from diffkv.vllm_plugin.front.middleware import ENGINE_DIED, SettingsCheck
from diffkv.vllm_plugin.matrix import CONNECTOR

KEY = {"Authorization": "Bearer secret"}
ESCAPED = '{"prompt": "a", "vllm_xargs": {"\\u0064iffkv_alpha_high": -1}}'


class Asked(BaseModel):
    prompt: str
    vllm_xargs: dict[str, Any] | None = None


def application() -> FastAPI:
    """As vLLM makes its own: routes with its dependency, its errors, its key check, then ours."""
    app = FastAPI()

    @app.post("/v1/completions", dependencies=[Depends(validate_json_request)])
    async def answer(asked: Asked) -> StreamingResponse:
        return StreamingResponse(iter([asked.prompt]), media_type="text/event-stream")

    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config={"alpha_high": 3})
    app.state.vllm_config = SimpleNamespace(kv_transfer_config=transfer)
    app.state.args = SimpleNamespace(log_error_stack=False)
    init_exception_handler(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    app.add_middleware(SettingsCheck)
    return app


def post(body: Any, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=application())
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            content = body if isinstance(body, (str, bytes)) else json.dumps(body)
            return await client.post(
                "/v1/completions",
                content=content,
                headers={"Content-Type": "application/json", **headers},
            )

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diffkv_alpha_high": -1}, "diffkv_alpha_high must be a number of 0 or more, got -1"),
        ({"diffkv": "of"}, 'diffkv must be "on" or "off"'),
        ({"diffkv_alfa": 1}, "unknown setting 'diffkv_alfa'"),
    ],
)
def test_bad_settings_are_400_before_a_stream_begins(
    settings: dict[str, Any], message: str
) -> None:
    response = post({"prompt": "a", "vllm_xargs": settings}, **KEY)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_settings_of_sampling_params_are_checked_too() -> None:
    """vLLM's own route for tokens has them there."""
    body = {"prompt": "a", "sampling_params": {"extra_args": {"diffkv": "of"}}}
    response = post(body, **KEY)
    assert response.status_code == 400
    assert 'diffkv must be "on" or "off"' in response.json()["error"]["message"]
    for others in ({"sampling_params": 1}, {"sampling_params": {"extra_args": [1]}}):
        assert post({"prompt": "a", **others}, **KEY).status_code == 200


def test_beam_search_takes_no_settings() -> None:
    """Beams run with parameters of their own, which have none: they would have no effect."""
    body = {"prompt": "a", "use_beam_search": True, "vllm_xargs": {"diffkv": "off"}}
    response = post(body, **KEY)
    assert response.status_code == 400
    assert "beam search passes no settings on" in response.json()["error"]["message"]
    assert post({**body, "vllm_xargs": {"other": 1}}, **KEY).status_code == 200
    assert post({**body, "use_beam_search": False}, **KEY).status_code == 200


def test_an_escaped_name_is_the_same_name() -> None:
    response = post(ESCAPED, **KEY)
    assert response.status_code == 400
    assert "diffkv_alpha_high" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a"},
        {"prompt": "a", "vllm_xargs": {"diffkv_alpha_high": 2, "other": "diffkv_alfa"}},
        {"prompt": "a", "vllm_xargs": None},
    ],
)
def test_others_pass(body: dict[str, Any]) -> None:
    response = post(body, **KEY)
    assert (response.status_code, response.text) == (200, "a")


def test_bad_json_and_other_types_are_vllms_to_refuse() -> None:
    assert post('{"vllm_xargs": {"diffkv', **KEY).status_code in (400, 422)
    assert post("[1]", **KEY).status_code in (400, 422)
    assert post('{"prompt": 1, "vllm_xargs": 7}', **KEY).status_code in (400, 422)
    empty = post("", **KEY).json()
    assert "Field required" in str(empty), "as without our check"
    refused = post({"prompt": "a"}, **{**KEY, "Content-Type": "text/plain"})
    assert refused.status_code in (400, 415, 422)


def test_nothing_of_a_body_is_read_without_the_key() -> None:
    sent: list[dict[str, Any]] = []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "server": ("here", 80),
        "client": ("there", 1),
        "headers": [(b"content-type", b"application/json"), (b"host", b"here")],
    }

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(application()(scope, receive, send))
    assert sent[0]["status"] == 401


async def ended(end: Callable[[Any, Any], None]) -> bool:
    """Serve with vLLM's own launcher until `end`; whether it says that the engine had died."""
    app = application()
    arguments = app.state.args
    app.state.engine_client = SimpleNamespace(
        errored=False,
        is_running=True,
        shutdown=lambda timeout: None,
        vllm_config=SimpleNamespace(shutdown_timeout=0),
    )
    serving = asyncio.create_task(
        launcher.serve_http(app, None, host="127.0.0.1", port=free_port())
    )
    while not getattr(getattr(app.state, "server", None), "started", False):
        await asyncio.sleep(0.01)
    end(app.state.server, app.state.engine_client)
    await (await serving)
    return bool(getattr(arguments, ENGINE_DIED))


def die(server: Any, engine: Any) -> None:
    engine.errored, engine.is_running = True, False
    launcher.terminate_if_errored(server, engine)


def stop(server: Any, engine: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("end", "died"), [(die, True), (stop, False)])
def test_the_end_of_the_server_knows_whether_the_engine_died(
    end: Callable[[Any, Any], None], died: bool
) -> None:
    assert asyncio.run(ended(end)) is died


def test_every_json_route_of_vllm_has_the_dependency() -> None:
    from vllm.entrypoints.openai.chat_completion.api_router import router as chat
    from vllm.entrypoints.openai.completion.api_router import router as completion
    from vllm.entrypoints.openai.responses.api_router import router as responses

    for router, path in (
        (chat, "/v1/chat/completions"),
        (completion, "/v1/completions"),
        (responses, "/v1/responses"),
    ):
        (route,) = (each for each in router.routes if each.path == path)
        assert validate_json_request in [each.call for each in route.dependant.dependencies]
