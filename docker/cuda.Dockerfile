# For NVIDIA GPUs; torch's wheels bring CUDA's libraries, the base what the driver needs.
#
#   docker build -f docker/cuda.Dockerfile -t xfuser-fastcache:cuda .
#   docker run --rm --gpus all --ipc host -v "$HOME/.cache/huggingface:/models" \
#       xfuser-fastcache:cuda doctor
#
# On several GPUs: docker run ... --entrypoint torchrun xfuser-fastcache:cuda \
#     --nproc_per_node 4 -m xfuser_fastcache.cli generate ...
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}

ENV HF_HOME=/models PATH=/opt/venv/bin:$PATH
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
WORKDIR /src
COPY setup.py pyproject.toml README.md LICENSE ./
COPY xfuser_fastcache xfuser_fastcache
COPY diffusers_adapters diffusers_adapters
# What it needs is bounded in setup.py.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[serve]" && useradd --create-home --uid 1001 fastcache
USER 1001
WORKDIR /home/fastcache
ENTRYPOINT ["fastcache"]
CMD ["--help"]
