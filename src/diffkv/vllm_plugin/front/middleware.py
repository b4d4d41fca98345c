"""Answers a request with bad settings with HTTP 400 before vLLM sees it.

vLLM checks a request's settings through `admission` too, but for a stream it has sent the headers of a
success by then. This looks at the body first, and only where it names a setting of ours.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.options import options_of
from diffkv.vllm_plugin.requests import PREFIX, thresholds_of

__all__ = ["SettingsCheck"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_NAME = f'"{PREFIX}'.encode()


class SettingsCheck:
    """ASGI middleware that `diffkv serve` passes to vLLM as `--middleware`."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on as it came, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        problem = _problem(body, scope["app"].state.vllm_config) if _NAME in body else None
        if problem is not None:
            await _refuse(send, problem)
            return

        # What was read is given again; then the client's hanging up still gets through.
        read = iter(messages)

        async def replay() -> Message:
            message = next(read, None)
            return await receive() if message is None else message

        await self._app(scope, replay, send)


def _problem(body: bytes, vllm_config: Any) -> str | None:
    """The fault in a body's settings; None if there is none, or if it is not for us to say."""
    try:
        request = json.loads(body)
    except ValueError:
        return None
    settings = request.get("vllm_xargs") if isinstance(request, dict) else None
    if not isinstance(settings, dict):
        return None
    options = options_of(vllm_config)
    if options is None:
        return None
    try:
        thresholds_of(settings, options)
    except ConfigError as error:
        return str(error)
    return None


async def _refuse(send: Send, message: str) -> None:
    """The form that vLLM's own refusals have."""
    error = {"message": message, "type": "BadRequestError", "param": "vllm_xargs", "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
