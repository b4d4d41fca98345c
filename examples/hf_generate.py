"""Generate a padded batch with transformers over a compressed cache, and print its cost.

Run: .venv/bin/python examples/hf_generate.py
"""

import json
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import diffkv.hf

DATA = files("diffkv") / "data"


def main() -> None:
    disable_progress_bar()
    rows = [json.loads(line) for line in (DATA / "prompts.jsonl").read_text().splitlines()][:3]
    model = AutoModelForCausalLM.from_pretrained(str(DATA / "reference"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(DATA / "reference"), padding_side="left")
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)

    diffkv.hf.attach(model)
    cache = diffkv.hf.DiffKVHFCache(model)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
    for row, answer in zip(rows, output[:, inputs.input_ids.shape[1] :], strict=True):
        words = tokenizer.decode(answer).split()[: len(row["answer"].split())]
        verdict = "right" if words == row["answer"].split() else f"wrong: {row['answer']}"
        print(f"{row['name']}: {' '.join(words)} ({verdict})")

    use = cache.use()
    print(
        f"{use.tokens} tokens: {use.high:.0f} high, {use.low:.0f} low (mean over heads), "
        f"{use.bytes_per_token:.0f} bytes a token: {use.ratio_bf16:.2f} times smaller than bf16"
    )


if __name__ == "__main__":
    main()
