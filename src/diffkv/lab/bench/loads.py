"""Loads that people have, by name: how many requests there are, and how long."""

from dataclasses import dataclass

__all__ = ["LOADS", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """What a load of random prompts is made of.

    Attributes:
        num_prompts: requests.
        input_len: tokens of a prompt.
        output_len: tokens to generate for each.
    """

    num_prompts: int = 16
    input_len: int = 1024
    output_len: int = 128


LOADS = {
    "alone": Sizes(num_prompts=1, input_len=4 * 1024, output_len=256),
    "few": Sizes(num_prompts=8, input_len=1024, output_len=256),
    "reasoning": Sizes(num_prompts=192, input_len=1024, output_len=2048),
    "long-context": Sizes(num_prompts=48, input_len=16 * 1024, output_len=512),
    "chat": Sizes(num_prompts=256, input_len=2048, output_len=300),
}
