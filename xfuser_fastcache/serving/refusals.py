"""How a request is told that it gets no picture: our form, and below /v1/ OpenAI's."""

from __future__ import annotations

from starlette.responses import JSONResponse

OPENAI = "/v1/"


class Declined(Exception):
    """A request ends without a picture.

    Args:
        status: of HTTP.
        reason: in a sentence.
        field: of the request, where one is wrong.
        retry_after_s: when it may be sent again, in whole seconds.
        code: OpenAI's word for it, where it has one that clients look for.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        field: str | None = None,
        retry_after_s: int | None = None,
        code: str | None = None,
    ):
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s
        self.code = code

    def openai(self) -> dict[str, dict[str, str | None]]:
        """Return the body that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.reason,
                "type": "rate_limit_error" if self.status == 429 else kind,
                "param": self.field,
                "code": self.code,
            }
        }


def refused(path: str, declined: Declined) -> JSONResponse:
    """Return the answer to a request at `path`.

    OpenAI calls a wrong request 400 where we say 422.
    """
    after = declined.retry_after_s
    headers = None if after is None else {"Retry-After": str(after)}
    if not path.startswith(OPENAI):
        return JSONResponse({"detail": declined.reason}, declined.status, headers)
    status = 400 if declined.status == 422 else declined.status
    return JSONResponse(declined.openai(), status, headers)
