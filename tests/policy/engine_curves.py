"""Engines as the performance model describes them, for tests that only care how many requests they carry."""

from servingtiers.core.decisions import EngineCurve


def carries(rps: float | None, *, tpot: float = 0.02, ttft: float = 0.2) -> EngineCurve | None:
    """Return an engine that carries so many requests per second, at times that do not depend on its load."""
    if rps is None:
        return None
    return EngineCurve(
        rps=rps,
        saturation=1.05 * rps,
        loads=(0.1, 0.95),
        tpot=(tpot, tpot),
        ttft=(ttft, ttft),
        prefill_share=0.3,
    )
