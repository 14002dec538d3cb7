# An engine that dies on its first request.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY sitecustomize.py /opt/start/sitecustomize.py
COPY --chmod=755 vllm-dies /usr/local/bin/vllm
USER 2000:0
