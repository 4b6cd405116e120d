# Two images of the service, neither with torch, and one of the load generator. The last stage is the default.
#   docker build -t wikiclip-serve:cpu .
#   docker build -t wikiclip-serve:gpu --target gpu .
# Run with a bundle mounted at /bundle; every setting is an environment variable WIKICLIP_*.

# ---- GPU: the extra brings CUDA 12's libraries and cuDNN 9, so the base needs no more than what finds the driver ----
FROM nvidia/cuda:12.6.3-base-ubuntu24.04 AS gpu-python
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM gpu-python AS gpu-build
WORKDIR /src
RUN python3 -m venv /opt/wikiclip
COPY . .
RUN /opt/wikiclip/bin/pip install --no-cache-dir --constraint requirements.lock '.[gpu,live,otel,s3]'

FROM gpu-python AS gpu
COPY --from=gpu-build /opt/wikiclip /opt/wikiclip
# /cache keeps bundles that are given by URI; mount a volume there, since all else is read-only.
RUN useradd --system --uid 10001 --no-create-home wikiclip \
    && install -d -o wikiclip /cache
USER 10001
ENV PATH=/opt/wikiclip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    WIKICLIP_BUNDLE=/bundle \
    WIKICLIP_BUNDLE_CACHE=/cache \
    WIKICLIP_HOST=0.0.0.0 \
    WIKICLIP_PORT=8000 \
    WIKICLIP_DEVICE=cuda
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['WIKICLIP_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["wikiclip"]
CMD ["serve"]

# ---- CPU: what it runs on is locked by hash; only the build backend, which stays out of the image, is not ----
FROM python:3.11-slim-bookworm AS cpu-build
WORKDIR /src
RUN python3 -m venv /opt/wikiclip
COPY requirements-serving.lock ./
RUN /opt/wikiclip/bin/pip install --no-cache-dir --require-hashes --requirement requirements-serving.lock
COPY . .
RUN /opt/wikiclip/bin/pip install --no-cache-dir --no-deps . \
    && /opt/wikiclip/bin/pip check

# ---- Locust with this repository's users, to put load on a service; no part of the serving image ----
FROM cpu-build AS load
COPY requirements.lock ./
RUN /opt/wikiclip/bin/pip install --no-cache-dir --constraint requirements.lock '.[load]' \
    && useradd --system --uid 10001 --no-create-home wikiclip
USER 10001
ENV PATH=/opt/wikiclip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["locust", "--locustfile", "benchmarks/locustfile.py"]
CMD ["--help"]

# ---- The CPU image with Milvus's client, which is as large as half the rest ----
FROM cpu-build AS milvus-build
COPY requirements.lock ./
RUN /opt/wikiclip/bin/pip install --no-cache-dir --constraint requirements.lock '.[milvus]'

FROM python:3.11-slim-bookworm AS milvus
COPY --from=milvus-build /opt/wikiclip /opt/wikiclip
# /cache keeps bundles that are given by URI; mount a volume there, since all else is read-only.
RUN useradd --system --uid 10001 --no-create-home wikiclip \
    && install -d -o wikiclip /cache
USER 10001
ENV PATH=/opt/wikiclip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    WIKICLIP_BUNDLE=/bundle \
    WIKICLIP_BUNDLE_CACHE=/cache \
    WIKICLIP_HOST=0.0.0.0 \
    WIKICLIP_PORT=8000 \
    WIKICLIP_DEVICE=cpu
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['WIKICLIP_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["wikiclip"]
CMD ["serve"]

# ---- CPU, the image itself ----
FROM python:3.11-slim-bookworm AS cpu
COPY --from=cpu-build /opt/wikiclip /opt/wikiclip
# /cache keeps bundles that are given by URI; mount a volume there, since all else is read-only.
RUN useradd --system --uid 10001 --no-create-home wikiclip \
    && install -d -o wikiclip /cache
USER 10001
ENV PATH=/opt/wikiclip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    WIKICLIP_BUNDLE=/bundle \
    WIKICLIP_BUNDLE_CACHE=/cache \
    WIKICLIP_HOST=0.0.0.0 \
    WIKICLIP_PORT=8000 \
    WIKICLIP_DEVICE=cpu
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['WIKICLIP_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["wikiclip"]
CMD ["serve"]
