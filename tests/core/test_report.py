"""What a status says of a reading."""

from types import SimpleNamespace

from servingtiers.core.decisions import PoolRole
from servingtiers.core.signals import Coverage, Load, Unknown, Value
from servingtiers.report import _throughput


def seen(load: Load) -> SimpleNamespace:
    pool = SimpleNamespace(name="pool", role=PoolRole.AGGREGATED)
    return SimpleNamespace(pools=[pool], load=SimpleNamespace(pools={"pool": load}))


def test_rates_that_are_all_unknown_are_left_out_and_not_an_empty_object():
    """Server-side apply makes null of an object whose last fields go, and the API server refuses that status."""
    gone = Unknown("no engine answered")
    unknown = Load(60.0, Coverage(0, 1), request_rate=gone, prompt_token_rate=gone, output_token_rate=gone)
    assert _throughput(seen(unknown)) is None
    one = Load(60.0, Coverage(1, 1), request_rate=Value(2.0), prompt_token_rate=gone, output_token_rate=gone)
    status = _throughput(seen(one))
    assert status is not None
    assert status.model_dump(exclude_none=True) == {"requestsPerSecond": "2"}
