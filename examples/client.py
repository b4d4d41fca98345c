"""Ask the server of serve.sh: a stream, thresholds for one request, and a bad setting.

Run: .venv/bin/python examples/client.py [http://127.0.0.1:8000/v1]
"""

import json
import sys
from importlib.resources import files

import openai


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = openai.OpenAI(base_url=url, api_key="none")
    row = json.loads((files("diffkv") / "data" / "prompts.jsonl").read_text().splitlines()[0])

    print("a stream:", end="", flush=True)
    stream = client.completions.create(
        model="reference", prompt=row["prompt"], max_tokens=4, temperature=0, stream=True
    )
    for event in stream:
        print(event.choices[0].text, end="", flush=True)
    print()

    done = client.completions.create(
        model="reference",
        prompt=row["prompt"],
        max_tokens=4,
        temperature=0,
        extra_body={"vllm_xargs": {"diffkv_alpha_high": 6, "diffkv_alpha_low": 0.02}},
    )
    print(f"with thresholds of its own:{done.choices[0].text}")

    try:
        client.completions.create(
            model="reference", prompt="w0", extra_body={"vllm_xargs": {"diffkv_alpha_high": -1}}
        )
    except openai.BadRequestError as error:
        print(f"refused with {error.status_code}: {error.message}")


if __name__ == "__main__":
    main()
