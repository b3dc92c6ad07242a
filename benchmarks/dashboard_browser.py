"""What a reader of the dashboard waits for on a large fleet, the browser included: a real server, a real Chromium.

    python benchmarks/dashboard_browser.py --devices 10000 --rounds 1000 --repeat 5
    python benchmarks/dashboard_browser.py --database fleet.db --hour

A page's time is from its navigation to its last chart drawn and its script ended, as the page itself sees it; a click's
from the click to the same. With --hour instead: two windows, on Now and on Round, that look again as often as in an hour
of a refresh every five seconds, back to back, while rounds are added to the database; the server's memory along the way.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fleet_database import advance, fill
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import screenshot

# page -> its heading, and how many charts it has on the made-up fleet
PAGES = {
    "now": ("Now", 2), "learning": ("Learning", 4), "round": ("Round", 4), "fleet": ("Fleet", 7), "models": ("Models", 2),
    "security": ("Security & privacy", 2), "compare": ("Compare", 2), "system": ("System", 6),
}  # fmt: skip
PATIENCE_S = 300.0
# In the page: when `isThere` was first true, looked for every 20 ms. A page that is looked at again and again has no end:
# it is there when it has its heading and all of its charts, none of them of before.
WATCH = """
(() => {
  let began = 0;
  const all = what => [...document.querySelectorAll(what)];
  window.has = (title, charts, text) => all('h1').some(h => h.textContent === title)
    && all('[data-testid="stVegaLiteChart"]').filter(c => c.querySelector('.marks')).length >= charts
    && all('[data-testid="stSkeleton"]').length === 0
    && (!text || all('svg text').filter(t => t.textContent === text).length > 0);
  window.expect = (isThere) => { began = began || 0; window.isThere = isThere; window.thereAfter = null; };
  window.again = (isThere) => { began = performance.now(); window.expect(isThere); };
  window.thereAfter = null;
  setInterval(() => {
    if (window.thereAfter === null && window.isThere && window.isThere()) window.thereAfter = performance.now() - began;
  }, 20);
})();
"""
CLICKED = "[...document.querySelectorAll('button')].find(b => b.innerText === '{}').click()"
# what is clicked -> the page where, the click, and what is there then
CLICKS = {
    "learning, by time": ("learning", CLICKED.format("time"), ("learning", "Time spent in rounds (s)")),
    "compare, by time": ("compare", CLICKED.format("time"), ("compare", "Time spent in rounds (s)")),
    **{
        f"{'system' if page == 'now' else 'now'} to {page}": (
            "system" if page == "now" else "now",
            f"document.querySelector(\"[data-testid='stSidebarNavLink'][href$='/{'' if page == 'now' else page}']\").click()",
            (page, ""),
        )
        for page in PAGES
    },
}


def there(page: str, text: str = "") -> str:
    """JavaScript: whether that page is drawn, with these words in a chart."""
    title, charts = PAGES[page]
    return f"() => window.has({title!r}, {charts}, {text!r})"


def there_s(driver: webdriver.Chrome) -> float:
    """Seconds until what is expected was there."""
    waiting = WebDriverWait(driver, PATIENCE_S, poll_frequency=0.1)
    return float(waiting.until(lambda d: d.execute_script("return window.thereAfter"))) / 1e3


def server_cpu_s() -> float:
    """CPU time of the dashboard's process, which is a child of this one."""
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if fields[1] == str(os.getpid()) and b"streamlit" in (place / "cmdline").read_bytes():
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return math.nan


def page_cpu_s(driver: webdriver.Chrome) -> float:
    """CPU time of the page's process."""
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(m["value"] for m in metrics if m["name"] == "ProcessTime"))


def opened(driver: webdriver.Chrome, address: str, page: str) -> tuple[float, float, float, float]:
    """Seconds until anything was painted, and until all of it was, of a page opened anew; CPU time of server and page."""
    driver.get("about:blank")
    server = server_cpu_s()
    driver.get(f"{address}/{'' if page == 'now' else page}")
    driver.execute_script(f"window.expect({there(page)})")
    drawn = there_s(driver)
    painted = driver.execute_script(
        "return performance.getEntriesByType('paint').find(p => p.name === 'first-contentful-paint')?.startTime"
    )
    return float(painted or 0) / 1e3, drawn, server_cpu_s() - server, page_cpu_s(driver)


def clicked(driver: webdriver.Chrome, script: str, page: str, text: str) -> tuple[float, float, float]:
    """Seconds from a click until the page was drawn again; CPU time of server and page."""
    server, used = server_cpu_s(), page_cpu_s(driver)
    driver.execute_script(f"window.again({there(page, text)}); {script}")
    return there_s(driver), server_cpu_s() - server, page_cpu_s(driver) - used


def told(name: str, rows: Sequence[Sequence[float]]) -> None:
    cells = [
        f"{statistics.median(column):6.2f} ({min(column):.2f}-{max(column):.2f})" for column in zip(*rows, strict=True)
    ]
    print(f"{name:22} " + " ".join(f"{cell:>18}" for cell in cells), flush=True)


def waits(database: str, repeat: int) -> None:
    """Print what each page and click takes: seconds, medians and ranges."""
    with screenshot.serving(database) as address, screenshot.browsing(1440, 1000) as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        driver.execute_cdp_cmd("Performance.enable", {})
        print(f"{'page opened':22} {'first paint':>18} {'all drawn':>18} {'server CPU':>18} {'page CPU':>18}")
        told("the server's first", [opened(driver, address, "now")])
        for page in PAGES:
            told(page, [opened(driver, address, page) for _ in range(repeat)])
        print(f"{'click':22} {'drawn':>18} {'server CPU':>18} {'page CPU':>18}")
        for name, (where, script, (page, text)) in CLICKS.items():
            rows = []
            for _ in range(repeat):
                opened(driver, address, where)
                rows.append(clicked(driver, script, page, text))
            told(name, rows)


# ---- an hour -----------------------------------------------------------------------------------------------------------

# The dashboard as it is, but that it looks again after so many seconds, and says how often it did and what memory it has.
HURRIED = """
import sys
from pocketfed.coordinator.vitals import resident_bytes
from pocketfed.dashboard import frame
from streamlit.web.cli import main
frame.LIVE_S, looked, store = float(sys.argv.pop(1)), 0, frame.store
def counted():
    global looked
    looked += 1
    if looked % 120 == 0:
        print(looked, resident_bytes(), flush=True)
    return store()
frame.store = counted
main()
"""


def hour(database: str, refreshes: int, every_s: float = 0.2) -> None:
    """Print the server's memory while two windows, on Now and on Round, look again, and rounds are added."""
    from pocketfed.dashboard.launch import environment

    port, words = screenshot.start_of_command()
    command = [words[0], "-c", HURRIED, str(every_s), *words[3:]]
    process = subprocess.Popen(command, env=environment(database), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = f"http://127.0.0.1:{port}"
        screenshot.wait_until_healthy(process, address)
        with screenshot.browsing() as one, screenshot.browsing() as two:
            one.get(address)
            two.get(f"{address}/round")
            for line in process.stdout:
                parts = line.split()
                if len(parts) != 2 or not parts[0].isdigit():
                    continue  # Streamlit's own words
                added = advance(database)
                print(f"{int(parts[0]):6} looks, {int(parts[1]) / 1e6:6.1f} MB, round {added}", flush=True)
                if int(parts[0]) >= refreshes:
                    return
    finally:
        process.terminate()
        process.wait(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1_000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--database", default="", help="one that is there already, in place of a made-up one")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--hour", action="store_true", help="watch memory in place of the clock")
    parser.add_argument("--refreshes", type=int, default=1_440, help="of both windows together, with --hour")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        database = given.database or str(Path(scratch) / "fleet.db")
        if not given.database:
            planned = given.rounds + 8
            fill(database, devices=given.devices, rounds=given.rounds, planned=planned, cohort=given.cohort)
        if given.hour:
            hour(database, given.refreshes)
        else:
            waits(database, given.repeat)


if __name__ == "__main__":
    main()
