# SPDX-License-Identifier: Apache-2.0
# The server and the batch steps. From the repository's root:
#   docker build -t recsys:cpu .                       TORCH_INDEX=URL for the small CPU build of torch, as in the Makefile
#   docker build -t recsys:gpu --build-arg DEVICE=gpu .
# It holds no secret and no data: addresses and keys come from the environment, bundles from the registry.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG DEVICE=cpu
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/recsys
WORKDIR /src
# What changes seldom first, so that its layer is kept: everything but the project itself.
COPY vendor/ vendor/
COPY requirements/ requirements/
COPY pyproject.toml README.md ./
# Without its packages the project installs as an empty one, with all that it asks for.
RUN /opt/recsys/bin/pip install -c requirements/constraints-${DEVICE}.txt ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} \
        $(test ${DEVICE} = gpu || echo ./vendor/fbgemm-gpu) ".[${DEVICE},text,postgres,s3]"
COPY recsys/ recsys/
COPY kernels/ kernels/
COPY feature_store/ feature_store/
COPY pipelines/ pipelines/
COPY serving/ serving/
RUN /opt/recsys/bin/pip install --no-deps --force-reinstall . && /opt/recsys/bin/pip check

FROM python:${PYTHON}-slim-bookworm
# A compiler: loops in C++ and compiled rankers are built for the processor of the host that runs them.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/recsys --shell /usr/sbin/nologin recsys \
    && install --directory --owner recsys --group recsys /var/lib/recsys
COPY --from=build /opt/recsys /opt/recsys
ENV PATH=/opt/recsys/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RECSYS_HOME=/var/lib/recsys \
    XDG_CACHE_HOME=/var/lib/recsys/cache/host \
    RECSYS_SERVE_HOST=0.0.0.0 \
    RECSYS_SERVE_PORT=8000
USER 10001:10001
WORKDIR /var/lib/recsys
VOLUME /var/lib/recsys
EXPOSE 8000
STOPSIGNAL SIGTERM
# Docker has one probe; a restart helps against what /livez reports and nothing else.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
# The server refuses to listen to other machines unless it knows who may ask: --access FILE, see docs/serving.md.
CMD ["recsys", "serve"]
