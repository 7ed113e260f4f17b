# preftune in a container, as a user that is not root:
#   docker build --target cpu -t preftune:cpu .        docker build --target cuda -t preftune:cuda .
#   docker run --rm -v "$PWD:/work" -v preftune-cache:/cache preftune:cpu run smoke
#   docker run --rm --gpus all -v "$PWD:/work" -v preftune-cache:/cache preftune:cuda run my.yaml
# Recipes and runs lie in /work, downloaded bases in /cache. Extras: --build-arg EXTRAS="quantization benchmarks".
# docs/install.md has the sizes.
# One layer each for torch, for what else it needs and for preftune itself:
# hadolint global ignore=DL3059

# the Python that the tests run with
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1

FROM base AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheel .

# What it needs, apart from itself: a change of code alone leaves the large layers as they are.
FROM base AS needs
ARG EXTRAS=""
WORKDIR /needs
COPY pyproject.toml constraints.txt ./
RUN python -c "import sys, tomllib; said = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = [said['optional-dependencies'][name] for name in sys.argv[1:]]; \
    print(*said['dependencies'], *sum(extras, []), sep='\n')" ${EXTRAS} > needs.txt

FROM base AS runtime
# A compiler, for the kernels of bf16 decoding on a CPU and for Triton on a GPU.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# Anybody may be the user (docker run --user): both folders are writable to all, as /tmp is.
RUN useradd --uid 1000 --no-create-home preftune && install --directory --mode 1777 /work /cache
ENV HOME=/cache PREFTUNE_CACHE=/cache/preftune HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1

FROM runtime AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,from=needs,source=/needs,target=/needs \
    pip install --index-url ${TORCH_INDEX} --constraint /needs/constraints.txt torch
RUN --mount=type=bind,from=needs,source=/needs,target=/needs \
    pip install --constraint /needs/constraints.txt --requirement /needs/needs.txt
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-deps /wheel/*.whl
USER 1000
WORKDIR /work
ENTRYPOINT ["preftune"]
CMD ["--help"]

# The package index's own torch brings CUDA's libraries; the host has the driver and NVIDIA's container toolkit.
FROM runtime AS cuda
RUN --mount=type=bind,from=needs,source=/needs,target=/needs \
    pip install --constraint /needs/constraints.txt torch
RUN --mount=type=bind,from=needs,source=/needs,target=/needs \
    pip install --constraint /needs/constraints.txt --requirement /needs/needs.txt
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-deps /wheel/*.whl
USER 1000
WORKDIR /work
ENTRYPOINT ["preftune"]
CMD ["--help"]
