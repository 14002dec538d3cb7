"""The planner: its order, its arithmetic, its verdicts, and what must hold for any input."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from properties import examples
from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.performance.confirmation import confirm, simulate_choice
from servingtiers.performance.host import (
    HOST_STEP_MS,
    PIECEWISE_LAYER_MS,
    with_host_time,
    with_piecewise_graphs,
)
from servingtiers.performance.planner import (
    Constraints,
    Demand,
    Metric,
    Objective,
    Role,
    curve,
    default_limits,
    duration,
    held_ms,
    plan,
)
from servingtiers.performance.select import step_model
from servingtiers.performance.steps import SourceKind, StepSource

LLAMA = model("meta-llama/Llama-3.1-8B-Instruct")
SMALL = model("meta-llama/Llama-3.2-1B")
H100, A100, L40S = (accelerator(key) for key in ("h100-sxm-80gb", "a100-sxm-80gb", "l40s-48gb"))
FEW = Constraints(accelerators=(H100, A100, L40S), tensor_parallel=(1, 2), disaggregation=False)
CHAT = (Objective(Metric.TTFT, "p99", 500.0), Objective(Metric.TPOT, "p99", 50.0))


def test_a_plan_is_ranked_by_cost_and_adds_up() -> None:
    """Cost, replicas and cost per token follow from the rate of a replica and the prices."""
    found = plan([LLAMA], Demand(100.0, 512, 128), CHAT, FEW)

    assert found.feasible
    assert [c.cost_per_hour for c in found.choices] == sorted(c.cost_per_hour for c in found.choices)
    for choice in found.choices:
        (pool,) = choice.pools
        assert pool.needed == math.ceil(100.0 / pool.replica_rate - 1e-6)
        assert pool.replicas == pool.needed + 1
        hourly = pool.replicas * pool.option.tensor_parallel * pool.option.accelerator.price_per_hour_usd
        assert choice.cost_per_hour == pytest.approx(hourly)
        assert choice.cost_per_million_output == pytest.approx(1e6 * hourly / (100.0 * 128 * 3600))
        assert all(held_ms(o, choice.ttft, choice.tpot, choice.e2e, 1.4) <= o.target_ms for o in CHAT)


def test_prices_decide() -> None:
    """An accelerator that is nearly free wins; the catalogue's prices are only defaults."""
    cheap = Constraints(accelerators=(H100, L40S), tensor_parallel=(1,), prices={"l40s-48gb": 0.01})

    assert plan([LLAMA], Demand(20.0, 512, 128), CHAT, cheap).choices[0].pools[0].option.accelerator is L40S


def test_an_impossible_end_to_end_objective_says_how_many_tokens_fit() -> None:
    """The verdict has the reason and the nearest objective that can be kept, with its fleet."""
    found = plan(
        [LLAMA],
        Demand(1000.0, 512, 128),
        (Objective(Metric.E2E, "p99", 200.0),),
        Constraints(accelerators=(H100, A100, L40S), tensor_parallel=(1,)),
    )

    assert not found.feasible
    assert "an idle 1 x h100-sxm-80gb fits" in found.verdict
    fits = int(found.verdict.split(" fits ")[1].split(" ")[0])
    assert 24 <= fits <= 31
    (nearest,) = found.nearest
    assert 800.0 < nearest.target_ms < 1200.0
    assert found.nearest_choice is not None
    again = plan([LLAMA], Demand(1000.0, 512, 128), found.nearest, Constraints((H100, A100, L40S), (1,)))
    assert again.feasible


def test_one_token_answers_are_planned_too() -> None:
    """Classification: no decoding, so TPOT binds nothing and an end-to-end objective is a TTFT one."""
    demand = Demand(30.0, 2000, 1)
    found = plan(
        [LLAMA], demand, (Objective(Metric.E2E, "p99", 400.0), Objective(Metric.TPOT, "p99", 1.0)), FEW
    )
    none = plan([LLAMA], demand, (Objective(Metric.E2E, "p99", 5.0),), FEW)

    assert found.feasible
    assert "idle, E2E p99 is" in none.verdict


def test_a_gap_objective_shrinks_the_step_budget() -> None:
    """A prompt computed beside decoding sequences is a gap between their tokens; smaller chunks, smaller gaps."""
    demand = Demand(10.0, 4000, 200)
    gap = (Objective(Metric.ITL, "p99", 40.0),)
    plain = plan([LLAMA], demand, CHAT, FEW).choices[0].pools[0].option
    found = plan([LLAMA], demand, gap, FEW, confirm=confirm, top=1)

    assert found.choices[0].pools[0].option.max_num_batched_tokens < plain.max_num_batched_tokens
    assert simulate_choice(found.choices[0], demand).itl.p99 <= 40.0


def test_the_batch_limit_guards_tpot_when_more_load_comes_than_planned() -> None:
    """With a TPOT objective the smallest limit that costs no capacity is chosen; without one, the largest."""
    one = Constraints(accelerators=(A100,), tensor_parallel=(1,), disaggregation=False)
    guarded = plan([LLAMA], Demand(5.0, 512, 128), CHAT, one).choices[0].pools[0]
    free = plan([LLAMA], Demand(5.0, 512, 128), CHAT[:1], one).choices[0].pools[0]

    assert guarded.option.max_num_seqs < free.option.max_num_seqs == 256
    assert guarded.replica_rate >= 0.9 * free.replica_rate


def test_infeasible_for_want_of_memory_says_so() -> None:
    """A model that fits nowhere is refused with the memory it needs."""
    found = plan([model("meta-llama/Llama-3.1-405B")], Demand(1.0, 512, 128), CHAT, FEW)

    assert not found.feasible
    assert "does not fit" in found.verdict


def test_a_smaller_model_competes() -> None:
    """Among several models the cheapest that keeps the objectives comes first."""
    found = plan([LLAMA, SMALL], Demand(50.0, 512, 128), CHAT, FEW)

    assert found.choices[0].model is SMALL
    assert {c.model for c in found.choices} == {LLAMA, SMALL}


def test_disaggregated_fleets_are_sized_pool_by_pool() -> None:
    """Both pools carry the load, each with a spare replica, and decode is at least as parallel as prefill."""
    found = plan(
        [LLAMA], Demand(100.0, 2000, 100), CHAT, Constraints(accelerators=(H100, A100), aggregated=False)
    )

    assert found.feasible
    for choice in found.choices:
        prefill, decode = choice.pools
        assert (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
        assert prefill.option.tensor_parallel <= decode.option.tensor_parallel
        assert all(pool.replicas == pool.needed + 1 for pool in choice.pools)
        assert all(pool.needed * pool.replica_rate >= 100.0 * (1 - 1e-6) for pool in choice.pools)


def test_roles_may_be_bound_to_accelerators() -> None:
    """A tier may ask for prefill on A100 and decode on H100."""
    bound = Constraints(
        accelerators=(H100, A100),
        tensor_parallel=(1,),
        aggregated=False,
        by_role={Role.PREFILL: frozenset({A100.key}), Role.DECODE: frozenset({H100.key})},
    )

    for choice in plan([LLAMA], Demand(20.0, 1000, 100), CHAT, bound).choices:
        assert [pool.option.accelerator for pool in choice.pools] == [A100, H100]


def test_confirming_keeps_or_enlarges_a_fleet() -> None:
    """Checked fleets keep the objectives in the simulation; none gets smaller by being checked."""
    demand = Demand(60.0, 800, 150, prompt_cv=0.8, output_cv=0.6)
    screened = plan([LLAMA], demand, CHAT, FEW)
    checked = plan([LLAMA], demand, CHAT, FEW, confirm=confirm, top=2)

    confirmed = [c for c in checked.choices if c.confirmed]
    assert len(confirmed) == 2
    before = {c.pools[0].option: c.pools[0].needed for c in screened.choices}
    for choice in confirmed:
        assert choice.pools[0].needed >= before[choice.pools[0].option]
        assert all(held_ms(o, choice.ttft, choice.tpot, choice.e2e, 1.4) <= o.target_ms for o in CHAT)


def test_bursts_need_more_than_poisson_when_confirmed() -> None:
    """The closed forms know Poisson arrivals; the simulation knows better and enlarges the fleet."""
    from servingtiers.performance.workload import Arrivals

    tight = (Objective(Metric.TTFT, "p99", 150.0),)
    fleets = [
        plan(
            [LLAMA],
            Demand(40.0, 800, 150, arrivals=Arrivals.parse(arrivals)),
            tight,
            Constraints(accelerators=(H100,), tensor_parallel=(1,), disaggregation=False),
            confirm=confirm,
            top=1,
        ).choices[0]
        for arrivals in ("poisson", "gamma:2.5")
    ]

    assert fleets[1].pools[0].needed > fleets[0].pools[0].needed


def test_host_time_is_added_to_tables_and_not_to_measured_profiles() -> None:
    """What a profile measured has the host's time in it."""
    from dataclasses import replace

    table = step_model(LLAMA, H100)
    profile = replace(table, source=StepSource(SourceKind.PROFILE, "mine", 5.0))

    assert with_host_time(table).step_ms(0, 0, 8, 4000) == pytest.approx(
        table.step_ms(0, 0, 8, 4000) + HOST_STEP_MS
    )
    assert with_host_time(table).step_ms(512, 0, 8, 4000) == pytest.approx(
        table.step_ms(512, 0, 8, 4000) + HOST_STEP_MS
    )
    assert with_host_time(profile) is profile


def test_piecewise_graphs_lengthen_decode_steps_of_tables_alone() -> None:
    """Steps with prompts run piecewise or without a graph either way; a profile has what its engine did."""
    from dataclasses import replace

    table = step_model(LLAMA, H100)
    profile = replace(table, source=StepSource(SourceKind.PROFILE, "mine", 5.0))
    piecewise = with_piecewise_graphs(table, LLAMA.layers, PIECEWISE_LAYER_MS)

    assert piecewise.step_ms(0, 0, 8, 4000) == pytest.approx(
        table.step_ms(0, 0, 8, 4000) + LLAMA.layers * 0.01
    )
    assert piecewise.step_ms(512, 0, 8, 4000) == pytest.approx(table.step_ms(512, 0, 8, 4000))
    assert with_piecewise_graphs(profile, LLAMA.layers, PIECEWISE_LAYER_MS) is profile


@pytest.mark.parametrize(
    ("make", "mend"),
    [
        (lambda: Demand(0.0, 10, 10), "above 0"),
        (lambda: Demand(1.0, 0, 10), "use 1 or more"),
        (lambda: Demand(1.0, 10, 10, prompt_cv=-1), "use 0"),
        (lambda: Demand(1.0, 10, 10, prefix_hit_rate=2), "share from 0 to 1"),
        (lambda: Objective(Metric.TTFT, "p42", 1.0), "use mean, p50"),
        (lambda: Objective(Metric.TTFT, "p99", 0.0), "above 0"),
        (lambda: plan([LLAMA], Demand(1.0, 200_000, 10), CHAT, FEW), "longer context"),
    ],
)
def test_bad_input_names_its_mend(make, mend) -> None:
    """One line that says what to do instead."""
    with pytest.raises(ValueError, match=mend):
        make()


def test_latencies_are_written_for_people() -> None:
    """Three digits and a fitting unit."""
    assert [duration(ms) for ms in (0.25, 6.12, 48.0, 213.4, 2150.0)] == [
        "250 µs",
        "6.12 ms",
        "48 ms",
        "213 ms",
        "2.15 s",
    ]


# --- what must hold for any input ------------------------------------------------------------------------------
demands = st.builds(
    Demand,
    rate=st.floats(0.5, 300.0),
    prompt_tokens=st.floats(32, 4000),
    output_tokens=st.floats(16, 800),
    prompt_cv=st.sampled_from([0.0, 0.5, 1.0]),
    output_cv=st.sampled_from([0.0, 0.5, 1.0]),
    prefix_hit_rate=st.sampled_from([0.0, 0.5, 0.9]),
)
objectives = st.lists(
    st.one_of(
        st.builds(
            Objective, st.just(Metric.TTFT), st.sampled_from(["p50", "p95", "p99"]), st.floats(50.0, 5000.0)
        ),
        st.builds(Objective, st.just(Metric.TPOT), st.sampled_from(["p50", "p99"]), st.floats(8.0, 120.0)),
        st.builds(
            Objective, st.just(Metric.E2E), st.sampled_from(["p90", "p99"]), st.floats(1000.0, 60_000.0)
        ),
    ),
    min_size=1,
    max_size=3,
).map(tuple)


def cheapest(demand: Demand, wanted: tuple[Objective, ...]) -> float:
    """Cost of the cheapest fleet, infinite where there is none."""
    found = plan([LLAMA], demand, wanted, FEW)
    return found.choices[0].cost_per_hour if found.feasible else math.inf


@settings(deadline=None, max_examples=examples(20))
@given(demands, objectives, st.floats(1.0, 5.0))
def test_more_load_never_takes_fewer_replicas(
    demand: Demand, wanted: tuple[Objective, ...], times: float
) -> None:
    """For every option that serves both loads."""
    from dataclasses import replace

    def replicas(found) -> dict:
        return {c.pools[0].option: c.pools[0].replicas for c in found.choices}

    less = replicas(plan([LLAMA], demand, wanted, FEW))
    more = replicas(plan([LLAMA], replace(demand, rate=demand.rate * times), wanted, FEW))

    assert less.keys() == more.keys()
    assert all(more[option] >= less[option] for option in less)


@settings(deadline=None, max_examples=examples(20))
@given(demands, objectives, st.floats(0.2, 1.0))
def test_a_tighter_objective_never_costs_less(
    demand: Demand, wanted: tuple[Objective, ...], factor: float
) -> None:
    """Tightening every objective by one factor cannot make the cheapest fleet cheaper."""
    tighter = tuple(Objective(o.metric, o.percentile, o.target_ms * factor) for o in wanted)

    assert cheapest(demand, tighter) >= cheapest(demand, wanted) * (1 - 1e-9)


@settings(deadline=None, max_examples=examples(20))
@given(demands, objectives)
def test_one_objective_more_never_costs_less(demand: Demand, wanted: tuple[Objective, ...]) -> None:
    """Objectives hold at once."""
    assert cheapest(demand, wanted) >= cheapest(demand, wanted[:-1]) * (1 - 1e-9)


@settings(deadline=None, max_examples=examples(15))
@given(demands, objectives)
def test_a_verdict_is_one_line_and_infeasible_ones_have_a_reason(
    demand: Demand, wanted: tuple[Objective, ...]
) -> None:
    """And where the nearest objectives are named, a fleet keeps them."""
    found = plan([LLAMA], demand, wanted, FEW)

    assert "\n" not in found.verdict
    if not found.feasible:
        assert found.rejections
        assert len(found.nearest) == len(wanted)
        assert all(new.target_ms >= old.target_ms for new, old in zip(found.nearest, wanted, strict=True))
        assert plan([LLAMA], demand, found.nearest, FEW).feasible


@settings(deadline=None, max_examples=examples(15))
@given(demands, st.sampled_from([H100, A100, L40S]))
def test_a_curve_rises_and_never_beats_the_roofline(demand: Demand, gpu) -> None:
    """Latency never falls with the rate, and no step is faster than reading the weights at peak bandwidth."""
    from servingtiers.performance.planner import Option

    option = Option(LLAMA, gpu, 1, "bf16", "bf16", 256, default_limits(gpu)[1])
    found = curve(option, Role.AGGREGATED, demand, 25.0)
    floor = 1e3 * LLAMA.streamed_bytes("bf16") / gpu.bandwidth

    assert found.rates == tuple(sorted(found.rates))
    for metric in (Metric.TTFT, Metric.TPOT, Metric.E2E):
        values = found.values(metric, "p99")
        assert values == sorted(values)
    if found.points and demand.output_tokens > 2:
        assert found.values(Metric.TPOT, "mean")[0] >= floor
        # A token costs at least 2 FLOP per active parameter.
        most = gpu.flops("bf16") / (2.0 * LLAMA.active_linear_parameters)
        assert all(rate * demand.output_tokens <= most for rate in found.rates)


def test_random_plans_keep_their_objectives_when_simulated() -> None:
    """A small draw of what the benchmark does at length: fleets at the planned rate, spare gone."""
    import random

    rng = random.Random(11)
    kept = total = 0
    while total < 12:
        demand = Demand(
            rate=rng.uniform(2, 80),
            prompt_tokens=rng.choice([128, 512, 1500, 4000]),
            output_tokens=rng.choice([32, 128, 400]),
            prompt_cv=rng.choice([0.0, 0.7]),
            output_cv=rng.choice([0.0, 0.7]),
        )
        wanted = (
            Objective(Metric.TTFT, "p99", rng.choice([250.0, 500.0, 2000.0])),
            Objective(Metric.TPOT, "p99", rng.choice([25.0, 50.0, 100.0])),
        )
        found = plan([LLAMA], demand, wanted, FEW, confirm=confirm, top=1)
        if not found.feasible:
            continue
        total += 1
        result = simulate_choice(found.choices[0], demand, requests=8000, seed=99)
        kept += all(held_ms(o, result.ttft, result.tpot, result.e2e, 1.0) <= o.target_ms for o in wanted)

    assert kept >= 0.95 * total
