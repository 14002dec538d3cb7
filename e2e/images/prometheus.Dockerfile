ARG BASE_IMAGE
FROM ${BASE_IMAGE}
COPY prometheus /usr/local/bin/prometheus
USER 65534:65534
ENTRYPOINT ["/usr/local/bin/prometheus"]
