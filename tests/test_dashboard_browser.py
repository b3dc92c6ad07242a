"""The dashboard as a reader has it: the real process, a real browser."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import sqlalchemy as sa
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pocketfed.coordinator.store import Run, Store

ROOT = Path(__file__).resolve().parents[1]
CHART = '[data-testid="stVegaLiteChart"] svg.marks'
POINT = f"{CHART} .mark-symbol.role-mark path"


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


screenshot = load("docs/screenshot.py")
pytestmark = pytest.mark.skipif(screenshot.missing() is not None, reason=str(screenshot.missing()))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dashboard") / "fleet.db"
    load("benchmarks/fleet_database.py").fill(str(path), devices=12, rounds=4, planned=6)
    return path


@pytest.fixture(scope="module")
def address(database: Path) -> Iterator[str]:
    with screenshot.serving(str(database)) as where:
        yield where


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with screenshot.browsing(1280, 1400) as driver:
        yield driver


def test_a_reader_sees_the_run_its_curve_the_devices_and_the_sizes(browser: webdriver.Chrome, address: str) -> None:
    now = screenshot.visit(browser, address)
    assert "assistant intents" in now
    assert "Running: round 4 of 6" in now
    points = [p.rect["y"] for p in browser.find_elements(By.CSS_SELECTOR, POINT)]
    assert len(points) == 4  # rounds 0 to 3 are evaluated, round 4 is under way
    assert points == sorted(points, reverse=True)  # the curve climbs
    assert points[0] - points[-1] > 20  # pixels
    assert "Accuracy (%)" in browser.find_element(By.CSS_SELECTOR, CHART).text

    learning = screenshot.visit(browser, f"{address}/learning?run=1")
    assert "first try, head only" in learning
    assert len(browser.find_elements(By.CSS_SELECTOR, CHART)) == 2

    fleet = screenshot.visit(browser, f"{address}/fleet")
    assert "12 devices of 12" in fleet
    # the table is painted; the copy of it for screen readers, which comes a little later, holds the words
    cells = "return [...document.querySelectorAll('[role=gridcell]')].map(c => c.textContent)"
    WebDriverWait(browser, 20, poll_frequency=0.1).until(lambda d: "phone-00000" in d.execute_script(cells))

    models = screenshot.visit(browser, f"{address}/models")
    assert "660 kB" in models
    assert "3.8 × smaller than fp32" in models
    assert len(browser.find_elements(By.CSS_SELECTOR, CHART)) == 1
    assert screenshot.contacted(browser) == {"127.0.0.1"}


def test_the_page_follows_the_database_and_runs_no_strangers_script(
    browser: webdriver.Chrome, address: str, database: Path
) -> None:
    screenshot.visit(browser, address)
    store = Store(str(database))
    name = "<img src=x onerror=document.title='owned'> [x](javascript:1)"
    with store.write() as session:
        session.execute(sa.update(Run).where(Run.id == 2).values(name=name, status="finished"))
    store.close()
    WebDriverWait(browser, 20).until(lambda d: "Finished: all" in d.find_element(By.TAG_NAME, "body").text)
    screenshot.visit(browser, address)
    body = browser.find_element(By.TAG_NAME, "body").text
    assert "<img src=x onerror=document.title='owned'> [x](javascript:1)" in body
    assert not browser.find_elements(By.CSS_SELECTOR, "img[src$='x'], a[href^='javascript']")
    assert "owned" not in browser.title
    log = browser.get_log("browser")  # type: ignore[no-untyped-call]
    # Streamlit looks for its own path below the page first, and is told that it is not there
    assert not [entry["message"] for entry in log if "_stcore" not in entry["message"]]


def test_a_phone_needs_no_sideways_scrolling(address: str) -> None:
    with screenshot.browsing(390, 844, dark=True) as phone:
        for page in ("", "learning", "models"):
            screenshot.visit(phone, f"{address}/{page}")
            assert phone.execute_script("return document.documentElement.scrollWidth") <= 390
