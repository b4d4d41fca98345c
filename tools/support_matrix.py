"""Write docs/support-matrix.md from the table that the refusals are made from."""

from pathlib import Path

from diffkv.vllm_plugin.matrix import to_markdown

PAGE = Path(__file__).parents[1] / "docs" / "support-matrix.md"


def main() -> None:
    """Write it."""
    PAGE.write_text(to_markdown(), encoding="utf-8")
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
