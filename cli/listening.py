"""Where a command listens."""

from __future__ import annotations

from pocketfed.cli.output import CommandError


def check_free(listen: str) -> str:
    """The host of HOST:PORT, if one can listen there now: better told before a database is made.

    Raises:
        CommandError: not an address, not of this machine, or taken.
    """
    import socket

    host, _, port = listen.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise CommandError(f"{listen!r} is not HOST:PORT, e.g. 127.0.0.1:8765")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise CommandError(f"cannot listen on {listen}: {why}; choose another port or address") from None
    return host
