"""The demo, whole, in a network of its own: it needs no network, and tries none."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COUNTERS = "cat /proc/net/snmp /proc/net/snmp6"


def can_isolate() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return (
        subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode
        == 0
    )


def no_routes(counters: str) -> dict[str, int]:
    """Packets that were meant for another machine, by protocol, from the kernel's own counters."""
    found = {}
    lines = counters.splitlines()
    for names, values in itertools.pairwise(lines):
        if names.startswith("Ip: Forwarding"):
            found["ip"] = int(dict(zip(names.split(), values.split(), strict=True))["OutNoRoutes"])
    for line in lines:
        if line.startswith("Ip6OutNoRoutes"):
            found["ip6"] = int(line.split()[1])
    return found


@pytest.mark.slow
def test_the_demo_runs_without_a_network_and_tries_to_reach_nobody_but_loopback(tmp_path: Path) -> None:
    if not can_isolate():
        pytest.skip("this system does not let a test make a network of its own (unshare -rn)")
    script = (
        "ip link set lo up && "
        "python3 -c \"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect_ex((chr(49) + '92.0.2.1', 9))\"; "
        f"{COUNTERS} > before; "
        f"{sys.executable} -m pocketfed.cli demo --folder demo --steps 60 --rounds 2; code=$?; "
        f"{COUNTERS} > after; exit $code"
    )
    done = subprocess.run(
        ["unshare", "-rn", "sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = no_routes((tmp_path / "before").read_text()), no_routes((tmp_path / "after").read_text())
    assert before["ip"] == 1  # the counter sees the one attempt that the script made itself
    assert after == before
    assert "rounds" in done.stdout
    assert "pocketfed dashboard --database" in done.stdout.replace("\n", "")
    assert (tmp_path / "demo" / "fleet.db").is_file()


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "mine" / "notes.txt"
    precious.parent.mkdir()
    precious.write_text("keep")
    done = subprocess.run(
        [sys.executable, "-m", "pocketfed.cli", "demo", "--folder", str(precious.parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "not from an earlier demo" in done.stderr
    assert precious.read_text() == "keep"


@pytest.mark.slow
def test_any_data_takes_the_place_of_the_demos_own(tmp_path: Path) -> None:
    rows = [("play jazz", "music"), ("what is the weather", "weather"), ("set a timer", "timer")]
    lines = [f"{text} number {i},{label}" for i in range(40) for text, label in rows]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "pocketfed.cli", "demo", "--data", "mine.csv", "--steps", "10", "--rounds", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "96 texts with 3 labels, dealt to 4 devices with skewed labels; 24 others for the test." in done.stdout
    assert (tmp_path / "demo" / "fleet.db").is_file()
