"""Rivals: other autoscalers, each to its published algorithm and defaults, on the simulator's readings.

Every class names its source in its docstring and exposes its main setting for sweeps (``knob``). Where a rival depends
on something that this fleet has not (a gateway with a queue of its own, an auto-ARIMA forecast), its docstring says what
stands in. Readings are ideal for them: fresh, complete and exact, at the period they publish.
"""

from __future__ import annotations

from collections.abc import Callable

from servingtiers.simulate.policies import OperatorPolicy, Policy
from servingtiers.simulate.rivals.dynamo import DynamoHybrid, DynamoLoad, DynamoThroughput
from servingtiers.simulate.rivals.hpa import EppKeda, HpaConcurrency, HpaWaiting, KedaWaiting
from servingtiers.simulate.rivals.ray import RayServe
from servingtiers.simulate.rivals.static import StaticByPeak
from servingtiers.simulate.rivals.windows import AibrixApa, KnativeKpa
from servingtiers.simulate.rivals.wva import Inferno, WvaV1, WvaV2
from servingtiers.simulate.scenario import Scenario

__all__ = ["KNOBS", "POLICIES", "RIVALS", "UNSHARED", "make_policy"]

_Factory = Callable[..., Policy]

RIVALS: dict[str, _Factory] = {
    "static-peak": StaticByPeak,
    "hpa-concurrency": HpaConcurrency,
    "hpa-waiting": HpaWaiting,
    "keda-waiting": KedaWaiting,
    "epp-keda": EppKeda,
    "knative-kpa": KnativeKpa,
    "aibrix-apa": AibrixApa,
    "ray-serve": RayServe,
    "wva-v1": WvaV1,
    "wva-v2": WvaV2,
    "inferno": Inferno,
    "dynamo": DynamoHybrid,
    "dynamo-throughput": DynamoThroughput,
    "dynamo-load": DynamoLoad,
}
"""Name to constructor: ``RIVALS[name](scenario)`` at its defaults, ``RIVALS[name](scenario, knob)`` for sweeps."""

KNOBS: dict[str, tuple[float, ...]] = {
    "static-peak": (0.7, 0.85, 1.0, 1.2, 1.5),
    "hpa-concurrency": (0.15, 0.25, 0.35, 0.5, 0.7),
    "hpa-waiting": (1.0, 2.0, 5.0, 10.0),
    "keda-waiting": (1.0, 2.0, 5.0, 10.0),
    "epp-keda": (0.3, 0.5, 0.7, 0.9),
    "knative-kpa": (0.15, 0.25, 0.35, 0.5, 0.7),
    "aibrix-apa": (0.1, 0.2, 0.35, 0.5),
    "ray-serve": (2.0, 8.0, 16.0, 32.0),
    "wva-v1": (0.1, 0.3, 0.5),
    "wva-v2": (0.4, 0.6, 0.85),
    "inferno": (1.0, 1.25, 1.5, 1.8, 2.2),
    "dynamo": (1.0, 1.15, 1.3, 1.6, 1.9),
    "dynamo-throughput": (1.0, 1.3, 1.6),
    "dynamo-load": (0.4, 0.6, 0.8),
}
"""Values of each rival's main setting for a sweep; the defaults are among them."""

UNSHARED = "servingtiers-unshared"
"""The operator's own policy with lending switched off: what a TierPool buys is the difference."""

POLICIES = ("servingtiers", UNSHARED, *RIVALS, "static-optimal", "clairvoyant")
"""Every name that ``--policy`` takes; the last two are limits, found by searching with the trace known."""


def make_policy(name: str, scenario: Scenario, knob: float | None = None) -> Policy:
    """Return a policy by name, ready for one run.

    Args:
        name: ``servingtiers``, the same without lending, or a rival.
        scenario: What it will be run on: its bounds, engines and objectives.
        knob: Value of the rival's main setting; None: its default.

    Raises:
        ValueError: There is no policy of this name.
    """
    if name == "servingtiers":
        return OperatorPolicy()
    if name == UNSHARED:
        return OperatorPolicy(UNSHARED, lending=None)
    if name not in RIVALS:
        raise ValueError(f"no policy {name!r}: use {', '.join(POLICIES)}")
    return RIVALS[name](scenario) if knob is None else RIVALS[name](scenario, knob)
