# the names of the tests are the sentences
"""Which tiers of a TierPool take part in lending."""

import copy

import pytest

from servingtiers.api.pool import TierPool
from servingtiers.api.spec import ServingTier
from servingtiers.policy.membership import judge

POOL = TierPool.read(
    {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "TierPool",
        "metadata": {"name": "llama", "namespace": "llm"},
        "spec": {"servedModelName": "llama"},
    }
)
SPEC = {
    "tier": "Latency",
    "model": {"name": "meta-llama/Llama-3.1-8B-Instruct", "revision": "main", "servedName": "llama"},
    "pool": {
        "hardware": {"accelerators": ["h100-sxm-80gb"], "tensorParallel": 1},
        "engine": {"image": "vllm/vllm-openai:v0.32.0", "maxModelLen": 8192},
    },
    "sharedPool": {"name": "llama"},
}


def tier(name: str, *path: str, value: object = None, priority: int = 100) -> ServingTier:
    spec = copy.deepcopy(SPEC)
    spec["sharedPool"]["priority"] = priority
    node = spec
    for part in path[:-1]:
        node = node[part]
    if path:
        node[path[-1]] = value
    return ServingTier.read(
        {
            "apiVersion": "servingtiers.io/v1alpha1",
            "kind": "ServingTier",
            "metadata": {"name": name, "namespace": "llm"},
            "spec": spec,
        }
    )


def test_members_that_agree_take_part_whatever_their_batch_and_their_tier():
    small = tier("a", "pool", "engine", "maxNumSeqs", value=4)
    assert judge(POOL, [small, tier("b", "tier", value="Throughput")]) == {}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("model", "revision"), "other", "model.revision is other here and main in a"),
        (("model", "name"), "Qwen/Qwen3-8B", "model.name"),
        (("model", "source"), {"persistentVolumeClaim": {"claimName": "models"}}, "claim models"),
        (("pool", "hardware", "accelerators"), ["a100-sxm-80gb"], "accelerators is a100-sxm-80gb here"),
        (("pool", "hardware", "tensorParallel"), 2, "tensorParallel is 2 here and 1 in a"),
        (("pool", "engine", "image"), "vllm/vllm-openai:v0.33.0", "v0.33.0 here and"),
        (("pool", "engine", "maxModelLen"), 4096, "maxModelLen is 4096"),
        (("pool", "engine", "quantization"), "FP8", "quantization is FP8 here and None in a"),
        (("pool", "engine", "kvCacheDtype"), "FP8", "kvCacheDtype is FP8 here and Auto in a"),
    ],
)
def test_one_that_differs_is_left_out_and_told_where(path, value, named):
    found = judge(POOL, [tier("a"), tier("b"), tier("odd", *path, value=value, priority=900)])
    assert list(found) == ["odd"], "the majority has it, whatever the priority"
    problem = found["odd"]
    assert named in problem.message
    assert problem.message.endswith("Make them equal, or remove sharedPool")
    assert (problem.blocking, problem.reason) == (False, "MembersDisagree"), "what serves goes on"


def test_between_two_that_differ_the_more_important_one_is_right():
    found = judge(POOL, [tier("a"), tier("b", "model", "revision", value="other", priority=200)])
    assert list(found) == ["a"]


def test_engines_must_answer_to_the_pools_name_already():
    found = judge(POOL, [tier("a"), tier("b", "model", "servedName", value=None)])
    assert found["b"].reason == "ServedNameDiffers"
    assert "set model.servedName to that" in found["b"].message


def test_without_the_pool_nobody_takes_part_and_the_mend_is_said():
    found = judge(None, [tier("a")])
    assert found["a"].reason == "TierPoolMissing"
    assert "create it with servedModelName llama" in found["a"].message
