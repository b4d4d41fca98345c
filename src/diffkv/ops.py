"""Which kernels run on a device. (Being written.)"""

from typing import Any, Protocol


class Ops(Protocol):
    def __getattr__(self, name: str) -> Any: ...


def load(device_type, backend=None):
    from diffkv import reference
    if device_type == 'cpu' and backend is None:
        from diffkv.kernels import cpu
        return cpu

    return reference
