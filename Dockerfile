# leap_pl on one GPU:
#   docker build -t leap_pl .
#   docker run --gpus all --ipc host -e HF_TOKEN -v ~/.cache:/root/.cache -v $PWD:/work leap_pl fit --config cfg.yaml
# ~/.cache keeps models of the hub and priors from one run to the next; HF_TOKEN is for gated models.
FROM python:3.11-slim

# torch.compile and the kernels of packed models are compiled on first use.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY leap_pl leap_pl
# The wheel of torch on PyPI brings its own CUDA and Triton.
RUN pip install --no-cache-dir . && rm -rf /src

WORKDIR /work
ENTRYPOINT ["leap_pl"]
CMD ["--help"]
