"""`vllm serve` with DiffKV turned on."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from diffkv.quant import ConfigError
from diffkv.vllm_plugin.arguments import arguments_of, with_backends
from diffkv.vllm_plugin.front.config_file import with_config_file
from diffkv.vllm_plugin.front.middleware import ENGINE_DIED
from diffkv.vllm_plugin.front.offline import check_model, first_line, refuse_in_one_line
from diffkv.vllm_plugin.options import Options
from diffkv.vllm_plugin.requests import admission_path
from diffkv.vllm_plugin.support import check_config, check_version, settle_prefix_caching

__all__ = ["serve", "serve_flags"]


PER_KIND = "--attention-config.backend_per_kind"


def serve_flags(options: Options) -> list[str]:
    """The flags that turn DiffKV on in a plain `vllm serve`."""
    args = arguments_of(options)
    backends = args.get("attention_config", {}).get("backend_per_kind", {})
    return [
        *_flags(args),
        *(part for kind, name in backends.items() for part in (f"{PER_KIND}.{kind}", name)),
    ]


def _flags(args: dict[str, Any]) -> list[str]:
    """Those but the ones of `--attention-config`, which vLLM does not join with a user's JSON."""
    return [
        "--kv-transfer-config",
        json.dumps(args["kv_transfer_config"]),
        "--worker-extension-cls",
        args["worker_extension_cls"],
        "--logits-processors",
        *args["logits_processors"],
        "--middleware",
        "diffkv.vllm_plugin.front.middleware.SettingsCheck",
        "--watermark",
        str(args["watermark"]),
    ]


def serve(model: str, name: str, options: Options, flags: Sequence[str]) -> int:
    """Run vLLM's OpenAI server until it is stopped.

    Args:
        model: a folder or a model id.
        name: under which requests ask for it, unless a flag says another.
        options: DiffKV's.
        flags: flags of `vllm serve`, passed on as they are.

    Returns:
        The exit status: 0 if it was stopped, 1 if it ended because its engine had died, after which
        vLLM's own command has 0 too.

    Raises:
        ConfigError: a flag that vLLM does not know or DiffKV cannot be combined with, a bad model.
    """
    check_version()
    check_model(model)
    from vllm.logger import configure_logging_from_args

    from diffkv.vllm_plugin.front.moved import cli_env_setup

    cli_env_setup()
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0":
        raise ConfigError(
            "VLLM_USE_RUST_FRONTEND is set: settings of requests are checked in the front end in Python "
            "only, unset it"
        )
    args = _parsed(model, name, options, flags)
    config = _engine_config(args)
    check_config(config, options)
    args.enable_prefix_caching = settle_prefix_caching(config, args.enable_prefix_caching)
    configure_logging_from_args(args)
    _run(args)
    if not getattr(args, ENGINE_DIED, False):
        return 0
    print(
        "diffkv: the engine died, and so the server ended: its log has the reason", file=sys.stderr
    )
    return 1


def _parsed(model: str, name: str, options: Options, flags: Sequence[str]) -> Any:
    """What vLLM's parser makes of our flags and a user's.

    Raises:
        ConfigError: a flag that vLLM does not know or DiffKV cannot be combined with.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from diffkv.vllm_plugin.front.moved import make_arg_parser

    parser = make_arg_parser(
        FlexibleArgumentParser(prog="diffkv serve", add_help=False, allow_abbrev=False)
    )
    refuse_in_one_line(parser, "vllm serve")
    flags = with_config_file(parser, flags)
    _refuse_flags(flags)
    set_by_us = arguments_of(options)
    args: Any = parser.parse_args(
        ["--model", model, "--served-model-name", name, *_flags(set_by_us), *flags]
    )
    if args.model_tag is not None:
        raise ConfigError(
            f"{args.model_tag!r} is one word too many: the model is the first argument, and flags that "
            "switch something on take no value"
        )
    if "attention_config" in set_by_us:
        args.attention_config = with_backends(args.attention_config)
    ours = [admission_path(options)]
    # a user's own replace what was given before them
    args.logits_processors = [*ours, *(p for p in args.logits_processors if p not in ours)]
    return args


def _run(args: Any) -> None:
    """vLLM's own command.

    Raises:
        ConfigError: flags that only it looks at, before it starts anything.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        ServeSubcommand.cmd(args)
    except ValueError as error:
        trace = error.__traceback__
        if trace is None or trace.tb_next is None or trace.tb_next.tb_next is not None:
            raise  # not of `cmd` itself
        raise _refused(error) from error


def _refused(error: Exception) -> ConfigError:
    return ConfigError(f"vLLM refuses these settings: {first_line(error)}")


def _engine_config(args: Any) -> Any:
    """vLLM's configuration of an engine with these settings.

    Raises:
        ConfigError: vLLM refuses them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from diffkv.vllm_plugin.front.moved import validate_parsed_serve_args

    try:
        validate_parsed_serve_args(args)
        return AsyncEngineArgs.from_cli_args(args).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
    except (ValueError, OSError, TypeError) as error:
        raise _refused(error) from error


def _refuse_flags(flags: Sequence[str]) -> None:
    """Refuse flags that would undo what `serve_flags` sets.

    Raises:
        ConfigError: names the flag.
    """
    refused = {
        "--model": "the model is the first argument of the command: leave it out",
        "--kv-transfer-config": "DiffKV is the KV connector: give --quant and its other options",
        "--kv-offloading-size": "DiffKV is the KV connector, and vLLM has one: leave it out",
        "--attention-backend": "DiffKV is the attention backend: leave it out",
        **dict.fromkeys(
            ("--speculative-config", "-sc"),
            "speculative decoding does not go with DiffKV: leave it out",
        ),
        "--grpc": "settings of requests are checked where they come by HTTP: leave it out",
        "--worker-extension-cls": "DiffKV extends the worker: leave it out",
    }
    for flag in flags:
        # vLLM takes --a.b=c for a field of what --a sets
        name = flag.split("=")[0].split(".")[0].replace("_", "-")
        if name in refused:
            raise ConfigError(f"{name}: {refused[name]}")
