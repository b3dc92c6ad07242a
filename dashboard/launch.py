"""How to start the dashboard: its command line and environment, for the CLI, the tests and the screenshots alike."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Mapping
from pathlib import Path

DATABASE_VARIABLE = "POCKETFED_DATABASE"
OPEN_VARIABLE = "POCKETFED_DASHBOARD_OPEN"  # 1: only this machine can connect, so that without operators all may look
APP = Path(__file__).with_name("app.py")


def command(port: int, address: str = "127.0.0.1", tls: tuple[str, str] | None = None) -> list[str]:
    """The process to start. It asks nothing, sends no statistics, and shows no developer's tools and no tracebacks.

    tls: files of a certificate and its key, for HTTPS.
    The address is always given: without one, Streamlit asks a public web service for this machine's own.
    """
    https = ["--server.sslCertFile", tls[0], "--server.sslKeyFile", tls[1]] if tls else []
    return [
        sys.executable, "-m", "streamlit", "run", str(APP),
        "--server.address", address, "--server.port", str(port), "--server.headless", "true",
        "--server.fileWatcherType", "none", "--browser.gatherUsageStats", "false",
        "--client.toolbarMode", "viewer", "--client.showErrorDetails", "none", "--client.showErrorLinks", "false",
        "--theme.light.primaryColor", "#2D7DD2", "--theme.dark.primaryColor", "#5AA2E6", *https,
    ]  # fmt: skip


def is_loopback(address: str) -> bool:
    """
    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("fleet")
    (True, True, True, False, False)
    """
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return address == "localhost"


def environment(database: str, address: str = "127.0.0.1", base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of that process; `base` is this process's own where not given."""
    given = {DATABASE_VARIABLE: database, OPEN_VARIABLE: str(int(is_loopback(address)))}
    return {**(os.environ if base is None else base), **given}
