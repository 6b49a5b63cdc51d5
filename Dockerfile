# Tombola for NVIDIA GPUs (with the NVIDIA container toolkit) and for CPUs: torch's wheels bring
# CUDA along. Build:  docker build -t tombola .
# Run:    docker run --gpus all --shm-size 8g -v /datasets:/datasets:ro -v "$PWD/runs:/runs" \
#           tombola run launch/configs/digits-imp.toml --root /runs
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY data data
COPY train train
COPY pruning pruning
COPY launch launch
RUN python -m venv /opt/tombola \
 && /opt/tombola/bin/pip install --no-cache-dir ".[dali,tensorboard]"

FROM ${BASE}
LABEL org.opencontainers.image.title="tombola" \
      org.opencontainers.image.licenses="Apache-2.0"
# torch.compile needs a C++ compiler.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 tombola
COPY --from=build /opt/tombola /opt/tombola
COPY launch/configs /home/tombola/launch/configs
ENV PATH=/opt/tombola/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
USER tombola
WORKDIR /home/tombola
ENTRYPOINT ["tombola"]
CMD ["--help"]
