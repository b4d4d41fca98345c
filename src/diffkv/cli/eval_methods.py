"""The caches that `diffkv eval` compares: of the command line, or of the lines of --methods."""

import argparse
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from diffkv.cli import prompts
from diffkv.cli.arguments import Once
from diffkv.cli.engine_options import add_cache_options, cache_options
from diffkv.policies import PAPER
from diffkv.quant import ConfigError
from diffkv.vllm_plugin.options import Options

if TYPE_CHECKING:
    from diffkv.lab.evaluation.engine import CacheSpec, NamedCache

__all__ = ["caches", "words"]


class _MethodParser(argparse.ArgumentParser):
    """Refuses a line of --methods in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"--methods: {message}")


def caches(args: argparse.Namespace) -> "list[NamedCache]":
    """The caches that are asked for: those of --against and of --methods, or the command line's last.

    Raises:
        ConfigError: a file that cannot be read, a line that is no cache's, or no line at all; an unknown
            name, with those that there are.
    """
    from diffkv.lab.evaluation.engine import NamedCache

    found = [_named(args, "--against", name) for name in (args.against or "").split(",") if name]
    for where, others, merged in _lines(args):
        if others:
            if len(others) > 1 or others[0].startswith("-") or vars(merged) != vars(args):
                raise ConfigError(
                    f"{where}: a line has options of the cache or one name, got {' '.join(others)!r}"
                )
            found.append(_named(args, where, others[0]))
        else:
            options = cache_options(merged, takes_policy=False)
            found.append(NamedCache(words(options, merged.policy), _cache(merged, options)))
    return list({cache.name: cache for cache in found}.values())


def _lines(
    args: argparse.Namespace,
) -> list[tuple[str, list[str], argparse.Namespace]]:
    """For each cache: where it stands, words that are no options of a cache, and its options."""
    if args.methods is None:
        return [("the command line", [], args)]
    parser = _MethodParser(add_help=False, allow_abbrev=False)
    parser.register("action", None, Once)
    add_cache_options(parser)
    found = []
    for number, line in enumerate(prompts.read_text(args.methods, "--methods").splitlines(), 1):
        try:
            parts = shlex.split(line, comments=True)
        except ValueError as error:
            raise ConfigError(f"--methods {args.methods}, line {number}: {error}") from None
        options, others = parser.parse_known_args(parts)
        if line.partition("#")[0].strip():
            given = {name: value for name, value in vars(options).items() if value is not None}
            merged = argparse.Namespace(**{**vars(args), **given})
            found.append((f"--methods {args.methods}, line {number}", others, merged))
    if not found:
        raise ConfigError(f"--methods {args.methods} names no cache")
    return found


def _cache(args: argparse.Namespace, options: Options) -> "CacheSpec":
    """A cache of ours, maybe with a policy that an engine does not run."""
    from diffkv.lab.evaluation import baselines
    from diffkv.lab.evaluation.engine import CacheSpec

    policy = baselines.parse(args.policy or options.policy)
    if not policy.uses_thresholds and (args.alpha_high, args.alpha_low) != (None, None):
        raise ConfigError(f"policy {policy} has no thresholds: leave out --alpha-high, --alpha-low")
    return CacheSpec.of(options, policy)


def _named(args: argparse.Namespace, where: str, name: str) -> "NamedCache":
    """Another engine's format, or formats of ours with the options of the command line."""
    from diffkv.lab.evaluation.engine import NamedCache
    from diffkv.lab.evaluation.other_formats import OTHER_FORMATS

    if name in OTHER_FORMATS:
        return NamedCache(name, OTHER_FORMATS[name])
    try:
        options = replace(cache_options(args, takes_policy=False), quant=name, alpha_high=None)
    except ConfigError as error:
        raise ConfigError(
            f"{where}: {name!r} is neither a format of others ({', '.join(OTHER_FORMATS)}), nor formats "
            f"of ours ({error})"
        ) from None
    without = argparse.Namespace(**{**vars(args), "alpha_high": None})
    return NamedCache(words(options, args.policy), _cache(without, options))


def words(options: Options, policy: str | None = None) -> str:
    """Name of a cache: its formats, and what differs from their defaults.

    Args:
        options: the cache's.
        policy: a policy that the options do not have; None: theirs.
    """
    given = {name: value for name, value in options.to_dict().items() if name != "quant"}
    usual = Options(options.quant, alpha_low=options.alpha_low)
    if options.thresholds() == usual.thresholds():
        given.pop("alpha_high", None)
    if options.alpha_low == 0:
        del given["alpha_low"]
    if options.rotation() == usual.rotation():
        given.pop("rotate", None)
    if policy is not None and policy != PAPER.text:
        given["policy"] = policy
    return " ".join([options.quant, *(f"{name}={_text(value)}" for name, value in given.items())])


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
