"""Logging in by an organisation: a real OpenID provider, a real browser, and the roles of our own operators."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fleet_database
import pytest
import screenshot
from selenium import webdriver
from selenium.common.exceptions import TimeoutException, WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pocketfed.coordinator.operators import set_operator
from pocketfed.coordinator.store import Store

ROOT = Path(__file__).resolve().parents[1]
LONG_S = 180.0
PEOPLE = {"olga": True}  # whether the provider vouches for their addresses
ADDRESS = "{}@fleet.example"


pytestmark = [
    pytest.mark.skipif(screenshot.missing() is not None, reason=str(screenshot.missing())),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("oidc_provider_mock", "authlib")),
        reason="there is no OpenID provider to try: pip install oidc-provider-mock 'streamlit[auth]'",
    ),
]


@pytest.fixture
def provider() -> Iterator[str]:
    """Its address. A process of its own: what it imports warns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    claims = ({"sub": name, "email": ADDRESS.format(name), "email_verified": good} for name, good in PEOPLE.items())
    words = [word for told in claims for word in ("--user-claims", json.dumps(told))]
    process = subprocess.Popen(
        [sys.executable, "-m", "oidc_provider_mock", "--port", str(port), *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.fail(f"the provider ended with code {process.wait(0.1)}")
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{address}/.well-known/openid-configuration", timeout=1),
            ):
                break
        yield address
    finally:
        process.terminate()
        process.wait(20)


def says(driver: webdriver.Chrome, *texts: str) -> None:
    shown = ""

    def found(d: webdriver.Chrome) -> bool:
        nonlocal shown
        shown = d.find_element(By.TAG_NAME, "body").text
        return all(text in shown for text in texts)

    try:
        WebDriverWait(driver, LONG_S, poll_frequency=0.1, ignored_exceptions=[WebDriverException]).until(found)
    except TimeoutException:
        pytest.fail(f"{texts} are not all on the page {driver.current_url}, which says {shown[:2000]!r}")


def press(driver: webdriver.Chrome, text: str) -> None:
    waiting = WebDriverWait(driver, LONG_S, poll_frequency=0.1, ignored_exceptions=[WebDriverException])
    waiting.until(lambda d: d.find_element(By.XPATH, f"//button[contains(., '{text}')]").click() or True)


def test_an_operator_comes_in_by_the_organisation_and_logs_out_there_too(
    tmp_path: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "fleet.db"
    fleet_database.fill(str(database), devices=6, rounds=1, planned=2)
    store = Store(str(database))
    with store.write() as session:
        for name in PEOPLE:
            set_operator(session, ADDRESS.format(name), "operator", "not used by anybody")
    monkeypatch.chdir(tmp_path)  # where Streamlit looks for .streamlit/secrets.toml
    port, words = screenshot.start_of_command()
    (tmp_path / ".streamlit").mkdir()
    (tmp_path / ".streamlit" / "secrets.toml").write_text(
        f'[auth]\nredirect_uri = "http://127.0.0.1:{port}/oauth2callback"\ncookie_secret = "{"k" * 40}"\n'
        f'client_id = "pocketfed"\nclient_secret = "s3cret"\n'
        f'server_metadata_url = "{provider}/.well-known/openid-configuration"\n'
    )
    with screenshot.serving(str(database), (port, words)) as where, screenshot.browsing(1280, 1000) as driver:
        driver.get(where)
        press(driver, "Log in with your organisation")
        says(driver, "olga")
        press(driver, "olga")
        says(driver, f"{ADDRESS.format('olga')}, operator", "Last problems")
        press(driver, "Log out")
        says(driver, "End session")  # at the provider, too
    store.close()
    shutil.rmtree(tmp_path / ".streamlit")
