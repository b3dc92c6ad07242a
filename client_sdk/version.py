"""Which SDK this is. A coordinator is told; an artifact may ask for a newer one."""

SDK_VERSION = "0.3.0"


def at_least(needed: str) -> bool:
    """Whether this SDK is as new as an artifact's `min_sdk`.

    >>> at_least("0.2.0"), at_least("0.10"), at_least("soon")
    (True, False, False)
    """
    try:
        return _numbers(SDK_VERSION) >= _numbers(needed)
    except ValueError:
        return False


def _numbers(version: str) -> tuple[int, ...]:
    found = [int(part) for part in version.split(".")]
    return tuple(found + [0] * (3 - len(found)))
