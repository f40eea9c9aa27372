# Image for NVIDIA GPUs: docker build -t cifar_dist .
# The wheels of torch contain the CUDA libraries, so a CUDA base image without them is enough.
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE}

# tini forwards signals, so that `docker stop` lets a training save a checkpoint. Versions of Ubuntu
# packages are not pinned, to get security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git python3 python3-venv tini \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 trainer
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 NO_ALBUMENTATIONS_UPDATE=1

# Dependencies first, for the layer cache: they rarely change and take several GB.
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY cifar_dist/__init__.py cifar_dist/
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -c constraints.txt -e '.[export]'

COPY . .
RUN mkdir -p data runs && chown -R trainer data runs
USER 10001
VOLUME ["/app/data", "/app/runs"]
ENTRYPOINT ["tini", "-g", "--"]
CMD ["python", "-m", "cifar_dist.train", "--help"]
