"""Pictures of the dashboard on a real database: starts it, drives a headless Chromium, saves what it shows.

python docs/screenshot.py --database demo/fleet.db --out now.png
python docs/screenshot.py --database demo/fleet.db --page models --dark --width 390 --out models.png
python docs/screenshot.py --all --out docs/dashboard                       # every page, light and dark, of a made-up fleet
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pocketfed.dashboard.launch import command, environment

START_S = 120  # seconds the server, and any page, may take to appear
PAGES = ("now", "learning", "round", "fleet", "models", "security", "compare", "system")
SETTLED = """
const busy = document.querySelector('[data-testid="stStatusWidget"], [data-testid="stSkeleton"], [data-stale="true"]');
const body = document.querySelector('[data-testid="stMain"]');
return !busy && body !== null && body.innerText.length > 80
    && document.querySelector('[data-testid="stApp"]').dataset.testScriptState === 'notRunning'
    && [...document.querySelectorAll('[data-testid="stVegaLiteChart"]')].every(c => c.querySelector('.marks'));
"""


def missing() -> str | None:
    """Why no browser can be driven here, or None where one can."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"{' and '.join(absent)} not found on the PATH; on Debian: apt install chromium chromium-driver"
        if absent
        else None
    )


def start_of_command() -> tuple[int, list[str]]:
    """A free port, and the command that serves there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return port, command(port)


@contextlib.contextmanager
def serving(database: str, start: tuple[int, list[str]] | None = None) -> Iterator[str]:
    """The dashboard on a free port, as its own process; yields its address and ends it afterwards."""
    port, words = start or start_of_command()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            words, env=environment(database), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            wait_until_healthy(process, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"{error}; it wrote: {log.read().decode(errors='replace')[-2000:]}") from None
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_healthy(process: subprocess.Popen[Any], address: str) -> None:
    for _ in range(START_S * 10):
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise RuntimeError(f"the dashboard ended with code {process.wait(0.1)} instead of starting")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/_stcore/health", timeout=1) as answer:
            if answer.status == 200:
                return
    raise RuntimeError(f"the dashboard did not answer within {START_S} s")


@contextlib.contextmanager
def browsing(width: int = 1440, height: int = 1000, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A headless Chromium with a profile of its own, and a log of all it asks the network for."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or "chromium"
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
            # a window cannot be narrower than about 500 pixels; a device can
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            yield driver
        finally:
            driver.quit()


def visit(driver: webdriver.Chrome, address: str) -> str:
    """Open a page and wait until it is drawn, charts included. Returns its text."""
    driver.get(address)
    WebDriverWait(driver, START_S, poll_frequency=0.1, ignored_exceptions=[WebDriverException]).until(
        lambda d: d.execute_script(SETTLED)
    )
    text = driver.find_element(By.TAG_NAME, "body").text
    if driver.find_elements(By.CSS_SELECTOR, '[data-testid="stException"]'):
        raise RuntimeError(f"the page {address} failed: {text[-500:]}")
    return text


def contacted(driver: webdriver.Chrome) -> set[str]:
    """Hosts that pages asked for anything since the last call: requests and web sockets, whether answered or not."""
    hosts = set()
    for entry in driver.get_log("performance"):  # type: ignore[no-untyped-call]
        message = json.loads(entry["message"])["message"]
        parameters: dict[str, Any] = message.get("params", {})
        url = parameters.get("request", {}).get("url") if message["method"] == "Network.requestWillBeSent" else None
        url = parameters.get("url") if message["method"] == "Network.webSocketCreated" else url
        # chrome:// pages and data: pictures come from the browser itself
        if url and urlsplit(url).scheme in ("http", "https", "ws", "wss"):
            hosts.add(str(urlsplit(url).hostname))
    return hosts


def full_height(driver: webdriver.Chrome) -> int:
    """Pixels of the page's whole content, which scrolls inside the window."""
    return int(driver.execute_script("return document.querySelector('[data-testid=\"stMain\"]').scrollHeight"))


def picture(driver: webdriver.Chrome, address: str, out: Path, width: int, height: int = 0) -> None:
    """Save what a page shows; all of it where no height is given."""
    visit(driver, address)
    if not height:
        size = {"width": width, "height": max(full_height(driver), 400), "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        WebDriverWait(driver, START_S, poll_frequency=0.1).until(lambda d: d.execute_script(SETTLED))
    out.parent.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(out))
    if not height:  # the next page may be shorter
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": 1000})


def every_page(folder: Path, database: str) -> int:
    """Each page, light and dark, on that database or on a made-up fleet of 200 devices and 40 rounds."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from fleet_database import fill

    with tempfile.TemporaryDirectory() as scratch:
        if not database:
            database = str(Path(scratch) / "fleet.db")
            fill(database, devices=200, rounds=40, planned=60, cohort=40)
        with serving(database) as address:
            for dark in (False, True):
                with browsing(1440, 1000, dark) as driver:
                    for page in PAGES:
                        out = folder / f"{page}-{'dark' if dark else 'light'}.png"
                        picture(driver, f"{address}/{'' if page == 'now' else page}", out, 1440)
                        print(f"{out}: {out.stat().st_size:,} bytes", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", default="", help="a file name or an SQLAlchemy URL; --all makes one up")
    parser.add_argument("--all", action="store_true", help="every page, light and dark, into the folder --out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", default="", choices=["", *PAGES])
    parser.add_argument("--query", default="", help="e.g. run=2")
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument("--height", type=int, default=0, help="pixels; 0: as high as the page")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    if given.all:
        return every_page(given.out, given.database)
    if not given.database:
        parser.error("give --database, or --all")
    page = "" if given.page == "now" else given.page
    with serving(given.database) as address, browsing(given.width, given.height or 1000, given.dark) as driver:
        picture(driver, f"{address}/{page}?{given.query}", given.out, given.width, given.height)
    print(f"{given.out}: {given.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
