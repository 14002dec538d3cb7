"""The shells around the core: the cluster, Prometheus, engine and router pods."""
