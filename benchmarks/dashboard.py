"""What pages of the dashboard cost on a large fleet: the first drawing and one more, in wall-clock and in CPU time.

    python benchmarks/dashboard.py --devices 10000 --rounds 1000 --refreshes 200

Pages are run by Streamlit itself without a browser: what a browser adds (network, drawing) is not in it. Refreshes are of
the page Now; memory is this process's, before and after them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from fleet_database import fill
from streamlit.testing.v1 import AppTest

from pocketfed.coordinator.vitals import resident_bytes
from pocketfed.dashboard.launch import DATABASE_VARIABLE, OPEN_VARIABLE

VIEWS = Path(__file__).resolve().parents[1] / "dashboard" / "views"
PAGES = ("now", "learning", "round", "fleet", "models", "security", "compare", "system")


def timed(app: AppTest) -> tuple[float, float]:
    """Seconds of the clock and of the CPU that a page took."""
    wall, cpu = time.perf_counter(), time.process_time()
    app.run()
    if app.exception:
        raise RuntimeError(app.exception[0].message)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1_000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--database", default="", help="one that is there already, in place of a made-up one")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--refreshes", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        database = given.database or str(Path(scratch) / "fleet.db")
        if not given.database:
            fill(
                database, devices=given.devices, rounds=given.rounds, planned=given.rounds + 8, cohort=given.cohort
            )  # fmt: skip
        os.environ[DATABASE_VARIABLE], os.environ[OPEN_VARIABLE] = database, "1"
        timed(AppTest.from_file(str(VIEWS / "now.py"), default_timeout=300))  # imports
        print("page      first: s  (CPU)   again: s  (CPU), medians")
        for page in PAGES:
            firsts, agains = [], []
            for _ in range(given.repeat):
                app = AppTest.from_file(str(VIEWS / f"{page}.py"), default_timeout=300)
                firsts.append(timed(app))
                agains.append(timed(app))
            cells = [statistics.median(row[i] for row in rows) for rows in (firsts, agains) for i in (0, 1)]
            print("{:9} {:7.2f}  ({:.2f})  {:7.2f}  ({:.2f})".format(page, *cells), flush=True)
        app = AppTest.from_file(str(VIEWS / "now.py"), default_timeout=300)
        timed(app)
        before = resident_bytes()
        for _ in range(given.refreshes):
            timed(app)
        if given.refreshes:
            print(f"{given.refreshes} refreshes: {before / 1e6:.0f} MB before, {resident_bytes() / 1e6:.0f} MB after")


if __name__ == "__main__":
    main()
