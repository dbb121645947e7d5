"""Where a request's pictures are read from: the request itself, unless more is allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mm1_mlx.image import DEFAULT_LIMITS
from mm1_mlx.image.source import is_data

from . import media, remote
from .errors import APIError
from .policy import Policy


class PictureReader:
    """Reads the pictures of one request.

    Args:
        policy: what is allowed.
        count: told how many bytes were read beside the request's own.
    """

    def __init__(self, policy: Policy, count: Callable[[int], None]) -> None:
        self._policy = policy
        self._count = count

    def check_number(self, number: int, param: str) -> None:
        """Refuse more pictures than are asked about, before any is read.

        Raises:
            APIError: 400; they are too many.
        """
        most = DEFAULT_LIMITS.max_pictures
        if number > most:
            raise APIError(
                400,
                f"{param} holds {number} pictures, expected at most {most}",
                param=param,
                code="invalid_value",
            )

    async def read(self, url: str, param: str) -> str | bytes:
        """A picture as ``stream`` takes it: a data URI as it is, others as their bytes.

        Args:
            url: of an ``image_url``.
            param: what errors call the field.

        Raises:
            APIError: 400; it may not be read, or cannot. 413, 503; it is too much.
        """
        policy, most = self._policy, DEFAULT_LIMITS.max_bytes
        scheme = url[:8].partition(":")[0].lower()
        if is_data(url):
            return url
        if scheme == "https" and policy.remote_hosts:
            hosts = policy.remote_hosts
            read = await asyncio.to_thread(remote.fetch, url, hosts, most, param)
        elif scheme == "file":
            root = policy.media_root
            read = await asyncio.to_thread(media.read, url, root, most, param)
        else:
            raise APIError(
                400,
                f"{param} is {url!r:.60}, expected a data URI such as "
                "'data:image/png;base64,...'",
                param=param,
                code="invalid_image_url",
            )
        self._count(len(read))
        return read
