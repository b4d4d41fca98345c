"""The kernels have the reference's names and signatures, and are chosen by name, never instead."""

import ctypes
import inspect

import pytest
from make import make_state

from diffkv import ops, reference
from diffkv.kernels import cpu
from diffkv.kernels.cpu.library import handle, vectors_library
from diffkv.quant import ConfigError


def test_same_names(kernels):
    assert kernels.module.__all__ == reference.__all__


@pytest.mark.parametrize("name", reference.__all__)
def test_same_signature(kernels, name):
    expected = inspect.signature(getattr(reference, name))

    assert inspect.signature(getattr(kernels.module, name)) == expected
    protocol = inspect.signature(getattr(ops.Ops, name))
    assert [p for p in protocol.parameters if p != "self"] == list(expected.parameters)
    assert protocol.return_annotation == expected.return_annotation


def test_cpu_is_compiled_code():
    assert ops.load("cpu") is cpu
    assert isinstance(vectors_library(), ctypes.CDLL)
    assert isinstance(handle(make_state("k8v4")).library, ctypes.CDLL)
    names = {module.split(".")[1] for module in _imports(cpu)}
    assert "reference" not in names


def _imports(package):
    """Modules of diffkv whose objects a package's own modules use."""
    modules = [value for value in vars(package).values() if inspect.ismodule(value)]
    objects = [value for module in modules for value in vars(module).values()]
    found = {getattr(value, "__module__", None) or "" for value in objects}
    return {name for name in found if name.startswith("diffkv.")}


def test_reference_is_chosen_by_name():
    assert ops.load("cpu", "reference") is reference
    assert ops.load("cuda", "reference") is reference


@pytest.mark.parametrize(
    ("device", "backend", "word"), [("xpu", None, "xpu"), ("cpu", "triton", "triton")]
)
def test_what_is_not_there_is_refused(device, backend, word):
    with pytest.raises(ConfigError, match=word):
        ops.load(device, backend)


def test_missing_cuda_kernels_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not part of this version"):
        ops.load("cuda")
