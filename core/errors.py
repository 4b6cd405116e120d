"""Every error a user can cause, drawn as one tree.

    WikiclipError                     500  exit 1
    └── UserError                     400  exit 2   what is wrong, and what to do
        ├── BadRequest                400           empty or malformed request
        ├── Unauthorized              401
        ├── Forbidden                 403
        ├── NotFound                  404
        │   └── UnknownEntity         404
        ├── SlowRequest               408           a request that does not arrive in time
        ├── Conflict                  409           another change is under way
        ├── TooLarge                  413           too many bytes or pixels
        ├── UnsupportedMediaType      415           the declared type is no image type we read
        ├── HeadTooLarge              431           the head of a request
        ├── Unprocessable             422
        │   ├── UndecodableImage      422           the bytes do not decode
        │   ├── BadParameter          422
        │   ├── BundleRefused         422           another bundle that is not taken, the old one stays
        │   ├── NoEntitySide          422           an entity to embed where the bundle has nothing to embed it with
        │   └── FetchFailed           422           an image given by URL that its server does not give
        ├── TooManyRequests           429           carries `retry_after_s`
        ├── Unavailable               503           not ready or draining
        ├── DeadlineExceeded          504
        ├── BundleError               503           a bundle that cannot be served
        │   ├── BundleMissing
        │   ├── BundleIncomplete
        │   ├── BundleAltered
        │   └── BundleSchemaMismatch
        ├── TransferError             503           a place of bundles that holds something else or does not answer
        ├── LiveDirError              503           a LIVE_DIR that cannot be used, or that belongs to another bundle
        ├── CatalogError                            a catalog, pairs or queries file that cannot be read at all
        ├── CheckpointError                         a checkpoint that is missing, of another shape, or altered
        └── EncoderSpecError                        an encoder spec that names nothing usable

A message is one line: what is wrong (with the file or the field), then what to do about it. `wikiclip.errors` defines
the errors that clients raise as well.
"""

from __future__ import annotations

from wikiclip.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    SlowRequest,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    UserError,
    WikiclipError,
)

__all__ = [
    "BadParameter",
    "BadRequest",
    "BundleAltered",
    "BundleError",
    "BundleIncomplete",
    "BundleMissing",
    "BundleRefused",
    "BundleSchemaMismatch",
    "CatalogError",
    "CheckpointError",
    "Conflict",
    "DeadlineExceeded",
    "EncoderSpecError",
    "FetchFailed",
    "Forbidden",
    "HeadTooLarge",
    "LiveDirError",
    "NoEntitySide",
    "NotFound",
    "SlowRequest",
    "TooLarge",
    "TooManyRequests",
    "TransferError",
    "Unauthorized",
    "Unavailable",
    "UndecodableImage",
    "UnknownEntity",
    "Unprocessable",
    "UnsupportedMediaType",
    "UserError",
    "WikiclipError",
]


class UnknownEntity(NotFound):
    title = "Unknown entity"


class HeadTooLarge(UserError):
    status = 431
    title = "Request head too large"


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


class CatalogError(UserError):
    title = "Catalog cannot be read"


class CheckpointError(UserError):
    title = "Checkpoint cannot be used"


class EncoderSpecError(UserError):
    title = "Encoder cannot be loaded"
