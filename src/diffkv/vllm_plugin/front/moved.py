"""Names that vLLM has moved between the versions that DiffKV works with, each from where it is.

Whoever needs one imports it from here. With the oldest version goes its branch.
"""

from diffkv.vllm_plugin.support import minor_version

__all__ = ["cli_env_setup", "make_arg_parser", "validate_parsed_serve_args"]

if minor_version() == "0.32":
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
else:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
