"""What the API server cannot see is found here, and every message states the mend."""

# the names of the tests are the sentences

import pytest

from servingtiers.api.spec import ServingTier
from servingtiers.core.config import AcceleratorBinding, Images, OperatorConfig
from servingtiers.policy.presets import choose
from servingtiers.policy.problems import find

CONFIG = OperatorConfig(
    accelerators={key: AcceleratorBinding() for key in ("h100-sxm-80gb", "a100-sxm-80gb", "l4-24gb")}
)
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
LLAMA_70B = "meta-llama/Llama-3.1-70B-Instruct"


def tier(model: str | dict[str, object] = LLAMA_8B, **spec: object) -> ServingTier:
    return ServingTier.model_validate(
        {
            "apiVersion": "servingtiers.io/v1alpha1",
            "kind": "ServingTier",
            "metadata": {"name": "chat", "namespace": "llm"},
            "spec": {"tier": "Latency", "model": {"name": model} if isinstance(model, str) else model} | spec,
        }
    )


def pool(*, hardware: dict[str, object] | None = None, **engine: object) -> dict[str, object]:
    return {"hardware": hardware or {}, "engine": engine}


def hardware(*accelerators: str, parallel: int | None = None) -> dict[str, object]:
    return {"accelerators": list(accelerators)} | ({"tensorParallel": parallel} if parallel else {})


def split(
    prefill: dict[str, object] | None = None, decode: dict[str, object] | None = None
) -> dict[str, object]:
    return {"prefill": prefill or {}, "decode": decode or {}}


REMOTE = {"name": LLAMA_8B, "trustRemoteCode": True, "revision": "a" * 40}
LONG = {"promptTokens": {"mean": 9000}, "outputTokens": {"mean": 1000}}


@pytest.mark.parametrize(
    "fine",
    [
        tier(),
        tier(LLAMA_70B, pool=pool(hardware=hardware("h100-sxm-80gb", parallel=2))),
        tier(pool=pool(hardware=hardware("H100-SXM-80GB".lower()))),
        tier(disaggregation=split()),
        tier(pool=pool(extraArgs={"block-size": "32"}, env={"NCCL_DEBUG": "INFO"})),
        tier(pool=pool(image="vllm/vllm-openai:v0.33.1@sha256:" + "0" * 64)),
        tier(pool=pool(image="registry.example/vllm@sha256:" + "0" * 64, version="0.32.0")),
        tier(workload=LONG),
    ],
)
def test_a_tier_without_problems_can_be_planned(fine):
    assert find(fine, CONFIG) == ()
    assert choose(fine, CONFIG).pools


@pytest.mark.parametrize(
    ("wrong", "field", "reason", "said"),
    [
        (tier(pool=pool(hardware=hardware("h100-smx-80gb"))), "spec.pool.hardware.accelerators", "AcceleratorUnknown", "near names: h100-sxm-80gb"),
        (tier(pool=pool(hardware=hardware("b200-sxm-180gb"))), "spec.pool.hardware.accelerators", "AcceleratorNotBound", "use one of h100-sxm-80gb, a100-sxm-80gb, l4-24gb"),
        (tier(pool=pool(hardware=hardware("l4-24gb", parallel=3))), "spec.pool.hardware.tensorParallel", "TensorParallelImpossible", "use one of 1, 2, 4, 8"),
        (tier(pool=pool(hardware=hardware("l4-24gb", parallel=16))), "spec.pool.hardware.tensorParallel", "TensorParallelImpossible", "use 8 or fewer"),
        (tier(LLAMA_70B, pool=pool(hardware=hardware("h100-sxm-80gb", parallel=1))), "spec.pool.hardware.tensorParallel", "DoesNotFit", "it fits h100-sxm-80gb with tensorParallel 2"),
        (tier("meta-llama/Llama-3.1-405B"), "spec.pool.hardware.accelerators", "DoesNotFit", "quantize it"),
        (tier(pool=pool(maxModelLen=200_000)), "spec.pool.engine.maxModelLen", "TooLong", "131072"),
        (tier(pool=pool(maxModelLen=4096), workload=LONG), "spec.workload", "TooLong", "raise engine.maxModelLen"),
        (tier(pool=pool(maxNumSeqs=512, maxNumBatchedTokens=256)), "spec.pool.engine.maxNumBatchedTokens", "BudgetTooSmall", "lower maxNumSeqs"),
        (tier(pool=pool(extraArgs={"trust-remote-code": ""})), "spec.pool.engine", "NotAllowed", "set model.trustRemoteCode"),
        (tier(pool=pool(extraArgs={"tool-server": "x"})), "spec.pool.engine", "NotAllowed", "not on the allow-list"),
        (tier(pool=pool(env={"LD_PRELOAD": "/x.so"})), "spec.pool.engine", "NotAllowed", "not on the allow-list"),
        (tier(pool=pool(image="vllm/vllm-openai:latest")), "spec.pool.engine.version", "VersionUnknown", "set engine.version"),
        (tier(pool=pool(version="0.1.0")), "spec.pool.engine.version", "VersionUnsupported", "newer"),
        (tier(disaggregation=split(prefill=pool(version="0.29.2"))), "spec.disaggregation.prefill.engine.image", "VersionVulnerable", "0.30 or newer"),
        (tier(model=REMOTE), "spec.model.trustRemoteCode", "RemoteCodeNotPermitted", "remove trustRemoteCode"),
        (
            tier(LLAMA_70B, disaggregation=split(
                prefill=pool(hardware=hardware("a100-sxm-80gb")), decode=pool(hardware=hardware("h100-sxm-80gb", parallel=1), quantization="INT4")
            )),
            "spec.disaggregation.decode.hardware.tensorParallel", "TensorParallelImpossible", "raise it to 2",
        ),
    ],
)  # fmt: skip
def test_a_problem_names_field_and_mend(wrong, field, reason, said):
    found = [problem for problem in find(wrong, CONFIG) if problem.reason == reason]
    assert [problem.field for problem in found][:1] == [field], find(wrong, CONFIG)
    assert said in found[0].message
    assert found[0].blocking
    assert "\n" not in found[0].message


def test_an_unknown_model_is_accepted_and_its_feasibility_open():
    (problem,) = find(tier("meta-llama/Llama-3.1-8B-Insruct"), CONFIG)
    assert not problem.blocking
    assert problem.reason == "ModelUnknown"
    assert "meta-llama/Llama-3.1-8B" in problem.message
    assert choose(tier("some/new-model"), CONFIG).pools[0].max_model_len is None


def test_nothing_bound_is_the_administrators_to_mend():
    (problem,) = find(tier(), OperatorConfig())
    assert problem.reason == "NoAcceleratorBound"
    assert "operator's configuration" in problem.message


def test_remote_code_runs_where_the_administrator_lets_it():
    assert find(tier(model=REMOTE), CONFIG.model_copy(update={"allow_remote_code": True})) == ()


def test_an_operators_default_image_without_a_version_is_found():
    config = CONFIG.model_copy(update={"images": Images(engine="registry.example/vllm@sha256:" + "0" * 64)})
    assert [problem.reason for problem in find(tier(), config)] == ["VersionUnknown"]


def test_both_phases_are_checked():
    found = find(
        tier(disaggregation=split(pool(hardware=hardware("x1")), pool(hardware=hardware("x2")))), CONFIG
    )
    assert [problem.field for problem in found] == [
        "spec.disaggregation.prefill.hardware.accelerators",
        "spec.disaggregation.decode.hardware.accelerators",
    ]


def test_what_the_api_takes_and_this_version_does_not_do_is_said():
    """A field that is silently ignored is a lie."""
    raw = {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": "chat"},
        "spec": {
            "tier": "Latency",
            "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"},
            "disaggregation": {
                "prefill": {"hardware": {"accelerators": ["h100-sxm-80gb"]}},
                "decode": {"hardware": {"accelerators": ["h100-sxm-80gb"]}},
                "elasticRoles": True,
            },
        },
    }
    config = OperatorConfig.model_validate({"accelerators": {"h100-sxm-80gb": {}}})

    (found,) = find(ServingTier.model_validate(raw), config)

    assert (found.field, found.blocking) == ("spec.disaggregation.elasticRoles", False)
