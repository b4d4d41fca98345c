"""Writes a trained reference model as a folder that transformers and vLLM load.

    python training/reference_model/export.py reference_model.pt src/diffkv/data/reference

Stops where transformers' logits differ from those of the model that was trained.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from model import ModelConfig, ReferenceModel
from presets import PRESETS
from streams import training_batch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vocabulary import BOS, EOS, PAD, TOKEN_IDS, UNKNOWN

LARGEST_LOGIT_DIFFERENCE = 1e-4
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join(' ') }}"


def llama_config(config: ModelConfig) -> LlamaConfig:
    """Translate the sizes to the configuration of transformers."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[PAD],
    )


def llama_model(model: ReferenceModel) -> LlamaForCausalLM:
    """Copy the weights into transformers' model and check that it computes the same, in fp32.

    Raises:
        ValueError: the logits of the two models differ.
    """
    llama = LlamaForCausalLM(llama_config(model.config)).eval()
    llama.model.load_state_dict(model.state_dict())
    token_ids = torch.from_numpy(
        training_batch(np.random.default_rng(5), 2, 256, PRESETS["reference"].shares)[0]
    )
    with torch.no_grad():
        difference = (llama(token_ids).logits - model(token_ids)).abs().max().item()
    print(f"largest difference from transformers' logits, fp32: {difference:.1e}")
    if difference > LARGEST_LOGIT_DIFFERENCE:
        raise ValueError(f"model: logits differ from transformers' by {difference}")
    return llama


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer; it adds no token that the text does not spell."""
    tokenizer = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def export(model: ReferenceModel, folder: Path) -> None:
    """Write configuration, bf16 weights and tokenizer into `folder`; creates it."""
    llama_model(model).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>9} bytes  {path}")


def main() -> None:
    """Parse the command line, load the checkpoint and export it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=list(PRESETS), default="reference")
    args = parser.parse_args()
    model = ReferenceModel(PRESETS[args.preset].config)
    model.load_state_dict(torch.load(args.checkpoint))
    export(model.eval(), args.folder)


if __name__ == "__main__":
    main()
