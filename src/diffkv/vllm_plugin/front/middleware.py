"""Answers a request with bad settings with HTTP 400, streams too.

vLLM checks a request's settings through `admission`, but for a stream it has sent the headers of a
success by then. So they are also checked where vLLM checks a request's form: behind its own gates, the
key among them, in the JSON that it has parsed.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import Request
from vllm.entrypoints.serve.utils.api_utils import validate_json_request

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.options import options_of
from diffkv.vllm_plugin.requests import PREFIX, thresholds_of

__all__ = ["ENGINE_DIED", "SettingsCheck", "check_settings"]

ENGINE_DIED = "diffkv_engine_died"
"""Attribute of the server's arguments."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class SettingsCheck:
    """ASGI middleware that `diffkv serve` passes to vLLM as `--middleware`.

    It stands before vLLM's gates, so it looks at no request. It is only how a plugin gets hold of the
    application, to put `check_settings` in the place of the dependency that vLLM's JSON routes have, and
    to note at its end whether the engine had died, in the arguments that `diffkv serve` gave vLLM.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass everything on as it came."""
        app = scope["app"]
        app.dependency_overrides.setdefault(validate_json_request, check_settings)
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        state = app.state  # vLLM takes it from the application before the server has ended

        async def noted() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                setattr(state.args, ENGINE_DIED, _ends_by_itself(state.server))
            return message

        await self._app(scope, noted, send)


def _ends_by_itself(server: Any) -> bool:
    """Whether a server's task has come to its end, as vLLM lets it if the engine has died.

    If the server is told to stop, vLLM cancels that task, and ends the server after it.
    """
    code = type(server).serve.__code__
    return any(getattr(task.get_coro(), "cr_code", None) is code for task in asyncio.all_tasks())


async def check_settings(raw_request: Request) -> None:
    """vLLM's own check, and then that of the settings.

    Args:
        raw_request: a request whose body has been read; its JSON is parsed once, for vLLM and for this.

    Raises:
        ConfigError: a ValueError, which vLLM answers with HTTP 400; it names the setting.
    """
    await validate_json_request(raw_request)
    # a request without a body is for vLLM to refuse
    body = await raw_request.json() if await raw_request.body() else None
    options = options_of(raw_request.app.state.vllm_config)
    if options is None or not isinstance(body, dict):
        return
    # OpenAI's and Anthropic's routes; vLLM's own for tokens (--enable-scale-out)
    sampling = body.get("sampling_params")
    own = sampling.get("extra_args") if isinstance(sampling, dict) else None
    for settings in (body.get("vllm_xargs"), own):
        if isinstance(settings, dict):
            thresholds_of(settings, options)
            if body.get("use_beam_search") and any(
                str(name).startswith(PREFIX) for name in settings
            ):
                raise ConfigError(
                    "beam search passes no settings on to its beams: leave out what begins with diffkv"
                )
