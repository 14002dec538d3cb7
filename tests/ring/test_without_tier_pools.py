# the names of the tests are the sentences
"""An operator in a cluster that lacks the CRD of TierPools, as one is where only the tiers' was applied."""

import asyncio
import logging

import pytest

from ring.harness import Namespace, eventually, install_crd, operator, tier
from servingtiers.lab.binaries import BinariesError
from servingtiers.lab.controlplane import ControlPlane

pytestmark = [pytest.mark.ring, pytest.mark.long(10)]

_CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/tierpools.servingtiers.io"


def _sharing():
    body = tier(
        "sharing",
        model={"name": "meta-llama/Llama-3.1-8B-Instruct", "revision": "main", "servedName": "llama"},
        sharedPool={"name": "shared", "priority": 100},
    )
    body["spec"]["pool"]["hardware"]["tensorParallel"] = 1
    body["spec"]["pool"]["engine"] = {"image": "vllm/vllm-openai:v0.32.0", "maxModelLen": 8192}
    return body


@pytest.fixture
def plane(control_plane):
    """A control plane of the test's own: the CRD is missing for everybody."""
    del control_plane  # skips where there are no programs for one
    try:
        with ControlPlane() as own:
            install_crd(own)
            own.connection().request("DELETE", _CRD)
            yield own
    except BinariesError as error:
        pytest.skip(str(error))


def test_without_the_crd_of_tier_pools_tiers_serve_and_the_log_and_a_condition_say_what_is_missing(
    plane, caplog
):
    caplog.set_level(logging.WARNING)
    namespace = plane.create_namespace("lacking")
    cluster = Namespace(plane.connection(), namespace)
    cluster.create(tier("chat"))
    cluster.create(_sharing())

    async def scenario():
        async with operator(plane, namespace) as running:
            await eventually(
                lambda: {"Deployment/chat-pool", "Deployment/sharing-pool"} <= cluster.children().keys(),
                seconds=60,
                what="engines of both tiers",
            )
            await eventually(lambda: cluster.condition("Accepted"), what="a status")
            told = await eventually(
                lambda: [
                    each["message"]
                    for each in cluster.get("sharing").get("status", {}).get("conditions", [])
                    if "TierPool" in each["message"]
                ],
                what="a condition that names the TierPool",
            )
            # What is watched by then does not end it either.
            await asyncio.sleep(3)
            assert not running.done()
            return told

    told = asyncio.run(scenario())
    assert any("shared" in message for message in told)
    lines = [
        record.getMessage() for record in caplog.records if "tierpools.servingtiers.io" in record.getMessage()
    ]
    assert len([line for line in lines if "not installed" in line]) == 1, lines
