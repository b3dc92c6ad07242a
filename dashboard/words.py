"""Numbers, times and other people's text as a reader should see them."""

from __future__ import annotations

import html
import unicodedata
from datetime import UTC, datetime

# characters that reorder or hide the text around them; a name has no business with them
_INVISIBLE = {
    chr(c) for c in (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0x061C, 0xFEFF, 0x00AD)
}


def plain(text: str | None, limit: int = 60) -> str:
    """Text of a stranger on one line: no control or direction-changing characters, cut at `limit` characters.

    >>> plain("a\\n b\\u202ec" + "x" * 99, limit=8)
    'a bcxxx…'
    """
    if not text:
        return ""
    head = text[: 4 * limit]  # enough to fill the limit; a name of megabytes is not walked through
    shown = "".join(
        " " if c.isspace() else "" if c in _INVISIBLE or unicodedata.category(c) in ("Cc", "Cs") else c for c in head
    )
    shown = " ".join(shown.split())
    if len(shown) <= limit and len(head) == len(text):
        return shown
    return shown[: limit - 1].rstrip() + "…"


def markup(text: str | None, limit: int = 60) -> str:
    """`plain` text for inside HTML, kept apart from the direction of the text around it.

    >>> markup("<b>")
    '<bdi>&lt;b&gt;</bdi>'
    """
    return f"<bdi>{html.escape(plain(text, limit))}</bdi>"


def cell(text: str | None, limit: int = 200) -> str:
    """`plain` text for a CSV file, where a spreadsheet would run a cell that starts like a formula.

    >>> cell("=1+1")
    "'=1+1"
    """
    shown = plain(text, limit)
    return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown


def size(count: float | None) -> str:
    """Bytes in decimal units: 1 MB is 1,000,000 bytes.

    >>> size(622_208), size(1_500), size(12)
    ('622 kB', '1.5 kB', '12 B')
    """
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def short(count: float | None) -> str:
    """A count with at most three digits and a unit.

    >>> short(622_208), short(102_760_448), short(31)
    ('622 k', '103 M', '31')
    """
    if count is None:
        return "–"
    for unit in ("", " k", " M", " G", " T"):
        if count < 999.5 or unit == " T":
            return f"{count:.0f}{unit}" if not unit or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def percent(share: float | None) -> str:
    """
    >>> percent(0.9546)
    '95.5%'
    """
    return "–" if share is None else f"{100 * share:.1f}%"


def duration(seconds: float | None) -> str:
    """
    >>> duration(4.26), duration(95), duration(7_320)
    ('4.3 s', '1 min 35 s', '2 h 2 min')
    """
    if seconds is None:
        return "–"
    seconds = max(seconds, 0.0)  # clocks are set back
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def utc(then: datetime | None) -> str:
    return "" if then is None else f"{then.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def number_of(count: int, noun: str) -> str:
    """
    >>> number_of(1, "device"), number_of(1200, "device")
    ('1 device', '1,200 devices')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
