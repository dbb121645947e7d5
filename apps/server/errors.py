"""What goes wrong with a request, as OpenAI's error object."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
# A client that left is told nothing; logs and metrics call it as nginx does.
CLIENT_LEFT = 499


class APIError(Exception):
    """A refusal, as the caller is told it.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field of the request that is at fault.
        code: names the fault for programs.
        retry_after: seconds after which it may be asked again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The error object."""
        error = {
            "message": str(self),
            "type": TYPES[self.status],
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """The error object, with its status and headers."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            # RFC 6750, section 3: the scheme never stands alone, which some clients rely on.
            headers["WWW-Authenticate"] = 'Bearer realm="mm1"'
        return JSONResponse(self.body(), self.status, headers)


def bug(error: Exception, name: str) -> APIError:
    """A fault of ours: its traceback is for the owner, and nothing of it for the caller.

    Args:
        error: what was raised.
        name: the request's id.
    """
    print(f"error in {name}:", file=sys.stderr)
    traceback.print_exception(error)
    message = f"the server failed; its log says more of request {name}"
    return APIError(500, message, code="internal")


def refuse(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """The response to a request that an ``APIError`` ended."""
    assert isinstance(error, APIError)
    return error.response()
