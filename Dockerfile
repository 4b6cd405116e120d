# Images of the service and of its load generator, all without torch. The last target, cpu, is the default.
#   docker build -t wikiclip-serve:cpu .
#   docker build -t wikiclip-serve:gpu --target gpu .
# Run with a bundle mounted at /bundle; every setting is an environment variable WIKICLIP_*.

FROM docker.io/library/python:3.11-slim-bookworm AS base
# /cache is for bundles from a URI. Mount a volume there, because everything else is read-only.
RUN useradd --system --uid 10001 --no-create-home wikiclip \
    && install -d -o wikiclip /cache
ENV PATH=/opt/wikiclip/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# ---- Shared by all images of the service, without its packages ----
FROM base AS service
ENV WIKICLIP_BUNDLE=/bundle \
    WIKICLIP_BUNDLE_CACHE=/cache \
    WIKICLIP_HOST=0.0.0.0 \
    WIKICLIP_PORT=8000 \
    WIKICLIP_DEVICE=cpu
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['WIKICLIP_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["wikiclip"]
CMD ["serve"]

# ---- The packages. Those of the CPU image are locked by hash, except the build backend, which is not in the image ----
FROM base AS build
WORKDIR /src
RUN python3 -m venv /opt/wikiclip

FROM build AS cpu-build
COPY requirements-serving.lock ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements-serving.lock
COPY . .
RUN pip install --no-cache-dir --no-deps . \
    && pip check

FROM cpu-build AS milvus-build
RUN pip install --no-cache-dir --constraint requirements.lock '.[milvus]'

FROM build AS gpu-build
COPY . .
RUN pip install --no-cache-dir --constraint requirements.lock '.[gpu,live,otel,s3]'

# ---- CUDA 12's libraries and cuDNN 9 come with the packages. NVIDIA's container runtime adds the driver's ----
FROM service AS gpu
ENV WIKICLIP_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-build /opt/wikiclip /opt/wikiclip

# ---- Locust with this repository's users ----
FROM cpu-build AS load
RUN pip install --no-cache-dir --constraint requirements.lock '.[load]'
USER 10001
ENTRYPOINT ["locust", "--locustfile", "benchmarks/locustfile.py"]
CMD ["--help"]

# ---- The CPU image with Milvus's client, which adds half of its size ----
FROM service AS milvus
COPY --from=milvus-build /opt/wikiclip /opt/wikiclip

FROM service AS cpu
COPY --from=cpu-build /opt/wikiclip /opt/wikiclip
