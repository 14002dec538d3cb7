"""The field's rules of thumb, held against the performance model: writes docs/explanation/rules-of-thumb.md.

Run: ``python -m servingtiers.performance.rules_of_thumb [--check] [FILE]``; without a file the page is printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from servingtiers.catalog.accelerators import Accelerator, accelerator
from servingtiers.catalog.models import ModelShape, model
from servingtiers.performance.confirmation import confirm
from servingtiers.performance.engine_sim import EngineConfig, PoolConfig, simulate, sustainable_rate
from servingtiers.performance.host import with_host_time
from servingtiers.performance.planner import (
    Choice,
    Constraints,
    Demand,
    Metric,
    Objective,
    Plan,
    Role,
    default_limits,
    duration,
    plan,
)
from servingtiers.performance.select import step_model
from servingtiers.performance.speculation import Speculation
from servingtiers.performance.steps import GridStepModel
from servingtiers.performance.workload import Workload

__all__ = ["main", "page"]


@dataclass(frozen=True, slots=True)
class _Rule:
    """One line of the page."""

    statement: str
    figure: str
    band: str
    verdict: str


def _model(
    shape: ModelShape, gpu: Accelerator, *, weights: str = "bf16", speculation: Speculation | None = None
) -> GridStepModel:
    return with_host_time(step_model(shape, gpu, weights=weights, speculation=speculation))


def _decode_tokens(steps: GridStepModel, batch: int, context: int = 512) -> float:
    """Tokens per second of a batch that only decodes."""
    return 1e3 * batch * steps.grid.tokens_per_step / steps.step_ms(0, 0, batch, batch * context)


def _decode_range(steps: GridStepModel, batch: int) -> tuple[float, float]:
    """The same at contexts of 1,024 and of 128 tokens."""
    return _decode_tokens(steps, batch, 1024), _decode_tokens(steps, batch, 128)


def _served_tokens(steps: GridStepModel, gpu: Accelerator, batch: int) -> float:
    """Output tokens per second with 512-token prompts and 128-token answers interleaved, ``batch`` in flight."""
    engine = EngineConfig(max_num_seqs=batch, max_num_batched_tokens=max(default_limits(gpu)[1], batch))
    load = Workload(512, 128, concurrency=batch)
    return simulate(PoolConfig(steps, engine), load, requests=max(2000, 20 * batch)).tokens_per_second


def _band(*steps: GridStepModel) -> str:
    widest = max(steps, key=lambda s: s.source.band_percent)
    return f"± {widest.source.band_percent:.0f} %"


def _rules() -> list[_Rule]:
    llama2, llama3 = model("meta-llama/Llama-2-7b-hf"), model("meta-llama/Llama-3.1-8B")
    a100, h100, l40s = (accelerator(key) for key in ("a100-sxm-80gb", "h100-sxm-80gb", "l40s-48gb"))
    on_a100, on_h100, on_l40s = (_model(llama2, gpu) for gpu in (a100, h100, l40s))
    return [
        *_batching(on_a100, on_h100, on_l40s, a100, h100, l40s),
        _Rule(
            "The A100 80 GB has 1,935 GB/s",
            f"{accelerator('a100-pcie-80gb').bandwidth_gb_s:,.0f} GB/s (PCIe), {a100.bandwidth_gb_s:,.0f} GB/s (SXM)",
            "data sheet",
            "right for the PCIe card; SXM has more",
        ),
        *_techniques(llama2, llama3, h100),
        *_tier_batches(llama3, a100, h100),
        *_disaggregation(llama3, a100, h100),
        *_thousand(llama3),
    ]


def _batching(
    on_a100: GridStepModel,
    on_h100: GridStepModel,
    on_l40s: GridStepModel,
    a100: Accelerator,
    h100: Accelerator,
    l40s: Accelerator,
) -> list[_Rule]:
    one, many_a = _decode_tokens(on_a100, 1), _decode_tokens(on_a100, 32)
    slower = on_a100.step_ms(0, 0, 32, 32 * 512) / on_a100.step_ms(0, 0, 1, 512)
    low_a, high_a = _decode_range(on_a100, 32)
    low_h, high_h = _decode_range(on_h100, 32)
    low_l, high_l = _decode_range(on_l40s, 32)
    served_a, served_h, served_l = (
        _served_tokens(steps, gpu, 32) for steps, gpu in ((on_a100, a100), (on_h100, h100), (on_l40s, l40s))
    )

    def figure(low: float, high: float, served: float) -> str:
        return (
            f"{low:,.0f}–{high:,.0f} tokens/s decoding only (contexts of 1,024–128 tokens); "
            f"{served:,.0f} with 512-token prompts interleaved"
        )

    def verdict(said: float, low: float, high: float, served: float) -> str:
        if low * 0.9 <= said <= high * 1.1:
            return "right for decoding only; prompts cost the rest"
        return f"wrong: even with prompts it is {served / said:.1f} times that"

    return [
        _Rule(
            "LLaMA-2-7B FP16 on an A100 at batch 1: 50 ms, about 20 tokens/s, 15 % utilisation",
            f"{one:.0f} tokens/s, {1e3 / one:.1f} ms a token",
            _band(on_a100),
            "wrong for a serving engine: that is an eager loop; reading 13.5 GB at 2 TB/s takes under 7 ms a token",
        ),
        _Rule(
            "The same at batch 32: about 2,000 tokens/s",
            figure(low_a, high_a, served_a),
            _band(on_a100),
            verdict(2000.0, low_a, high_a, served_a),
        ),
        _Rule(
            "The same at batch 32: about 500 tokens/s",
            figure(low_a, high_a, served_a),
            _band(on_a100),
            verdict(500.0, low_a, high_a, served_a),
        ),
        _Rule(
            "On an H100 at batch 32: about 3,500 tokens/s",
            figure(low_h, high_h, served_h),
            _band(on_h100),
            verdict(3500.0, low_h, high_h, served_h),
        ),
        _Rule(
            "An L40S at batch 32 lies well below an A100",
            f"{figure(low_l, high_l, served_l)}: {served_l / served_a:.0%} of the A100, {served_l / served_h:.0%} of the H100",
            _band(on_l40s),
            "right: it has 864 GB/s of bandwidth",
        ),
        _Rule(
            "From batch 1 to 32 throughput rises by an order of magnitude, latency by little",
            f"A100: {many_a / one:.0f} times the tokens/s at {slower:.1f} times the time per token",
            _band(on_a100),
            "right in kind: the weights are read once for the whole batch, the KV cache for each sequence",
        ),
    ]


def _techniques(llama2: ModelShape, llama3: ModelShape, h100: Accelerator) -> list[_Rule]:
    steps = _model(llama3, h100)
    rules = []
    gains = []
    for spread in (0.0, 0.5, 1.0):
        load = Workload(512, 256, rate=1.0, prompt_cv=spread, output_cv=spread)
        engine = EngineConfig(max_num_seqs=32, max_num_batched_tokens=32768)
        fixed = EngineConfig(max_num_seqs=32, max_num_batched_tokens=32768, static_batching=True)
        gains.append(
            sustainable_rate(PoolConfig(steps, engine), load)
            / sustainable_rate(PoolConfig(steps, fixed), load)
        )
    rules.append(
        _Rule(
            "Continuous batching gives 2–3 times the throughput of static batching",
            f"{gains[0]:.1f} times with equal lengths, {gains[1]:.1f} with a spread (CV) of 0.5, {gains[2]:.1f} with 1.0 "
            f"(batch 32, {llama3.name} on one {h100.key})",
            _band(steps),
            "right where lengths are spread: a static batch waits for its longest answer"
            if gains[2] >= 2.0
            else "less than said",
        )
    )
    for batch in (1, 64):
        plain = _decode_tokens(steps, batch)
        faster = [
            _decode_tokens(_model(llama3, h100, speculation=Speculation(k, a, 0.05)), batch) / plain
            for k, a in ((3, 0.6), (3, 0.8), (5, 0.8))
        ]
        rules.append(
            _Rule(
                f"Speculative decoding is 2–3 times faster (at batch {batch})",
                f"{faster[0]:.1f} times with 3 drafts of which 60 % are kept, {faster[1]:.1f} with 80 %, "
                f"{faster[2]:.1f} with 5 drafts; a draft token costs 5 % of a step",
                "± 20 %",
                "right at small batches, with a good draft"
                if batch == 1
                else "less at large batches: verified tokens then cost arithmetic that plain decoding would use",
            )
        )
    bf16 = _model(llama2, h100)
    for dtype, saying in (
        ("int8", "INT8 weights halve the time per token"),
        ("int4", "INT4 weights quarter it"),
    ):
        small = _model(llama2, h100, weights=dtype)
        ratios = [_decode_tokens(small, b) / _decode_tokens(bf16, b) for b in (1, 32, 128)]
        rules.append(
            _Rule(
                f"{saying} ({llama2.name} on one {h100.key})",
                f"{ratios[0]:.1f} times the tokens/s at batch 1, {ratios[1]:.1f} at 32, {ratios[2]:.1f} at 128",
                _band(small),
                "an upper bound, and only for small batches: overheads and the KV cache stay as they are. Not validated.",
            )
        )
    return rules


def _tier_batches(llama3: ModelShape, a100: Accelerator, h100: Accelerator) -> list[_Rule]:
    rules = []
    for name, low, high in (
        ("Latency: 1–4", 1, 4),
        ("Balanced: 8–16", 8, 16),
        ("Throughput: 32–128 and more", 32, 128),
    ):
        figures = []
        for gpu in (a100, h100):
            steps = _model(llama3, gpu)
            engine = EngineConfig(max_num_seqs=high, max_num_batched_tokens=max(default_limits(gpu)[1], high))
            run = simulate(
                PoolConfig(steps, engine), Workload(512, 128, concurrency=high), requests=max(2000, 20 * high)
            )
            figures.append(
                f"{gpu.key}: {run.tokens_per_second:,.0f} tokens/s at batch {high}, TPOT p99 {duration(run.tpot.p99)}"
            )
        rules.append(
            _Rule(
                f"Batch sizes by tier: {name}",
                "; ".join(figures),
                _band(_model(llama3, a100), _model(llama3, h100)),
                "no more than a habit: the objective sets the batch. Where TPOT p99 may be 50 ms, these leave "
                "throughput unused"
                if low < 32
                else "right where nothing but cost counts",
            )
        )
    return rules


def _disaggregation(llama3: ModelShape, a100: Accelerator, h100: Accelerator) -> list[_Rule]:
    demand = Demand(100.0, 1024, 128)
    wanted = (Objective(Metric.TTFT, "p99", 1000.0), Objective(Metric.TPOT, "p99", 40.0))

    def cheapest(first: Accelerator, second: Accelerator | None) -> Choice | None:
        if second is None:
            constraints = Constraints(
                accelerators=(first,), tensor_parallel=(1,), disaggregation=False, spare=0
            )
        else:
            constraints = Constraints(
                accelerators=tuple(dict.fromkeys((first, second))),
                tensor_parallel=(1,),
                aggregated=False,
                by_role={Role.PREFILL: frozenset({first.key}), Role.DECODE: frozenset({second.key})},
                spare=0,
            )
        found = plan([llama3], demand, wanted, constraints, confirm=confirm, top=1)
        return found.choices[0] if found.feasible else None

    cases = {
        "H100 alone": cheapest(h100, None),
        "A100 alone": cheapest(a100, None),
        "prefill H100, decode A100": cheapest(h100, a100),
        "prefill A100, decode H100": cheapest(a100, h100),
        "both H100": cheapest(h100, h100),
    }
    costs: dict[str, float] = {
        name: choice.cost_per_hour for name, choice in cases.items() if choice is not None
    }
    best = min(costs, key=lambda name: costs[name])
    listed = "; ".join(
        f"{name}: {'+'.join(str(p.replicas) for p in choice.pools)} GPUs, {choice.cost_per_hour:.2f} USD/hour"
        if choice
        else f"{name}: infeasible"
        for name, choice in cases.items()
    )
    steps = (_model(llama3, h100), _model(llama3, a100))
    mixed = {
        name: costs[name]
        for name in ("prefill H100, decode A100", "prefill A100, decode H100")
        if name in costs
    }
    better = min(mixed.items(), key=lambda item: item[1])[0] if mixed else "neither"
    return [
        _Rule(
            "Disaggregation on mixed hardware pays: prefill on H100 and decode on A100, or the other way round",
            f"{demand.rate:g} requests/s of {demand.prompt_tokens:g}+{demand.output_tokens:g} tokens, "
            f"{wanted[0]}, {wanted[1]}, no spare: {listed}",
            _band(*steps),
            f"at these prices {best} is cheapest; of the mixed ones {better}. It hangs on prices: arithmetic per dollar "
            "wants prefill on H100, bandwidth per dollar decides decode. KV transfer times are not validated.",
        )
    ]


def _thousand(llama3: ModelShape) -> list[_Rule]:
    demand = Demand(1000.0, 512, 128)
    readings = {
        "end-to-end": (Objective(Metric.E2E, "p99", 200.0),),
        "TTFT": (Objective(Metric.TTFT, "p99", 200.0),),
        "TTFT, with TPOT p99 ≤ 50 ms": (
            Objective(Metric.TTFT, "p99", 200.0),
            Objective(Metric.TPOT, "p99", 50.0),
        ),
    }
    rules = []
    for name, wanted in readings.items():
        constraints = Constraints(
            accelerators=tuple(accelerator(k) for k in ("a100-sxm-80gb", "h100-sxm-80gb", "l40s-48gb")),
            tensor_parallel=(1,),
            disaggregation=False,
        )
        found: Plan = plan([llama3], demand, wanted, constraints, confirm=confirm, top=3)
        if found.feasible:
            figure = "; ".join(
                f"{c.pools[0].needed}+1 × {c.pools[0].option.accelerator.key}, {c.cost_per_hour:.0f} USD/hour"
                for c in found.choices
            )
            verdict = "feasible; the price list decides"
        else:
            figure = "; ".join(r.reason.split(" (")[0] for r in found.rejections)
            verdict = f"infeasible at any number of replicas; {found.verdict.rsplit('; ', 1)[-1]}"
        band = _band(*(_model(llama3, a) for a in constraints.accelerators))
        rules.append(_Rule(f"1,000 QPS at p99 < 200 ms, read as {name}", figure, band, verdict))
    return rules


def page() -> str:
    """Return the page."""
    lines = [
        "# Rules of thumb, checked",
        "",
        "<!-- Generated by `python -m servingtiers.performance.rules_of_thumb docs/explanation/rules-of-thumb.md`. -->",
        "",
        "Sayings of the field about serving LLMs, held against this project's performance model: the shipped tables where",
        "there is one, event simulation of vLLM on top. 512-token prompts and 128-token answers unless said otherwise.",
        "The band is the step model's; see [capacity planning](capacity-planning.md) for what it means.",
        "",
        "| saying | our figure | band | verdict |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.statement} | {r.figure} | {r.band} | {r.verdict} |" for r in _rules()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, print it, or with ``--check`` compare the file with it."""
    check = "--check" in arguments
    files = [Path(a) for a in arguments if a != "--check"]
    text = page()
    if not files:
        sys.stdout.write(text)
        return 0
    if check:
        same = files[0].is_file() and files[0].read_text(encoding="utf-8") == text
        if not same:
            sys.stderr.write(f"{files[0]} is not in step with the model: run make generate\n")
        return int(not same)
    files[0].write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
