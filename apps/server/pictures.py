"""Where a request's pictures are read from: the request itself, unless more is allowed."""

from __future__ import annotations

import asyncio

from mm1_mlx.image import DEFAULT_LIMITS

from . import media, remote
from .errors import APIError
from .policy import Policy


async def read_picture(url: str, policy: Policy, param: str) -> str | bytes:
    """A picture as ``stream`` takes it: a data URI as it is, others as their bytes.

    Args:
        url: of an ``image_url``.
        policy: what is allowed.
        param: what errors call the field.

    Raises:
        APIError: 400; it may not be read, or cannot.
    """
    scheme = url[:8].partition(":")[0].lower()
    most = DEFAULT_LIMITS.max_bytes
    if scheme == "data":
        return url
    if scheme == "https" and policy.remote_hosts:
        return await asyncio.to_thread(
            remote.fetch, url, policy.remote_hosts, most, param
        )
    if scheme == "file":
        return await asyncio.to_thread(media.read, url, policy.media_root, most, param)
    raise APIError(
        400,
        f"{param} is {url!r:.60}, expected a data URI such as 'data:image/png;base64,...'",
        param=param,
        code="invalid_image_url",
    )
