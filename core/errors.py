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

A message is one line: what is wrong (with the file or the field), then what to do about it.
"""

from __future__ import annotations


class WikiclipError(Exception):
    """Base of all errors raised on purpose. `status` is the HTTP status, `title` the RFC 9457 title."""

    status: int = 500
    exit_code: int = 1
    title: str = "Internal error"

    @property
    def detail(self) -> str:
        return str(self)


class UserError(WikiclipError):
    status = 400
    exit_code = 2
    title = "Bad request"


class BadRequest(UserError):
    pass


class Unauthorized(UserError):
    status = 401
    title = "Unauthorized"


class Forbidden(UserError):
    status = 403
    title = "Forbidden"


class NotFound(UserError):
    status = 404
    title = "Not found"


class UnknownEntity(NotFound):
    title = "Unknown entity"


class SlowRequest(UserError):
    status = 408
    title = "Request too slow"


class Conflict(UserError):
    status = 409
    title = "Conflict"


class TooLarge(UserError):
    status = 413
    title = "Image too large"


class UnsupportedMediaType(UserError):
    status = 415
    title = "Unsupported media type"


class HeadTooLarge(UserError):
    status = 431
    title = "Request head too large"


class Unprocessable(UserError):
    status = 422
    title = "Unprocessable content"


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


class TooManyRequests(UserError):
    status = 429
    title = "Too many requests"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(UserError):
    status = 503
    title = "Not ready"


class DeadlineExceeded(UserError):
    status = 504
    title = "Deadline exceeded"


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
