"""Argo CD's health check under real Lua (5.1, as Argo CD's), and the GitOps examples."""

import json

import yaml
from lupa.lua51 import LuaRuntime

from chart.rendering import CHART, ROOT
from servingtiers.api.status import Condition
from servingtiers.core.findings import Problem
from servingtiers.policy.conditions import ConditionInput, PoolProgress, compute

GITOPS = ROOT / "manifests/gitops"
LUA = (GITOPS / "argocd/health.lua").read_text()


def health(obj):
    """Return status and message of the check for an object; null is nil, as in Argo CD."""
    runtime = LuaRuntime()
    runtime.globals().obj = runtime.table_from(obj, recursive=True)
    found = runtime.execute(LUA)

    return found.status, found.message


def _tier(seen: ConditionInput | None = None, *, generation=2, **spec):
    """Return a tier with the conditions that the operator itself would write."""
    obj = {"metadata": {"generation": generation}, "spec": spec}
    if seen is not None:
        conditions = [c.model_dump(mode="json", by_alias=True) for c in compute(seen)]
        assert all(Condition.model_validate(condition) for condition in conditions)
        obj["status"] = {"observedGeneration": seen.generation, "conditions": conditions}
    return obj


def _seen(**changes):
    pool = PoolProgress("pool", desired=2, ready=2, updated=2)
    return ConditionInput(
        **{"generation": 2, "now": 0.0, "pools": (pool,), "routers_ready": 2, "routers_desired": 2} | changes
    )


def test_a_tier_that_can_serve_is_healthy():
    """Ready, says the operator."""
    assert health(_tier(_seen()))[0] == "Healthy"


def test_a_scale_up_under_way_is_no_failed_release():
    """Git did not change; the load did."""
    growing = PoolProgress("pool", desired=4, ready=2, updated=4)

    assert health(_tier(_seen(pools=(growing,))))[0] == "Healthy"


def test_a_tier_asleep_at_zero_is_healthy():
    """It takes the request that wakes it."""
    asleep = PoolProgress("pool", desired=0, ready=0, updated=0)

    assert health(_tier(_seen(pools=(asleep,))))[0] == "Healthy"


def test_a_tier_whose_first_engine_starts_is_progressing():
    """Loading a model takes minutes."""
    starting = PoolProgress("pool", desired=1, ready=0, updated=1)
    status, message = health(_tier(_seen(pools=(starting,))))

    assert status == "Progressing"
    assert "NoReplicaReady" in message


def test_a_tier_without_status_is_progressing():
    """The operator has not seen it."""
    assert health(_tier())[0] == "Progressing"


def test_an_old_verdict_does_not_count_for_a_new_spec():
    """The generation tells them apart."""
    assert health(_tier(_seen(), generation=3))[0] == "Progressing"


def test_a_spec_that_is_not_accepted_is_degraded_and_the_message_says_the_mend():
    """A person reads it in Argo CD."""
    problem = Problem(
        field="spec.pool.hardware", reason="UnknownAccelerator", message="use h100-sxm-80gb", blocking=True
    )
    status, message = health(_tier(_seen(problems=(problem,))))

    assert status == "Degraded"
    assert "use h100-sxm-80gb" in message


def test_a_rollout_that_is_stuck_is_degraded():
    """The deadline has passed."""
    stuck = PoolProgress(
        "pool",
        desired=1,
        ready=0,
        updated=1,
        progress_deadline_exceeded="deadline exceeded",
        failing="ImagePullBackOff",
    )

    assert health(_tier(_seen(pools=(stuck,))))[0] == "Degraded"


def test_a_name_taken_by_somebody_else_is_degraded():
    """Clients would reach the other's Service."""
    assert health(_tier(_seen(conflicts=("Service chat is not ours: rename it",))))[0] == "Degraded"


def test_a_suspended_tier_is_suspended():
    """Whatever its state."""
    assert health(_tier(_seen(), suspend=True))[0] == "Suspended"


def test_a_missed_objective_does_not_make_a_release_fail():
    """The SLO is watched by alerts; a spike of traffic is no bad commit."""
    obj = _tier(_seen())
    for condition in obj["status"]["conditions"]:
        if condition["type"] == "SLOMet":
            condition["status"] = "False"

    assert health(obj)[0] == "Healthy"


def test_argo_cds_patch_carries_the_very_check():
    """Generated from the same file, under the key that Argo CD reads."""
    patch = yaml.safe_load((GITOPS / "argocd/argocd-cm.yaml").read_text())

    assert patch["data"] == {"resource.customizations.health.servingtiers.io_ServingTier": LUA}


def test_the_examples_values_are_values_of_the_chart():
    """Flux's and Argo CD's examples install what the schema takes."""
    import jsonschema

    schema = json.loads((CHART / "values.schema.json").read_text())
    (release,) = (
        doc
        for doc in yaml.safe_load_all((GITOPS / "flux/operator.yaml").read_text())
        if doc["kind"] == "HelmRelease"
    )
    application = yaml.safe_load((GITOPS / "argocd/application.yaml").read_text())

    jsonschema.validate(release["spec"]["values"], schema)
    jsonschema.validate(application["spec"]["source"]["helm"]["valuesObject"], schema)


def test_flux_waits_for_tiers_by_the_conditions_that_the_operator_writes():
    """Expressions of a Kustomization's healthCheckExprs name real conditions."""
    (kustomization,) = yaml.safe_load_all((GITOPS / "flux/tiers.yaml").read_text())
    (check,) = kustomization["spec"]["healthCheckExprs"]
    written = {condition.type for condition in compute(_seen())}

    assert (check["apiVersion"], check["kind"]) == ("servingtiers.io/v1alpha1", "ServingTier")
    for expression in (check["current"], check["failed"]):
        named = {word.split("'")[1] for word in expression.split("e.type == ")[1:]}
        assert named
        assert named <= written
