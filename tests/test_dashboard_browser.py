"""The dashboard as a reader has it: the real process, a real browser."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from pathlib import Path

import fleet_database
import pytest
import screenshot
import sqlalchemy as sa
from selenium import webdriver
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from pocketfed.client_sdk.artifacts import Artifact
from pocketfed.client_sdk.flower_app import make_client_app
from pocketfed.client_sdk.plan_trainer import PlanTrainer
from pocketfed.client_sdk.trainer import Examples, evaluate

# isort: split
from flwr.app import Context

from pocketfed.coordinator.artifacts import BuiltArtifact, publish_artifact
from pocketfed.coordinator.config import LocalTraining, RunConfig
from pocketfed.coordinator.operators import audit_lines, set_operator
from pocketfed.coordinator.rounds import create_run, drive_run
from pocketfed.coordinator.store import Release, Run, Store, device_named
from pocketfed.model.tasks import Dataset
from pocketfed.simulations.grids import InProcessGrid
from pocketfed.simulations.run import encode_examples

ROOT = Path(__file__).resolve().parents[1]
LONG_S = 180.0  # for what takes seconds: this machine may have other work
PASSWORD = "correct horse battery"
LOCAL = LocalTraining(batch_size=4, learning_rate=0.01, max_length=32)
CHART = '[data-testid="stVegaLiteChart"] svg.marks'
POINT = f"{CHART} .mark-symbol.role-mark path"


pytestmark = pytest.mark.skipif(screenshot.missing() is not None, reason=str(screenshot.missing()))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dashboard") / "fleet.db"
    fleet_database.fill(str(path), devices=12, rounds=4, planned=6)
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
    assert len(browser.find_elements(By.CSS_SELECTOR, CHART)) == 3  # cohorts of four devices are not shown

    fleet = screenshot.visit(browser, f"{address}/fleet")
    assert "12 devices of 12" in fleet
    # the table is painted; the copy of it for screen readers, which comes a little later, holds the words
    cells = "return [...document.querySelectorAll('[role=gridcell]')].map(c => c.textContent)"
    WebDriverWait(browser, 20, poll_frequency=0.1).until(lambda d: "phone-00000" in d.execute_script(cells))

    models = screenshot.visit(browser, f"{address}/models")
    assert "660 kB" in models
    assert "3.8 × smaller than fp32" in models
    assert len(browser.find_elements(By.CSS_SELECTOR, CHART)) == 2
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
        for page in ("", "round", "models", "security"):
            screenshot.visit(phone, f"{address}/{page}")
            assert phone.execute_script("return document.documentElement.scrollWidth") <= 390


# ---- a day of two people ---------------------------------------------------------------------------------------------


class Simulation:
    """A real run of four virtual devices; after each round it waits until it is told to go on."""

    def __init__(self, database: Path, built: BuiltArtifact, artifact: Artifact, dataset: Dataset) -> None:
        self.store = Store(str(database))
        self.trainer = PlanTrainer(artifact, "head")
        everything = encode_examples(self.trainer, dataset.train, 32)
        self.test = encode_examples(self.trainer, dataset.test, 32)
        self.local = {f"device-{i}": everything.take(range(12 * i, 12 * i + 12)) for i in range(4)}
        self.bytes = artifact.manifest.bytes
        with self.store.write() as session:
            publish_artifact(session, built, "stable", "head")
            self.nodes = {device_named(session, name).id: name for name in self.local}
        self.app = make_client_app(lambda: self.trainer, self.examples_of)
        self.may_go_on = threading.Semaphore(0)

    def examples_of(self, context: Context) -> tuple[str, Examples]:
        name = str(context.node_config["device"])
        return name, self.local[name]

    def run(self, name: str, rounds: int, waiting: bool) -> None:
        config = RunConfig(name=name, min_devices=1, rounds=rounds, seed=rounds, local=LOCAL)
        run_id = create_run(self.store, config)
        grid = InProcessGrid(self.store, run_id, self.app, self.nodes, self.bytes)
        told = (lambda result: self.may_go_on.acquire()) if waiting else (lambda result: True)
        drive_run(self.store, run_id, grid, config, lambda theta: evaluate(self.trainer, theta, self.test), told)


def says(driver: webdriver.Chrome, *texts: str) -> None:
    """Wait until the page shows these words."""
    shown = ""

    def found(d: webdriver.Chrome) -> bool:
        nonlocal shown
        shown = d.find_element(By.TAG_NAME, "body").text
        return all(text in shown for text in texts)

    try:
        WebDriverWait(driver, LONG_S, poll_frequency=0.1, ignored_exceptions=[WebDriverException]).until(found)
    except TimeoutException:
        pytest.fail(f"{texts} are not all on the page, which says {shown[:3000]!r}")


def go(driver: webdriver.Chrome, page: str) -> None:
    """By the links at the side: the log-in lasts as long as the page is not loaded anew."""
    link = f"[data-testid='stSidebarNavLink'][href$='/{page}']"
    driver.execute_script("document.querySelector(arguments[0]).click()", link)


def field(driver: webdriver.Chrome, label: str) -> WebElement:
    waiting = WebDriverWait(driver, LONG_S, poll_frequency=0.1)
    return waiting.until(
        lambda d: d.find_element(By.CSS_SELECTOR, f"[data-testid='stMain'] input[aria-label='{label}']")
    )


def choose(driver: webdriver.Chrome, label: str, option: str) -> None:
    """In a list, by the keyboard; the page may draw the list anew meanwhile."""

    def chosen(d: webdriver.Chrome) -> bool:
        field(d, label).send_keys(Keys.CONTROL, "a", Keys.NULL, option)
        for offered in d.find_elements(By.CSS_SELECTOR, "[role='option']"):
            if offered.text.strip() == option:
                offered.click()
                return True
        return False

    WebDriverWait(driver, LONG_S, poll_frequency=0.5, ignored_exceptions=[WebDriverException]).until(chosen)


def log_in(driver: webdriver.Chrome, name: str) -> None:
    says(driver, "Log in", "Password")
    field(driver, "Name").send_keys(name)
    field(driver, "Password").send_keys(PASSWORD, Keys.ENTER)


def roll_back_to_the_first(driver: webdriver.Chrome) -> None:
    says(driver, "Promote, pause, roll back")
    choose(driver, "What", "rollback")
    choose(driver, "Which release", "1")
    field(driver, "Its number again, to confirm").send_keys("1", Keys.ENTER)


# ---- without a mouse -------------------------------------------------------------------------------------------------


def focused(driver: webdriver.Chrome) -> str:
    """What the keyboard is on: its label, else its words."""
    script = "const e = document.activeElement; return (e.getAttribute('aria-label') || e.innerText || '').trim()"
    return str(driver.execute_script(script))


def press(driver: webdriver.Chrome, *keys: str) -> None:
    ActionChains(driver).send_keys(*keys).perform()


def tab_to(driver: webdriver.Chrome, name: str, most: int = 120) -> None:
    """From where the keyboard is, by Tab alone, to what is called that (or ends so: an icon's name comes first)."""
    met: list[str] = []
    while not met or not (met[-1] == name or met[-1].endswith(f"\n{name}")):
        assert len(met) < most, f"Tab does not come to {name!r}, only to {met}"
        press(driver, Keys.TAB)
        met.append(focused(driver))


def file_in(folder: Path, ending: str) -> Path:
    """What the browser has saved, once all of it is there."""
    place = WebDriverWait(folder, LONG_S, poll_frequency=0.1).until(
        lambda f: next((p for p in f.iterdir() if p.name.endswith(ending)), None)
    )
    assert isinstance(place, Path)
    return place


def test_without_a_mouse_an_operator_logs_in_changes_page_and_run_acts_and_saves_what_is_drawn(tmp_path: Path) -> None:
    database, saved = tmp_path / "fleet.db", tmp_path / "saved"
    saved.mkdir()
    fleet_database.fill(str(database), devices=12, rounds=4, planned=6)
    store = Store(str(database))
    with store.write() as session:
        set_operator(session, "olga", "operator", PASSWORD)
        session.execute(sa.update(Run).where(Run.id == 2).values(status="finished"))  # nothing is drawn anew meanwhile
        # a word that a spreadsheet would compute
        session.execute(sa.update(Run).where(Run.id == 1).values(name="=1+1"))
    with screenshot.serving(str(database)) as where, screenshot.browsing(1280, 1400) as driver:
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(saved)})
        driver.get(where)
        says(driver, "Log in", "Password")
        tab_to(driver, "Name")
        press(driver, "olga")
        tab_to(driver, "Password")
        press(driver, PASSWORD, Keys.ENTER)
        says(driver, "olga, operator", "Accuracy so far")

        tab_to(driver, "Compare")
        press(driver, Keys.ENTER)
        says(driver, "What each cost", "#2 assistant intents")
        points = [p.get_attribute("aria-label") for p in driver.find_elements(By.CSS_SELECTOR, POINT)]
        tab_to(driver, "Download as PNG")
        press(driver, Keys.ENTER)
        assert file_in(saved, ".png").read_bytes().startswith(b"\x89PNG\r\n")
        tab_to(driver, "Download the curves as CSV")
        press(driver, Keys.ENTER)
        with file_in(saved, "curves.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        told = {(row["run"], row["round"], f"{100 * float(row['accuracy']):.2f}%") for row in rows if row["accuracy"]}
        drawn = {_parts(str(label)) for label in points if "; Accuracy: " in str(label)}
        assert told == drawn
        assert len(drawn) == 9  # rounds 0 to 4 of the one, 0 to 3 of the other

        tab_to(driver, "Learning")
        press(driver, Keys.ENTER)
        says(driver, "On the devices' own examples", "Rounds")
        tab_to(driver, "Run")
        press(driver, "#1", Keys.ENTER)
        WebDriverWait(driver, LONG_S, poll_frequency=0.1).until(lambda d: "run=1" in d.current_url)

        tab_to(driver, "Models")
        press(driver, Keys.ENTER)
        says(driver, "Promote, pause, roll back")
        tab_to(driver, "What")
        press(driver, "rollback", Keys.ENTER)
        tab_to(driver, "Which release")
        press(driver, "1", Keys.ENTER)
        tab_to(driver, "Its number again, to confirm")
        press(driver, "1", Keys.ENTER)
        says(driver, "Done: release 4 is live for 100 %")
    with store.read() as session:
        assert [(a.who, a.outcome) for a in audit_lines(session) if a.act == "rollback"] == [("olga", "done")]
    store.close()


def _parts(label: str) -> tuple[str, str, str]:
    """Run, round and accuracy of a drawn point, as it is read aloud."""
    told = dict(part.split(": ", 1) for part in label.split("; "))
    return told["Run"], told["Round"], told["Accuracy"]


def test_two_people_watch_a_live_run_drill_into_it_compare_and_only_the_operator_may_act(
    tmp_path: Path, nano_built: BuiltArtifact, nano_artifact: Artifact, tiny_dataset: Dataset
) -> None:
    database = tmp_path / "fleet.db"
    fleet = Simulation(database, nano_built, nano_artifact, tiny_dataset)
    with fleet.store.write() as session:
        set_operator(session, "vera", "viewer", PASSWORD)
        set_operator(session, "olga", "operator", PASSWORD)
    fleet.run("the first", rounds=1, waiting=False)
    live = threading.Thread(target=fleet.run, args=("the second", 3, True), daemon=True)
    live.start()
    with screenshot.serving(str(database)) as where, screenshot.browsing(1280, 1400) as driver:
        driver.get(where)
        log_in(driver, "vera")
        fleet.may_go_on.release()  # past round 0
        says(driver, "vera, viewer", "the second", "round 1 of 3 is done")
        fleet.may_go_on.release()
        says(driver, "round 2 of 3 is done")  # by itself
        fleet.may_go_on.release()
        says(driver, "3 of 3 rounds done")
        go(driver, "round")
        says(driver, "Round 3: finished", "How far they came")
        choose(driver, "Round", "2")
        says(driver, "Round 2: finished", "4 of 4 devices counted")
        fleet.may_go_on.release()
        live.join(LONG_S)
        go(driver, "compare")
        says(driver, "Where their settings differ", "#1 the first", "#2 the second")
        go(driver, "models")
        roll_back_to_the_first(driver)
        says(driver, "Refused: vera is viewer; rollback needs operator")
        driver.find_element(By.XPATH, "//button[contains(., 'Log out')]").click()
        log_in(driver, "olga")
        roll_back_to_the_first(driver)
        says(driver, "Done: release 4 is live for 100 %")
        go(driver, "security")
        says(driver, "Failed log-ins", "Audit")
    with fleet.store.read() as session:
        acted = [(a.who, a.outcome) for a in audit_lines(session) if a.act == "rollback"]
        assert acted == [("olga", "done"), ("vera", "refused")]
        assert session.get_one(Release, 4).parameters == session.get_one(Release, 1).parameters
    fleet.store.close()
