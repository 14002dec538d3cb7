"""ServingTiers: latency, balanced and throughput tiers of vLLM on Kubernetes, sized by their SLOs."""

__version__ = "0.1.0"
