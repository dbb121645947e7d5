"""``mm1 chat``: a conversation about pictures, in a terminal."""

from .command import chat

__all__ = ["chat"]
