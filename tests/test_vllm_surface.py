"""The tool that reads what a vLLM has under the names that we rely on, by a vLLM of a few lines."""

import json
from pathlib import Path
from zipfile import ZipFile

import pytest
import vllm_surface
from vllm_surface import Surface, reader

FILES = {
    "vllm/__init__.py": 'MODULE_ATTRS = {"LLM": ".entry:LLM"}\nfrom .version import __version__\n',
    "vllm/_version.py": "__version__ = version = '0.40.1'\n",
    "vllm/version.py": "try:\n    __version__ = '0.40.1'\nexcept ImportError:\n    pass\n",
    "vllm/entry.py": """
from vllm.base import Base as Parent, Mode

class LLM(Parent[int], Generic[T]):
    size: int = 7

    def __init__(self, seed=3):
        self.seed = seed
        self.mode: Mode = Mode.NONE

    @overload
    def run(self, a: str) -> str: ...

    @overload
    def run(self, a: int) -> int: ...

    def run(self, a, *, b=None):
        '''Runs.'''
        # a comment
        return a
""",
    "vllm/base/__init__.py": """
import enum
from .inner import gone, helper
from elsewhere import fallback

if HAS_GPU:
    from .inner import fast
else:
    def fast(x): ...

def fallback(): ...

class Mode(enum.IntEnum):
    NONE = 0
    FIRST = 12
    CUSTOM = 12
    A = enum.auto()
    B = enum.auto()

class Base:
    @classmethod
    async def make(cls, n: int, /, *args: int, **kwargs) -> 'Base':
        return await n

    @abstractmethod
    def must(self): ...

    @abstractmethod
    def run(self): ...

    @property
    def name(self) -> str:
        return "x"
""",
    "vllm/base/inner.py": """
from vllm.base import gone

def helper(): return 1

def fast(x, y=2):
    return x
""",
}


@pytest.fixture(params=["folder", "wheel"])
def surface(request: pytest.FixtureRequest, tmp_path: Path) -> Surface:
    if request.param == "wheel":
        path = tmp_path / "vllm-0.40.1-py3-none-any.whl"
        with ZipFile(path, "w") as wheel:
            for name, text in FILES.items():
                wheel.writestr(name, text)
        return Surface(reader(path))
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return Surface(reader(tmp_path))


EXPECTED = {
    "vllm:LLM": {"is": "class LLM(Parent[int], Generic[T])", "at": "vllm.entry:LLM"},
    "vllm:__version__": {"is": "__version__ = '0.40.1'", "at": "vllm.version:__version__"},
    "vllm.entry:LLM.size": {"is": "size: int = 7"},
    "vllm.entry:LLM.seed": {"is": "self.seed = seed"},
    "vllm.entry:LLM.mode": {"is": "self.mode: Mode = Mode.NONE"},
    "vllm.entry:LLM.run": {"is": "def run(self, a, *, b=None)"},
    "vllm.entry:LLM.make": {
        "is": "async def make(cls, n: int, /, *args: int, **kwargs) -> 'Base'",
        "at": "vllm.base:Base.make",
        "how": "classmethod",
    },
    "vllm:LLM.name": {
        "is": "def name(self) -> str",
        "at": "vllm.base:Base.name",
        "how": "property",
    },
    "vllm.base:fast": {"is": "def fast(x, y=2)", "at": "vllm.base.inner:fast"},
    "vllm.base:helper": {"is": "def helper()", "at": "vllm.base.inner:helper"},
    "vllm.base:fallback": {"is": "def fallback()"},
    "vllm.base:gone": None,
    "vllm.base:Mode.FIRST": {"is": "FIRST = 12"},
    "vllm.base:Mode.CUSTOM": {"is": "CUSTOM = 12", "alias": "FIRST"},
    "vllm.base:Mode.B": {"is": "B = enum.auto()"},
    "vllm.base:Mode.GONE": None,
    "vllm.base:Gone.name": None,
    "vllm.gone:name": None,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_under_a_name(surface, name):
    assert surface.describe(name, surface.find(name), with_inside=False) == EXPECTED[name]


def test_version(surface):
    assert surface.version() == "0.40.1"


def test_members_of_a_class_and_its_bases(surface):
    facts = surface.describe("vllm:LLM", surface.find("vllm:LLM"), with_inside=True)
    assert facts["members"] == "make must name run size"
    assert facts["abstract"] == "must"


def digest(tmp_path: Path, text: str) -> str:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(text)
    surface = Surface(reader(folder))
    return surface.describe("vllm:f", surface.find("vllm:f"), with_inside=True)["body"]


def test_body_changes_with_what_a_function_does(tmp_path):
    first = digest(tmp_path, "def f(x):\n    '''Text.'''\n    return x\n")
    second = "import a\ndef f(x):\n    '''Other.\n\n    Text.'''\n\n    # why\n    return x\n"
    assert digest(tmp_path, second) == first
    assert digest(tmp_path, "def f(x):\n    return x + 1\n") != first


def test_a_moved_name_says_where_it_is(surface):
    """It is written under the name of the list."""
    facts = surface.describe("vllm.new:fast", surface.find("vllm.base:fast"), with_inside=False)
    assert facts["at"] == "vllm.base.inner:fast"


def test_file_has_a_name_a_line(tmp_path):
    facts = {"vllm:b": {"is": "def b()"}, "vllm:a": None}
    path = vllm_surface.write(tmp_path, "0.40.1", facts)
    assert path.name == "0.40.json"
    assert json.loads(path.read_text()) == {"version": "0.40.1", **facts}
    assert path.read_text().splitlines()[1:4] == [
        '"version": "0.40.1",',
        '"vllm:a": null,',
        '"vllm:b": {"is": "def b()"}',
    ]
