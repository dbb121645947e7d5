"""Bytes into words."""


def human_bytes(size: float) -> str:
    """A size in decimal units, as disks and hubs count."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
