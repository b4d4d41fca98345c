"""A tiny checkpoint of a vision-language model: Idefics3, of which Llama is a part.

Its processor needs no torchvision, which the tests' environment leaves out. It cuts an image that is
larger than SIDE into tiles and adds the whole of it as one more, so images differ in how many tokens
stand for them.
"""

from pathlib import Path

import numpy as np
import transformers
from checkpoints import HIDDEN, VOCABULARY, copy_tokenizer, fill
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

__all__ = ["IMAGE", "SIDE", "image", "make"]

IMAGE = VOCABULARY
"""Token in a prompt that an image is put in place of: the first of TOKENS."""

SIDE, PATCH, SHRINK = 64, 8, 2
TILE_TOKENS = (SIDE // PATCH // SHRINK) ** 2
TOKENS = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>",
)  # fmt: skip


def make(folder: Path) -> Path:
    """Write the checkpoint, of two layers, in float32.

    Returns:
        `folder`.
    """
    copy_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        ),
        tokenizer,
        image_seq_len=TILE_TOKENS,
    )
    processor.save_pretrained(folder)
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = transformers.Idefics3VisionConfig(
        hidden_size=HIDDEN // 2,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config=vision,
        scale_factor=SHRINK,
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    model = transformers.Idefics3ForConditionalGeneration(config)
    fill(model)
    model.save_pretrained(folder)
    return folder


def image(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """Random rectangles of random colours, unlike those of another seed everywhere."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
