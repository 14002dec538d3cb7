"""How what was decided is written for Kubernetes and vLLM: names, command lines, pods, policies. Pure."""

from servingtiers.render.engine import engine_args, pod_template
from servingtiers.render.router import router_args, router_template
from servingtiers.render.tier import ROUTER_POOL, tier_objects

__all__ = [
    "ROUTER_POOL",
    "engine_args",
    "pod_template",
    "router_args",
    "router_template",
    "tier_objects",
]
