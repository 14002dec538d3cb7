# vLLM for CPU, whole: for clusters whose runtime does not mount it. About 6 GB, most of it CUDA libraries that the
# PyTorch of the package index needs to be imported.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}
RUN apt-get update -q && apt-get install -y -q --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*
COPY onenode/requirements/engine.txt /tmp/engine.txt
RUN python3 -m pip install --no-cache-dir --no-deps --require-hashes --target /opt/vllm/lib/python3.11/site-packages \
      -r /tmp/engine.txt
COPY images/fit_engine.py /tmp/fit_engine.py
RUN python3 /tmp/fit_engine.py /opt/vllm/lib/python3.11/site-packages
COPY images/sitecustomize.py /opt/start/sitecustomize.py
COPY --chmod=755 images/vllm /usr/local/bin/vllm
USER 2000:0
