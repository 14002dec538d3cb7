"""The API: ``ServingTier`` (servingtiers.io/v1alpha1) as frozen pydantic models, and the CRD made from them.

These models are the one source of truth: the CRD in ``crds/``, the chart's copy and the reference page of the
docs are generated from them.
"""

from servingtiers.api.spec import ServingTier, ServingTierSpec, Tier
from servingtiers.api.status import ServingTierStatus

GROUP = "servingtiers.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "ServingTier"
PLURAL = "servingtiers"

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "PLURAL",
    "VERSION",
    "ServingTier",
    "ServingTierSpec",
    "ServingTierStatus",
    "Tier",
]
