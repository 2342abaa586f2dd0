# For trying out and for tests: no GPU.
#
#   docker build -f docker/cpu.Dockerfile -t xfuser-fastcache:cpu .
#   docker run --rm xfuser-fastcache:cpu doctor
FROM python:3.11-slim

ENV HF_HOME=/models XFUSER_FASTCACHE_CPU=1
WORKDIR /src
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
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
