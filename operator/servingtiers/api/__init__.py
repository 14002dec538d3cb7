"""The API: ``ServingTier`` (servingtiers.io/v1alpha1) as frozen pydantic models, and the CRD made from them.

These models are the one source of truth: the CRD in ``crds/``, the chart's copy and the reference page of the
docs are generated from them.
"""

from servingtiers.api.base import API_VERSION, GROUP, KIND, PLURAL, POOL_KIND, POOL_PLURAL, VERSION
from servingtiers.api.pool import TierPool
from servingtiers.api.spec import ServingTier, ServingTierSpec, Tier
from servingtiers.api.status import ServingTierStatus

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "PLURAL",
    "POOL_KIND",
    "POOL_PLURAL",
    "VERSION",
    "ServingTier",
    "ServingTierSpec",
    "ServingTierStatus",
    "Tier",
    "TierPool",
]
