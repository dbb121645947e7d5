"""The web page that ``mm1 serve`` shows at ``/``: where its files are, and what it may do.

Its sources are TypeScript (``src/``); ``make page`` builds ``dist/``, which is installed.
It speaks the server's public API alone.
"""

from __future__ import annotations

from pathlib import Path

DIST = Path(__file__).parent / "dist"
# Nothing from elsewhere, nothing inline. Pictures are shown from the page's own memory,
# and a form that was sent would leave the page.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
