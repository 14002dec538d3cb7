"""Online calibration: two factors and an offset that fit a step model to the engine that really runs.

Tables and rooflines know kernels; they do not know this cluster's clocks, drivers, engine version and
network. Three numbers absorb most of the difference: a factor on decode work, a factor on prompt work, and an
additive offset of the time to first token (HTTP, tokenizer, queues between processes). All are learned from
*means*, which vLLM's histograms give exactly (sum over count), at moderate load, where the model of queueing
cannot be what is wrong. Percentiles are then predicted by the calibrated model; scaling a predicted p99 by an
observed ratio instead makes it worse at any other load.

Everything here is pure: observations in, a small serialisable state out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import exp, isfinite, log
from typing import TYPE_CHECKING, Any

from servingtiers.performance.analytic import EngineLimits, Prediction, Traffic, predict
from servingtiers.performance.latency import Percentiles
from servingtiers.performance.steps import GridStepModel, StepSource

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Calibration", "Observation", "calibrated", "predict_calibrated", "update"]

LOWEST, HIGHEST = 0.5, 2.0
"""Bounds of the factors: an engine outside them runs something else than the model says, and the plan must say
so instead of being bent."""

FEWEST_REQUESTS = 200
LEAST_KV_USE, MOST_KV_USE = 0.1, 0.9
LONGEST_OFFSET_MS = 2000.0

_HALF_LEARNED = 1000.0
"""Requests after which an observation counts half."""
_GATE = 0.35
"""An observation this far from the present factor, in natural logarithms, is an outlier …"""
_PERSISTENT = 3
"""… unless it is the third in a row: then the engine has changed."""


@dataclass(frozen=True, slots=True)
class Observation:
    """Means over one interval in which the load of an engine pool was steady; all per replica."""

    requests: float
    """Requests finished in the interval, whole pool."""
    traffic: Traffic
    """Of one replica: rate, mean lengths and their spread, prefix-hit rate."""
    itl_ms: float
    """Mean inter-token latency."""
    ttft_ms: float
    """Mean time to first token."""
    queue_ms: float
    """Mean time a request was queued."""
    prefill_ms: float
    """Mean time from being scheduled to the first token."""
    kv_use: float
    """Mean share of the KV cache in use, 0-1."""
    waiting: float = 0.0
    """Mean number of waiting requests."""
    preemptions: float = 0.0
    """In the interval."""
    scaled_recently: bool = False
    """Whether replicas came or went in the interval or shortly before."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What has been learned of one pool on one engine version."""

    engine: str
    """What it was learned on (image and flags that matter); another engine starts anew."""
    decode_factor: float = 1.0
    prefill_factor: float = 1.0
    offset_ms: float = 0.0
    requests: float = 0.0
    """Requests learned from."""
    outliers: int = 0
    """Outliers in a row."""

    def to_json(self) -> dict[str, Any]:
        """Return the state as a JSON object, rounded to what it is worth."""
        document = asdict(self)
        for key in ("decode_factor", "prefill_factor", "offset_ms", "requests"):
            document[key] = round(document[key], 4)
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], engine: str) -> Calibration:
        """Return the stored state, or a fresh one when it is of another engine, malformed or out of bounds."""
        fresh = cls(engine)
        if document.get("engine") != engine:
            return fresh
        try:
            stored = cls(
                engine=engine,
                decode_factor=float(document["decode_factor"]),
                prefill_factor=float(document["prefill_factor"]),
                offset_ms=float(document["offset_ms"]),
                requests=float(document["requests"]),
                outliers=int(document["outliers"]),
            )
        except (KeyError, TypeError, ValueError):
            return fresh
        usable = (
            LOWEST <= stored.decode_factor <= HIGHEST
            and LOWEST <= stored.prefill_factor <= HIGHEST
            and 0.0 <= stored.offset_ms <= LONGEST_OFFSET_MS
            and 0.0 <= stored.requests < float("inf")
            and stored.outliers >= 0
        )
        return stored if usable else fresh


def calibrated(model: GridStepModel, calibration: Calibration) -> GridStepModel:
    """Return the step model with its decode and prompt work scaled.

    In a step that holds prompt tokens the token curve and prompt attention follow the prompt factor, decode
    attention the decode factor.
    """
    if calibration.requests <= 0.0:
        return model
    grid, decode, prompt = model.grid, calibration.decode_factor, calibration.prefill_factor
    learned = calibration.requests / (calibration.requests + _HALF_LEARNED)
    source = StepSource(
        model.source.kind,
        f"{model.source.detail}; calibrated on {calibration.requests:.0f} live requests "
        f"(decode x{decode:.2f}, prefill x{prompt:.2f}, offset {calibration.offset_ms:.0f} ms)",
        max(model.source.band_percent * (1.0 - 0.5 * learned), 5.0),
    )
    return replace(
        model,
        source=source,
        grid=replace(
            grid,
            decode_ms=tuple(tuple(decode * value for value in row) for row in grid.decode_ms),
            token_ms=tuple(prompt * value for value in grid.token_ms),
            pair_ms=prompt * grid.pair_ms,
        ),
    )


def predict_calibrated(
    model: GridStepModel, calibration: Calibration, traffic: Traffic, limits: EngineLimits | None = None
) -> Prediction:
    """Return the prediction of the calibrated model, with the offset in the first token and end to end."""
    prediction = predict(calibrated(model, calibration), traffic, limits)
    offset = calibration.offset_ms

    def later(latency: Percentiles) -> Percentiles:
        return Percentiles(
            latency.mean + offset,
            latency.p50 + offset,
            latency.p90 + offset,
            latency.p95 + offset,
            latency.p99 + offset,
            latency.p999 + offset,
        )

    return replace(prediction, ttft=later(prediction.ttft), e2e=later(prediction.e2e))


def update(
    model: GridStepModel,
    calibration: Calibration,
    observation: Observation,
    limits: EngineLimits | None = None,
) -> tuple[Calibration, str]:
    """Learn from one observation.

    Args:
        model: The step model before calibration.
        calibration: What is known so far.
        observation: What was seen.
        limits: The engine's limits.

    Returns:
        The state after, and why it is what it is: ``learned …`` or the reason the observation was left out.
    """
    refusal = _refusal(observation)
    if refusal:
        return calibration, refusal
    wanted = _explaining(model, calibration, observation, limits)
    if wanted is None:
        return calibration, "left out: the model says the engine is saturated at this load"
    decode = log(wanted[0] / calibration.decode_factor)
    prompt = log(wanted[1] / calibration.prefill_factor)
    if max(abs(decode), abs(prompt)) > _GATE and calibration.requests > 0.0:
        outliers = calibration.outliers + 1
        if outliers < _PERSISTENT:
            off = f"decode x{wanted[0]:.2f}, prefill x{wanted[1]:.2f} would explain it"
            return replace(calibration, outliers=outliers), f"left out: an outlier ({off})"
        # Three in a row: what was learned before is of an engine that is gone.
        calibration = replace(calibration, requests=0.0, outliers=0)
    # Later observations count less and less, down to a tenth, so that drift is still followed.
    weight = observation.requests / (
        observation.requests + min(calibration.requests, 9.0 * observation.requests)
    )
    offset = min(
        max(observation.ttft_ms - observation.queue_ms - observation.prefill_ms, 0.0), LONGEST_OFFSET_MS
    )
    learned = Calibration(
        engine=calibration.engine,
        decode_factor=_bounded(calibration.decode_factor * exp(weight * decode)),
        prefill_factor=_bounded(calibration.prefill_factor * exp(weight * prompt)),
        offset_ms=calibration.offset_ms + weight * (offset - calibration.offset_ms),
        requests=calibration.requests + observation.requests,
        outliers=0,
    )
    return learned, (
        f"learned from {observation.requests:.0f} requests: decode x{learned.decode_factor:.3f}, "
        f"prefill x{learned.prefill_factor:.3f}, offset {learned.offset_ms:.1f} ms"
    )


def _explaining(
    model: GridStepModel, calibration: Calibration, observation: Observation, limits: EngineLimits | None
) -> tuple[float, float] | None:
    """Return the factors at which the model says what was observed, or None where the model is saturated.

    Solved by substitution: queueing makes latencies respond more than in proportion, so each turn takes only
    most of the step and stops within half a per cent.
    """
    decode, prompt = calibration.decode_factor, calibration.prefill_factor
    for _ in range(12):
        trial = replace(calibration, decode_factor=decode, prefill_factor=prompt, requests=1.0)
        expected = predict(calibrated(model, trial), observation.traffic, limits)
        if expected.saturated or expected.tpot.mean <= 0.0 or expected.prefill_ms <= 0.0:
            return None
        off_decode = log(observation.itl_ms / expected.tpot.mean)
        off_prompt = log(observation.prefill_ms / expected.prefill_ms)
        if max(abs(off_decode), abs(off_prompt)) < 0.005:
            break
        decode = _bounded(decode * exp(0.7 * off_decode))
        prompt = _bounded(prompt * exp(0.7 * off_prompt))
    return decode, prompt


def _bounded(factor: float) -> float:
    return min(max(factor, LOWEST), HIGHEST)


def _refusal(observation: Observation) -> str:
    """Return why an observation cannot be learned from; empty when it can."""
    seen = (observation.itl_ms, observation.ttft_ms, observation.prefill_ms, observation.traffic.rate)
    if not all(isfinite(value) and value > 0.0 for value in seen):
        return "left out: a latency or the rate is missing"
    if not (isfinite(observation.queue_ms) and observation.queue_ms >= 0.0):
        return "left out: the queue time is missing"
    if observation.requests < FEWEST_REQUESTS:
        return f"left out: {observation.requests:.0f} requests are fewer than {FEWEST_REQUESTS}"
    if observation.scaled_recently:
        return "left out: replicas came or went"
    if observation.preemptions > 0.0:
        return "left out: requests were preempted"
    if observation.waiting > 0.5:
        return "left out: requests were waiting"
    if not LEAST_KV_USE < observation.kv_use < MOST_KV_USE:
        return (
            f"left out: KV use {100 * observation.kv_use:.0f} % is outside "
            f"{100 * LEAST_KV_USE:.0f}-{100 * MOST_KV_USE:.0f} %"
        )
    return ""
