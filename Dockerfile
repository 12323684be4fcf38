# dairllm in a container: a worker, or a root that serves. One image for both; what it does is the command's word.
#
#   docker build -t dairllm .
#   docker run --read-only --tmpfs /tmp -p 9990:9990 dairllm worker
#   docker run --read-only --tmpfs /tmp -v /srv/models:/models:ro -p 127.0.0.1:8000:8000 \
#       -e DAIRLLM_SERVER__HOST=0.0.0.0 dairllm serve --model /models/some-model.m
#
# docker-compose.yml starts a root and two workers.

ARG PYTHON=3.13-slim-bookworm

# Every dependency comes as a wheel, so neither stage needs a compiler or Debian's packages.
FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PIP_ROOT_USER_ACTION=ignore
# The environment has no pip of its own: what runs needs none.
RUN python -m venv --without-pip /opt/dairllm
WORKDIR /src
# Dependencies first, with as much of the package as says its version: this layer stays until pyproject.toml changes.
COPY pyproject.toml README.md LICENSE ./
COPY dairllm/__init__.py dairllm/__init__.py
RUN pip --python /opt/dairllm/bin/python install .
COPY dairllm dairllm
# The kernels of every kind of x86 processor, a minute: a start compiles nothing, which would take 235 MiB of its memory. None for ARM.
RUN pip --python /opt/dairllm/bin/python install --no-deps --force-reinstall . \
 && /opt/dairllm/bin/dairllm kernels --compile --form all --to /opt/dairllm/share/dairllm/kernels

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="dairllm" \
      org.opencontainers.image.description="Runs a language model shared out to ordinary computers: a worker, or a root that serves"
# A fixed id, so that a volume and the files of a mounted folder can be made readable for it.
RUN groupadd --gid 10001 dairllm \
 && useradd --uid 10001 --gid dairllm --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin dairllm \
 && install --directory --owner=dairllm --group=dairllm --mode=0700 /var/cache/dairllm
COPY --from=build /opt/dairllm /opt/dairllm
# On ARM kernels are compiled at the start and kept in /var/cache/dairllm. With a volume there they are compiled once; with a read-only root
# file system and no volume, at each start.
ENV PATH=/opt/dairllm/bin:$PATH XDG_CACHE_HOME=/var/cache
USER 10001:10001
# Roots and other workers; health and metrics of a worker; requests, health and metrics of a root.
EXPOSE 9990 10990 8000
# Asks the worker's health port, and the server's where there is no worker. A root waits for its workers, and kernels on ARM are compiled.
HEALTHCHECK --interval=30s --timeout=5s --start-period=3m --retries=3 CMD ["dairllm", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["dairllm"]
CMD ["--help"]
