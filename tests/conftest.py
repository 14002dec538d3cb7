"""Fixtures of the API-server ring: a real control plane, one for the whole session, a namespace for each test."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from properties import SEARCHING, examples
from servingtiers.lab.binaries import BinariesError
from servingtiers.lab.controlplane import Connection, ControlPlane, shared_control_plane

# The suite gives the same verdict on the same tree; `make test-properties` searches at random for new examples.
# How long it takes to draw and to try them says how busy the machine is.
_busy: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **_busy)
settings.register_profile("search", max_examples=examples(100), **_busy)
settings.load_profile("search" if SEARCHING else "same")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Of a background job, as shells start it: children would ignore it, too, and some tests send it to them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest: what begins last ends last, while the other processes have nothing left to do.

    Groups of pytest-xdist begin before all else, the largest first.
    """

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("long")
        return marker.args[0] if marker else 0.0

    items.sort(key=seconds, reverse=True)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The session's control plane, with an audit log; the processes of a pytest-xdist run share one.

    A test that restarts or breaks it starts its own `ControlPlane` instead. Where its programs cannot be had the
    tests are skipped, unless SERVINGTIERS_REQUIRE_RING is set.
    """
    try:
        if "PYTEST_XDIST_WORKER" in os.environ:
            with shared_control_plane(tmp_path_factory.getbasetemp().parent / "ring") as plane:
                yield plane
        else:
            with ControlPlane(audit=True) as plane:
                yield plane
    except BinariesError as error:
        if os.environ.get("SERVINGTIERS_REQUIRE_RING"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def connection(control_plane: ControlPlane) -> Connection:
    """The ring's API server as administrator."""
    return control_plane.connection()


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace of the test's own, deleted afterwards."""
    name = control_plane.create_namespace(f"test-{uuid.uuid4().hex[:8]}")
    yield name
    control_plane.connection().request("DELETE", f"/api/v1/namespaces/{name}")
