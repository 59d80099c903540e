"""How long a server asks its clients to wait."""

import time
from email.utils import parsedate_to_datetime


def retry_after_s(value: str) -> float:
    """Seconds of a `Retry-After` header, which holds seconds or an HTTP date; 0 if absent or unreadable. Source: RFC 9110, 10.2.3."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
