# Tombola for NVIDIA GPUs, and for CPUs: torch's wheels bring CUDA's libraries, the base its loader.
#
#   docker build -t tombola .
#   docker run --gpus all --shm-size 8g -v /datasets:/datasets:ro -v "$PWD/runs:/runs" tombola \
#     run launch/configs/digits-imp.toml --root /runs
#
# Pin the base by its digest where builds must repeat: --build-arg BASE=nvidia/cuda@sha256:...
# Any Debian or Ubuntu with Python 3.11 or newer will do; docs/containers.md says more.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE} AS build
# The base's release says which versions apt installs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/tombola
ENV PATH=/opt/tombola/bin:$PATH
WORKDIR /src
# What comes from the network is named in pyproject.toml alone: changed code reuses this layer.
COPY pyproject.toml ./
RUN python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
print(*project['dependencies'], *(one for extra in ('dali', 'tensorboard', 's3', 'gs') \
for one in extras[extra]), sep='\n')" > requirements.txt \
 && pip install --no-cache-dir --requirement requirements.txt
COPY README.md LICENSE ./
COPY data data
COPY train train
COPY pruning pruning
COPY launch launch
RUN pip install --no-cache-dir --no-deps .

FROM ${BASE}
ARG VERSION=unknown
LABEL org.opencontainers.image.title="tombola" \
      org.opencontainers.image.description="Finds, transforms and ships lottery tickets" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# torch.compile needs a C++ compiler and Python's headers. A user of group 0, with what is its own
# writable for the group: clusters give containers any user, of that group.
# The base's release says which versions apt installs.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3 python3-dev \
 && rm -rf /var/lib/apt/lists/* \
 && (userdel --remove ubuntu 2>/dev/null || true) \
 && useradd --create-home --uid 1000 --gid 0 tombola \
 && mkdir /runs \
 && chown 1000:0 /runs \
 && chmod g=u /runs /home/tombola
COPY --from=build /opt/tombola /opt/tombola
COPY launch/configs /home/tombola/launch/configs
ENV PATH=/opt/tombola/bin:$PATH \
    HOME=/home/tombola \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/tombola
STOPSIGNAL SIGTERM
# Whether everything that a run needs can be loaded; rarely, since that takes seconds of a core.
HEALTHCHECK --interval=10m --timeout=2m CMD ["python", "-c", "import launch.run"]
ENTRYPOINT ["tombola"]
CMD ["--help"]
