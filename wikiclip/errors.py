"""Errors that a request can end in. `except wikiclip.TooManyRequests` catches it from a client and from a recogniser.

    WikiclipError                     500   base of all errors raised on purpose
    ├── UserError                     400   the request or the command is wrong; the message says what to change
    │   ├── BadRequest                400   empty or malformed
    │   ├── Unauthorized              401
    │   ├── Forbidden                 403
    │   ├── NotFound                  404
    │   ├── SlowRequest               408   the request did not arrive in time
    │   ├── TooLarge                  413   too many bytes or pixels
    │   ├── UnsupportedMediaType      415   the declared type is not an image type that the service reads
    │   ├── Unprocessable             422   the bytes do not decode, or a bad parameter
    │   ├── TooManyRequests           429   queue full or rate exceeded; has `retry_after_s`
    │   └── HeadTooLarge              431   the head of the request is too large
    ├── Conflict                      409   another change is under way
    └── ServiceError                  500   the request is right, but the service cannot answer it
        ├── InternalError             500   a fault of the service; quote the `request_id` to its operator
        ├── BadGateway                502   a proxy does not reach the service
        ├── Unavailable               503   not ready, draining, or not reachable at all
        └── DeadlineExceeded          504

`core.errors` has the errors of commands and of bundles, which clients do not raise.
"""

from __future__ import annotations


class WikiclipError(Exception):
    """Base of all errors raised on purpose. `status` is the HTTP status, `title` the RFC 9457 title."""

    status: int = 500
    title: str = "Internal error"
    request_id: str = ""
    """Id of the request that a service answered with this error; empty without HTTP."""

    @property
    def detail(self) -> str:
        return str(self)


class UserError(WikiclipError):
    status = 400
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


class SlowRequest(UserError):
    status = 408
    title = "Request too slow"


class TooLarge(UserError):
    status = 413
    title = "Image too large"


class UnsupportedMediaType(UserError):
    status = 415
    title = "Unsupported media type"


class Unprocessable(UserError):
    status = 422
    title = "Unprocessable content"


class TooManyRequests(UserError):
    status = 429
    title = "Too many requests"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class HeadTooLarge(UserError):
    status = 431
    title = "Request head too large"


class Conflict(WikiclipError):
    status = 409
    title = "Conflict"


class ServiceError(WikiclipError):
    pass


class InternalError(ServiceError):
    pass


class BadGateway(ServiceError):
    status = 502
    title = "Bad gateway"


class Unavailable(ServiceError):
    status = 503
    title = "Not ready"


class DeadlineExceeded(ServiceError):
    status = 504
    title = "Deadline exceeded"
