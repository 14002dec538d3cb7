# vllm-router from the package index.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}
RUN python3 -m pip install --no-cache-dir --target /opt/router vllm-router==0.1.17
COPY --chmod=755 images/vllm-router /usr/local/bin/vllm-router
USER 2000:0
