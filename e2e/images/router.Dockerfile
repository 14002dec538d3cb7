# vllm-router as its package on the index has it.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY site-packages /opt/router
RUN python3 -m compileall -q /opt/router
COPY --chmod=755 vllm-router /usr/local/bin/vllm-router
USER 2000:0
