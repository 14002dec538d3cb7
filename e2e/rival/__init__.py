"""The operator beside KEDA with the Kubernetes HPA: the same load on the same engines, scaled once by each."""
