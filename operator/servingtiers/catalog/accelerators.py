"""Accelerators: what a GPU can do at best, and what it costs by default.

Figures are peaks from the makers' data sheets, kept in ``data/accelerators.json`` with a source for each
entry. What of a peak a serving engine reaches is the performance model's business, not the catalogue's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from servingtiers.catalog.names import CatalogError, UnknownNameError

__all__ = ["Accelerator", "accelerator", "accelerators"]


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of GPU."""

    key: str
    """Catalogue key, for example ``h100-sxm-80gb``."""
    name: str
    """The maker's name."""
    aliases: tuple[str, ...]
    """Other names accepted, the device plugin's ``nvidia.com/gpu.product`` label among them."""
    memory_gib: float
    """Device memory, GiB."""
    bandwidth_gb_s: float
    """Memory bandwidth, GB/s (10^9 bytes)."""
    tflops: Mapping[str, float] = field(hash=False)
    """Dense tensor throughput in TFLOP/s (TOP/s for integers) by data type: bf16, fp8, int8, int4."""
    interconnect: str
    """What joins the GPUs of one node: ``nvlink4``, ``pcie4`` …"""
    link_gb_s: float
    """Interconnect bandwidth of one GPU in one direction, GB/s."""
    gpus_per_node: int
    """The largest tensor-parallel group inside a node."""
    price_per_hour_usd: float
    """Default price of one GPU for one hour, US dollars."""
    price_source: str
    """Where the default price comes from; placeholders say so."""
    calibrated_as: str | None
    """Key of the like accelerator whose measured efficiencies are borrowed; None: its own, or none."""
    sources: tuple[str, ...]
    """Where the peaks come from."""

    @property
    def memory_bytes(self) -> float:
        """Device memory, bytes."""
        return self.memory_gib * 2**30

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth, bytes/s."""
        return self.bandwidth_gb_s * 1e9

    def flops(self, dtype: str) -> float:
        """Return dense FLOP/s of a data type, falling back to bf16 where the GPU lacks it.

        Weights in a type without tensor cores are converted on the fly and multiplied in bf16, as vLLM's
        Marlin kernels do for FP8 on Ampere.
        """
        return self.tflops.get(dtype, self.tflops["bf16"]) * 1e12

    def supports(self, dtype: str) -> bool:
        """Whether the tensor cores multiply this data type natively."""
        return dtype in self.tflops


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """Return every accelerator of the catalogue, in the order of the data file."""
    document = json.loads((files(__package__) / "data" / "accelerators.json").read_text(encoding="utf-8"))
    price_source = f"{document['price_note']} ({document['price_date']})"
    return tuple(
        Accelerator(
            key=entry["key"],
            name=entry["name"],
            aliases=tuple(entry["aliases"]),
            memory_gib=float(entry["memory_gib"]),
            bandwidth_gb_s=float(entry["bandwidth_gb_s"]),
            tflops=MappingProxyType({dtype: float(value) for dtype, value in entry["tflops"].items()}),
            interconnect=entry["interconnect"],
            link_gb_s=float(entry["link_gb_s"]),
            gpus_per_node=int(entry["gpus_per_node"]),
            price_per_hour_usd=float(entry["price_per_hour_usd"]),
            price_source=price_source,
            calibrated_as=entry["calibrated_as"],
            sources=tuple(entry["sources"]),
        )
        for entry in document["accelerators"]
    )


@cache
def _by_name() -> Mapping[str, Accelerator]:
    index: dict[str, Accelerator] = {}
    for entry in accelerators():
        for name in (entry.key, *entry.aliases):
            lowered = name.lower()
            if index.setdefault(lowered, entry) is not entry:
                raise CatalogError(f"accelerator name {name!r} is used twice: fix data/accelerators.json")
    return index


def _words(name: str) -> frozenset[str]:
    """Return what tells accelerators apart in a name: its words, without the maker, the kind of memory and versions."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return frozenset(re.sub(r"^(sxm|pcie)\d$", r"\1", word) for word in words if word not in _SAY_NOTHING)


_SAY_NOTHING = frozenset({"nvidia", "tesla", "gpu", "hbm2", "hbm2e", "hbm3", "hbm3e"})


@cache
def _by_words() -> Mapping[frozenset[str], Accelerator]:
    index: dict[frozenset[str], set[Accelerator]] = {}
    for name, entry in _by_name().items():
        index.setdefault(_words(name), set()).add(entry)
    return {words: next(iter(entries)) for words, entries in index.items() if len(entries) == 1}


def accelerator(name: str) -> Accelerator:
    """Return the accelerator with this key or alias, in any letter case.

    The words of a name may come in any order and with the maker's, as monitoring and cloud consoles write them:
    ``NVIDIA H100 80GB HBM3``, ``A100 (80GB)``, ``A100 80GB SXM4``.

    Raises:
        UnknownNameError: No accelerator has this name; the message lists near ones.
    """
    found = _by_name().get(name.strip().lower().replace(" ", "-")) or _by_words().get(_words(name))
    if found is None:
        raise UnknownNameError(
            "accelerator",
            name,
            (name for entry in accelerators() for name in (entry.key, *entry.aliases)),
            f"known keys: {', '.join(entry.key for entry in accelerators())}",
        )
    return found
