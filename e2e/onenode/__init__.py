"""A whole Kubernetes cluster of one node from package registries alone.

No Docker and no image registry: etcd, the control plane, kubelet, containerd, kube-proxy and CoreDNS run as plain
processes inside a network namespace of their own, and images are put together from Debian packages. Needs root on
Debian or a relative of it, and Go. ``python -m onenode up`` starts it, ``python -m onenode down`` removes all of it.
"""
