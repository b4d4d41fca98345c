"""The build: compiled once, kept, found again, rebuilt when damaged; errors that say what to do."""

import ctypes
import gc
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from make import make_state

from diffkv.kernels.cpu import build, library
from diffkv.quant import ConfigError
from diffkv.state import TENSORS

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'


@pytest.fixture
def small_build(tmp_path, monkeypatch):
    """Sources of one line, and an empty cache."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "small.cpp").write_text('#include "constants.h"\n' + SOURCE)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("DIFFKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiles(monkeypatch):
    """The commands that were started."""
    commands = []
    popen = subprocess.Popen

    def recorded(command, *args, **kwargs):
        if "-c" in command:
            commands.append(command)
        return popen(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", recorded)
    return commands


def answer(header: str = "#define ANSWER 42\n") -> int:
    return build.load_library(("small.cpp",), header).answer()


def test_compiled_once(small_build, compiles):
    assert answer() == 42
    assert len(compiles) == 1
    assert answer() == 42
    assert len(compiles) == 1
    assert len(list(small_build.iterdir())) == 1


def test_header_flags_and_sources_are_in_the_key(small_build, compiles, monkeypatch):
    assert answer("#define ANSWER 1\n") == 1
    assert answer("#define ANSWER 2\n") == 2
    (build.SOURCES / "small.cpp").write_text(SOURCE.replace("ANSWER", "3"))
    assert answer() == 3
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    assert answer() == 3
    assert len(compiles) == 4


def test_prelude_is_compiled_once(small_build):
    def folders() -> list[Path]:
        return sorted(small_build.glob("prelude-*"))

    text = SOURCE.replace("ANSWER", "PRELUDE")
    (build.SOURCES / "small.cpp").write_text(
        f'#include "constants.h"\n#include "prelude.h"\n{text}'
    )
    (build.SOURCES / build.PRELUDE).write_text("#pragma once\n#define PRELUDE 40 + ANSWER\n")
    assert answer("#define ANSWER 1\n") == 41
    assert answer("#define ANSWER 2\n") == 42
    (made,) = folders()
    assert {file.name for file in made.iterdir()} == {"prelude.h", "prelude.h.gch"}

    (made / "prelude.h.gch").unlink()  # as by a compiler that cannot take it
    assert answer("#define ANSWER 3\n") == 43
    (build.SOURCES / build.PRELUDE).write_text("#pragma once\n#define PRELUDE 50 + ANSWER\n")
    assert answer("#define ANSWER 1\n") == 51
    assert len(folders()) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_damaged_library_is_rebuilt(small_build, compiles, damage):
    answer()
    (path,) = small_build.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = {"empty": b"", "cut": data[: len(data) // 2], "flipped": data}[damage]
    path.unlink()  # what is mapped must not change under the process
    path.write_bytes(damaged)

    assert answer() == 42
    assert len(compiles) == 2
    assert build._is_whole(path)


def test_missing_compiler_is_one_clear_line(small_build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError) as error:
        answer()
    text = str(error.value)
    assert "no-such-compiler" in text
    assert "apt-get install g++" in text
    assert "\n" not in text


def test_failing_compiler_shows_its_error(small_build):
    with pytest.raises(ConfigError) as error:
        answer("#error this header is wrong\n")
    text = str(error.value)
    assert "this header is wrong" in text
    assert "g++" in text
    assert "\n" not in text
    assert not list(small_build.glob("*.so"))


def test_cache_that_cannot_be_written(small_build, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFKV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match="DIFFKV_CACHE_DIR"):
        answer()


def test_settings(monkeypatch):
    for name in ("DIFFKV_CACHE_DIR", "XDG_CACHE_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert build.settings() == build.Settings(("g++",), Path("/somewhere/.cache/diffkv"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("CXX", "ccache g++-13")
    assert build.settings() == build.Settings(("ccache", "g++-13"), Path("/cache/diffkv"))
    monkeypatch.setenv("DIFFKV_CACHE_DIR", "/own")
    assert build.settings().cache_dir == Path("/own")


def test_one_openmp_runtime_in_the_process():
    """A fresh one: other tests load libraries that bring runtimes of their own."""
    script = "import test_build; test_build.check_one_openmp_runtime()"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=True)


def check_one_openmp_runtime():
    before = openmp_files()
    assert len(before) == 1, "torch loads one"
    library.vectors_library()
    library.handle(make_state("k8v4"))
    assert openmp_files() == before
    assert str(build.openmp_runtime()) in before


def openmp_files() -> set[str]:
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"/\S*(?:gomp|iomp5|libomp)\S*", maps))


def test_two_processes_may_race(small_build):
    script = (
        "from diffkv.kernels.cpu import build; from pathlib import Path; "
        f"build.SOURCES = Path({str(build.SOURCES)!r}); "
        "print(build.load_library(('small.cpp',), '#define ANSWER 7\\n').answer())"
    )
    import sys

    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == [b"7", b"7"]
    assert len(list(small_build.iterdir())) == 1


def test_rendered_header_is_the_layout():
    state = make_state("k8v2-k2v1g1x4", 64)
    text = library.render(state.layout, torch.float16)
    low = state.layout.low
    assert f"PAGE_BYTES = {state.layout.page_bytes};" in text
    assert text.startswith(library.render_quantiser())
    assert "HEAD_DIM = 64;" in text
    assert "DTYPE = 2;" in text
    row = (
        1,
        low.tokens_per_page,
        2,
        1,
        16,
        1,
        4,
        8,
        0,
        low.k_meta,
        low.v_codes,
        low.v_meta,
        low.sums,
    )
    assert f"{{{', '.join(map(str, row))}, {low.positions}}}" in text


def test_rendered_struct_is_the_state():
    text = library.render(make_state("k8v4").layout, torch.bfloat16)
    lines = text[text.index("struct Tensors {") :].splitlines()[1:-1]
    pointers = [line.split(";")[0].split() for line in lines[:-1]]
    types = {"uint8_t*": torch.uint8, "int32_t*": torch.int32, "int64_t*": torch.int64}
    types |= {"float*": torch.float32, "uint16_t*": torch.bfloat16}
    state = make_state("k8v4")
    for kind, name in pointers:
        assert getattr(state, name).dtype is types[kind]
    assert lines[-1] == f"  int64_t {', '.join(library.SIZES)};"
    assert [name for _, name in pointers] == list(TENSORS)


def test_handles_are_forgotten_with_their_states():
    state = make_state("k8v4")
    made = library.handle(state)
    assert library.handle(state) is made
    assert isinstance(made.library, ctypes.CDLL)
    pool = weakref.ref(made.pool)
    del made
    gc.collect()
    assert pool() is not None
    del state
    gc.collect()
    assert pool() is None


def test_state_of_another_dtype_is_refused():
    import dataclasses

    state = dataclasses.replace(make_state("k8v4"), dtype=torch.float32)
    with pytest.raises(ValueError, match="element_bytes 2"):
        library.handle(state)
    state = make_state("k8v4")
    state = dataclasses.replace(state, num_tokens=state.num_tokens.long())
    with pytest.raises(ValueError, match=r"state\.num_tokens"):
        library.handle(state)


@pytest.mark.parametrize("without", ["avx512vnni", "avx512f", "avx2"])
def test_older_instruction_sets(tmp_path, without):
    """The kernels of a CPU that has less than this one, in a process of their own."""
    environment = {
        **os.environ,
        "CXX": f"g++ -mno-{without}",
        "DIFFKV_CACHE_DIR": str(tmp_path / "cache"),
    }
    code = "from diffkv import selftest; assert selftest.run('cpu').passed"
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
