"""What vLLM makes of an engine on a GPU, up to the allocation of its KV memory, without a GPU.

    python tests/vllm_plugin/hopper.py gemma3 llama4 --quant k8v4-k4v2    # a line of JSON for each

A process that took its platform for a CPU, so that all modules are there, goes on with vLLM's CUDA
platform and the compute capability of a Hopper GPU. Backends are imported after that, with empty modules
in place of their machine code. Layers, specs, groups and builders are vLLM's own, on tensors in the
memory of the host.
"""

import argparse
import json
import os
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm.compilation.backends
import vllm.model_executor.model_loader.utils as model_loader
import vllm.platforms
from checkpoints import FAMILIES, make
from vllm.config import KVTransferConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms.interface import DeviceCapability
from vllm.utils import import_utils
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend
from vllm.v1.worker.utils import allocate_kv_cache

from diffkv.capacity import rank_of
from diffkv.model_config import ModelConfig
from diffkv.vllm_plugin import engine_args
from diffkv.vllm_plugin.division import divide

MACHINE_CODE = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
KV_BYTES = 64 << 20
DEVICE = torch.device("cpu")


def become_a_gpu() -> None:
    """Have vLLM take its CUDA platform for the one that it runs on."""
    for name in MACHINE_CODE:
        module = sys.modules[name] = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
    import_utils.import_pynvml = torch.cuda.Stream = torch.cuda.Event = mock.MagicMock()
    from vllm.platforms.cuda import CudaPlatformBase

    class Hopper(CudaPlatformBase):
        current_device = staticmethod(lambda: DEVICE)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "Hopper"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

    for name in [name for name in sys.modules if name.endswith("attention.backends.fa_utils")]:
        del sys.modules[name]  # imported for a CPU
    cpu, gpu = vllm.platforms.current_platform, Hopper()
    vllm.platforms._current_platform = gpu
    for module in list(sys.modules.values()):
        if vars(module).get("current_platform") is cpu:
            module.current_platform = gpu  # type: ignore[attr-defined]
    import vllm.vllm_flash_attn as flash_attn

    flash_attn._vllm_fa3_C = sys.modules[MACHINE_CODE[-1]]


def build(config: Any, folder: str) -> list[Any]:
    """A model's attention layers, of random weights."""
    with set_current_vllm_config(config):
        place = f"file://{folder}/rendezvous"
        parallel_state.init_distributed_environment(1, 0, place, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(config.model_config.dtype), DEVICE:
            model_loader.initialize_model(config)
    return list(get_layers_from_vllm_config(config, AttentionLayerBase).values())


def describe(config: Any, layers: list[Any]) -> dict[str, Any]:
    """Take the steps of vLLM's engine core and of its second model runner, and say what came of them."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )

    current_platform.update_block_size_for_backend(config)
    specs = get_kv_cache_spec(config)
    backends = [layer.get_attn_backend() for layer in layers]
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    layout = resolve_kv_cache_layout(config, [layouts], specs.values())
    (cache,) = get_kv_cache_configs(config, [specs], [KV_BYTES])
    division = divide(cache, config)
    # vLLM's own answer is no where it finds no Triton
    with mock.patch.object(type(config), "use_v2_model_runner", True):
        groups, graphs, block_sizes = init_attn_backend(cache, config, DEVICE)
    caches = allocate_kv_cache(cache, DEVICE, layout, block_sizes)
    bytes_by_storage = {
        cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes()
        for cache in caches.values()
    }
    return {
        "layers": [
            [type(layer).__name__, backend.__name__, type(getattr(layer, "impl", None)).__name__]
            for layer, backend in zip(layers, backends, strict=True)
        ],
        "groups": [
            [
                type(group.kv_cache_spec).__name__,
                group.backend.__name__,
                *(each.__name__ for each in type(group.metadata_builders[0]).__mro__[:2]),
            ]
            for (group,) in groups
        ],
        "graphs": graphs.min_cg_support.name,
        "blocks_bytes": division and division.blocks_bytes,
        "pool_bytes": division and division.pool_bytes,
        "allocated": list(bytes_by_storage.values()),
        "state_bytes": sum(
            spec.page_size_bytes for spec in specs.values() if isinstance(spec, MambaSpec)
        ),
        "zeroes": cache.needs_kv_cache_zeroing,
    }


def describe_family(family: str, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Make a checkpoint, and describe its engine."""
    ours = engine_args(args.quant)
    ours["kv_transfer_config"] = KVTransferConfig(**ours["kv_transfer_config"])
    if args.attention_backend:
        del ours["attention_config"]
        ours["attention_backend"] = args.attention_backend
    model = make(family, Path(folder, family), getattr(torch, args.dtype))
    config = EngineArgs(
        model=str(model),
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
        **ours,
    ).create_engine_config()
    described = describe(config, build(config, folder))
    planned = rank_of(ModelConfig.read(model / "config.json", family), 0, 1, KV_BYTES)
    described["planned_state_bytes"] = planned.state_bytes(8 * planned.model.element_bytes)
    parallel_state.destroy_model_parallel()  # the next model's groups may be others
    return described


def main() -> None:
    """Describe engines, one for each family, in one process: it takes long to start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("families", choices=FAMILIES, nargs="+")
    parser.add_argument("--quant", default="k16v16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention-backend", help="in place of the backend for a kind of layers")
    args = parser.parse_args()
    become_a_gpu()
    with tempfile.TemporaryDirectory() as folder:
        for family in args.families:
            print(json.dumps(describe_family(family, args, folder)), flush=True)
    os._exit(0)  # no group of processes to take leave of


if __name__ == "__main__":
    main()
