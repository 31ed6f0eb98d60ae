# One file for CPU and GPU. It was not built where it was written, which has no Docker: tests/test_install.py reads it.
#
#   docker build -t dfer .                                        # CUDA 12 and CPU; about 10 GB
#   docker build -t dfer --build-arg TORCH=https://download.pytorch.org/whl/cpu .   # CPU only
#   docker run --rm --gpus all --shm-size=8g -v "$PWD":/work dfer train --data.train-list train.txt --data.val-list test.txt
#   docker run --rm dfer                                          # the doctor: what it finds there
#
# A folder of the host that it writes to has to be writable for UID: --build-arg UID=$(id -u).
FROM python:3.12.11-slim-bookworm

# NVDEC is of the host's driver; by default a container gets only what computes.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video PYTHONUNBUFFERED=1

# A compiler, for --run.compile alone.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /src
ARG TORCH=https://pypi.org/simple
COPY requirements.txt ./
RUN grep -E '^torch(vision)?==' requirements.txt > torch.txt \
    && pip install --no-cache-dir --index-url "$TORCH" -r torch.txt \
    && pip install --no-cache-dir -r requirements.txt

COPY pyproject.toml README.md LICENSE train.py ./
COPY dfer dfer
COPY dali_pipes dali_pipes
COPY scripts scripts
RUN pip install --no-cache-dir --no-deps .

ARG UID=1000
RUN useradd --create-home --uid "$UID" dfer
USER dfer
WORKDIR /work
ENTRYPOINT ["dfer"]
CMD ["doctor"]
