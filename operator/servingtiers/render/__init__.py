"""How it is written for Kubernetes: names, engine arguments, pods, pools, router. Pure."""
