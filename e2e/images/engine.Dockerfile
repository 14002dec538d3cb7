# vLLM for CPU without vLLM: the node's runtime class mounts the environment at /opt/vllm, as NVIDIA's runtime class
# mounts the driver. An image of 6 GB would otherwise be written three times before the first pod starts.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY sitecustomize.py /opt/start/sitecustomize.py
COPY --chmod=755 vllm /usr/local/bin/vllm
USER 2000:0
