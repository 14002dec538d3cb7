# The operator's image. Any image with Python 3.11 or newer, pip and venv will do as base; for a release give it by digest:
#   docker build --build-arg BASE_IMAGE=python:3.13-slim@sha256:… --tag servingtiers/operator:0.1.0 .
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python3 -m venv /opt/build && python3 -m venv --without-pip /opt/servingtiers
# Dependencies first: they change less often than the code. Locked by hash, without the simulator and the reports.
COPY requirements/operator.txt requirements/build.txt requirements/
RUN /opt/build/bin/pip install --require-hashes -r requirements/build.txt \
 && /opt/build/bin/pip --python /opt/servingtiers/bin/python install --require-hashes --only-binary :all: \
      -r requirements/operator.txt
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && /opt/build/bin/pip --python /opt/servingtiers/bin/python install --no-deps /dist/*.whl \
 && /opt/servingtiers/bin/servingtiers --version

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="ServingTiers operator" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/servingtiers /opt/servingtiers
# The root is read-only where it runs: bytecode was made above, and nothing is written but to /tmp.
ENV PATH=/opt/servingtiers/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["servingtiers"]
CMD ["operator"]
