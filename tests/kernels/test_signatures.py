"""The kernels have the reference's names and signatures, and are chosen by name, never instead."""

import ctypes
import inspect
import sys

import pytest
from make import make_state

from diffkv import ops, reference
from diffkv.kernels import cpu, triton
from diffkv.kernels.cpu.library import handle, vectors_library
from diffkv.quant import ConfigError

NAMES = [name for name in vars(ops.Ops) if not name.startswith("_")]


def same_but_self(function, protocol):
    """Whether a function has a method's parameters, by name, kind, default and type, and its result."""
    ours, theirs = inspect.signature(function), inspect.signature(protocol)
    expected = [each for name, each in theirs.parameters.items() if name != "self"]
    return (list(ours.parameters.values()), ours.return_annotation) == (
        expected, theirs.return_annotation,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernels", [reference, cpu, triton], ids=lambda m: m.__name__)
def test_same_signature(kernels, name):
    assert same_but_self(getattr(kernels, name), getattr(ops.Ops, name))


@pytest.mark.parametrize("kernels", [reference, cpu, triton], ids=lambda m: m.__name__)
def test_nothing_else_is_offered(kernels):
    functions = [name for name, value in vars(kernels).items() if inspect.isfunction(value)]
    assert sorted(functions) == sorted(NAMES)


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


def test_kernels_are_chosen_by_device_or_name():
    assert ops.load("cuda") is triton
    assert ops.load("cpu", "reference") is reference
    assert ops.load("cuda", "reference") is reference


@pytest.mark.parametrize(
    ("device", "backend", "word"), [("xpu", None, "xpu"), ("cpu", "triton", "triton")]
)
def test_what_is_not_there_is_refused(device, backend, word):
    with pytest.raises(ConfigError, match=word):
        ops.load(device, backend)


def test_kernels_without_triton_are_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "diffkv.kernels.triton")
    monkeypatch.delattr("diffkv.kernels.triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("diffkv.kernels.triton.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="need triton: install it, or use the backend reference"):
        ops.load("cuda")
