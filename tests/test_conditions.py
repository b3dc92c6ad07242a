"""When a device may work: what is missing and how it is said, what Linux tells of it, what was used up."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfed.client_sdk.clock import Clock
from pocketfed.client_sdk.conditions import Conditions, Readings, Used, unmet
from pocketfed.client_sdk.errors import ConfigurationError, StorageError
from pocketfed.client_sdk.home import check_room
from pocketfed.client_sdk.linux import LinuxReader
from pocketfed.client_sdk.status import Progress, Voice
from pocketfed.client_sdk.usage import SAVE_EVERY_BYTES, Usage
from pocketfed.client_sdk.watch import FRESH_S, Watch, home_bytes

NOON = datetime(2026, 6, 1, 12, 0)


class Hands(Clock):
    """A clock whose hands are moved."""

    def __init__(self) -> None:
        self.at, self.since = NOON, 0.0

    def passed(self) -> float:
        return self.since

    def now(self) -> datetime:
        return self.at

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.move(seconds)
        return event.is_set()

    def move(self, seconds: float) -> None:
        self.since, self.at = self.since + seconds, self.at + timedelta(seconds=seconds)


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_by_default_nothing_has_to_hold() -> None:
    worst = Readings(charging=False, battery=1, metered=True, idle=False, temperature_c=90)
    assert not unmet(Conditions(), worst, Used(10**12, 10**12, 0.0), NOON).all


@pytest.mark.parametrize(
    ("asked", "bad", "good", "kind", "words"),
    [
        ({"charging": True}, {"charging": False}, {"charging": True}, "compute", "a charger (it is not plugged in)"),
        ({"battery": 50}, {"battery": 32.4}, {"battery": 50}, "compute", "a battery of 50 % (it has 32.4 %)"),
        ({"idle": True}, {"idle": False}, {"idle": True}, "compute", "the device to be idle (somebody uses it)"),
        ({"max_temperature_c": 40}, {"temperature_c": 40.6}, {"temperature_c": 40}, "compute",
         "at most 40 °C (it has 41 °C)"),
        ({"unmetered": True}, {"metered": True}, {"metered": False}, "transfer",
         "an unmetered network (this one is metered)"),
    ],
)  # fmt: skip
def test_a_reading_is_missing_by_name_and_in_words_and_what_is_not_known_counts_only_if_strict(
    asked: dict[str, Any], bad: dict[str, Any], good: dict[str, Any], kind: str, words: str
) -> None:
    (name,) = asked
    name = {"max_temperature_c": "temperature"}.get(name, name)
    found = unmet(Conditions(**asked), Readings(**bad), Used(), NOON)
    assert getattr(found, kind) == found.all == {name: words}
    assert not unmet(Conditions(**asked), Readings(**good), Used(), NOON).all
    assert not unmet(Conditions(**asked), Readings(), Used(), NOON).all
    strict = unmet(Conditions(**asked, strict=True), Readings(), Used(), NOON)
    assert strict.all[name].endswith("(not known here)")


@pytest.mark.parametrize("no", [False, 0, np.bool_(False)])
def test_what_an_app_means_by_no_is_no(no: Any) -> None:
    asked = Conditions(charging=True, idle=True, unmetered=True)
    assert list(unmet(asked, Readings(charging=no, idle=no, metered=not no), Used(), NOON).all) == [
        "charging",
        "idle",
        "unmetered",
    ]


def test_what_was_used_up_is_missing_too() -> None:
    asked = Conditions(max_mb_per_day=50, max_disk_mb=200, min_separation_s=3600)
    assert not unmet(asked, Readings(), Used(49_999_999, 199_999_999, 3600.0), NOON).all
    found = unmet(asked, Readings(), Used(50_000_000, 200_000_000, 600.0), NOON)
    assert found.transfer == {"data": "tomorrow (50.0 of 50 MB were used today)"}
    assert found.begin == {
        "disk": "room in its folder (200 of 200 MB are used)",
        "separation": "3600 s between rounds to pass (3000 s are left)",
    }
    assert not found.compute


def test_the_apps_own_reason_holds_everything_back_in_its_own_words() -> None:
    found = unmet(Conditions(), Readings(hold="the app to come back to the front"), Used(), NOON)
    assert found.compute == found.transfer == {"app": "the app to come back to the front"}


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        (("22:00", "06:00"), ("22:00", "23:59", "00:00", "05:59"), ("06:00", "12:00", "21:59")),
        (("09:30", "17:00"), ("09:30", "16:59"), ("09:29", "17:00", "00:00")),
        (("08:00", "08:00"), ("00:00", "08:00", "23:59"), ()),
    ],
)
def test_hours_include_their_first_minute_and_go_over_midnight(
    window: tuple[str, str], inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    def missing(moment: str) -> Any:
        local = datetime.fromisoformat(f"2026-06-01T{moment}")
        return unmet(Conditions(window=window), Readings(), Used(), local).compute

    assert [m for m in inside if missing(m)] == []
    assert [m for m in outside if not missing(m)] == []
    if outside:
        assert missing(outside[0]) == {"window": f"the hours from {window[0]} to {window[1]} (it is {outside[0]})"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"battery": 101}, "battery is 101; give a number from 0 to 100"),
        ({"battery": float("nan")}, "battery is nan"),
        ({"max_mb_per_day": -1}, "max_mb_per_day is -1"),
        ({"patience_s": 1e9}, "patience_s is 1000000000.0; give a number from 0 to 3600"),
        ({"window": ("25:00", "6")}, "give two local times"),
        ({"window": ("22:00",)}, "give two local times"),
    ],
)
def test_conditions_that_cannot_be_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Conditions(**values)


# ---- Linux -----------------------------------------------------------------------------------------------------------


class Machine:
    """Files as the kernel has them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.read = LinuxReader(root / "sys", root / "proc")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text + "\n")

    def supply(self, name: str, **values: Any) -> None:
        for key, value in values.items():
            self.write(f"sys/class/power_supply/{name}/{key}", str(value))

    def route(self, *rows: tuple[str, str, int]) -> None:
        """(interface, destination, metric)"""
        head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT"
        lines = [
            f"{i}\t{d}\t0102A8C0\t0003\t0\t0\t{m}\t{'00000000' if d == '00000000' else '00FFFFFF'}\t0\t0\t0"
            for i, d, m in rows
        ]
        self.write("proc/net/route", "\n".join([head, *lines]))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_machine_that_says_nothing_is_unknown_in_everything(machine: Machine) -> None:
    assert machine.read() == Readings()


def test_a_box_without_a_battery_runs_on_mains(machine: Machine) -> None:
    (machine.root / "sys/class/power_supply").mkdir(parents=True)
    assert (machine.read().charging, machine.read().battery) == (True, None)
    machine.supply("mouse", type="Battery", scope="Device", status="Discharging", capacity=3)
    assert (machine.read().charging, machine.read().battery) == (True, None)


@pytest.mark.parametrize(
    ("status", "online", "charging"),
    [("Discharging", 0, False), ("Charging", 0, True), ("Full", 0, True), ("Not charging", 1, True),
     ("Not charging", 0, False), ("Unknown", 0, None), ("Unknown", 1, True)],
)  # fmt: skip
def test_a_laptop_charges_when_its_battery_or_its_plug_says_so(
    machine: Machine, status: str, online: int, charging: bool | None
) -> None:
    machine.supply("AC", type="Mains", online=online)
    machine.supply("BAT0", type="Battery", status=status, capacity=40)
    machine.supply("BAT1", type="Battery", status=status, capacity=60)
    assert (machine.read().charging, machine.read().battery) == (charging, 50)


def test_the_hottest_sensible_zone_counts(machine: Machine) -> None:
    for zone, milli in enumerate(("41500", "-274000", "0", "65261000", "38000", "")):
        machine.write(f"sys/class/thermal/thermal_zone{zone}/temp", milli)
    assert machine.read().temperature_c == 41.5


@pytest.mark.parametrize(
    ("rows", "metered"),
    [
        ((("eth0", "00000000", 100),), None),
        ((("wwan0", "00000000", 700),), True),
        ((("ppp0", "00000000", 0), ("eth0", "000200C0", 0)), True),
        ((("wwan0", "00000000", 700), ("wlan0", "00000000", 600)), None),
        ((("wwan0", "000200C0", 0),), None),  # reachable over it, but not the way out
        ((("usb0", "00000000", 0),), True),  # a phone that shares its network
        ((("wlp1s0mbim", "00000000", 0),), True),
    ],
)
def test_the_way_out_is_metered_over_a_modem_or_a_phone(
    machine: Machine, rows: tuple[tuple[str, str, int], ...], metered: bool | None
) -> None:
    machine.route(*rows)
    (machine.root / "drivers/rndis_host").mkdir(parents=True)
    (machine.root / "sys/class/net/usb0/device").mkdir(parents=True)
    (machine.root / "sys/class/net/usb0/device/driver").symlink_to(machine.root / "drivers/rndis_host")
    machine.write("sys/class/net/wlp1s0mbim/uevent", "DEVTYPE=wwan\nINTERFACE=wlp1s0mbim")
    assert machine.read().metered is metered


def test_this_machine_can_be_read_again_and_again() -> None:
    reader = LinuxReader()
    for _ in range(3):
        assert isinstance(reader(), Readings)


# ---- what was used ---------------------------------------------------------------------------------------------------


def test_bytes_are_of_a_day_and_outlive_the_process(tmp_path: Path) -> None:
    clock = Hands()
    usage = Usage(tmp_path / "usage.json", clock)
    usage.add(SAVE_EVERY_BYTES)
    usage.add(5)
    assert usage.bytes_today() == SAVE_EVERY_BYTES + 5
    assert (
        Usage(tmp_path / "usage.json", clock).bytes_today() == SAVE_EVERY_BYTES
    )  # killed: less than a MiB is forgotten
    usage.save()
    assert Usage(tmp_path / "usage.json", clock).bytes_today() == SAVE_EVERY_BYTES + 5
    clock.move(12 * 3600)
    assert usage.bytes_today() == Usage(tmp_path / "usage.json", clock).bytes_today() == 0


def test_fault_13_the_pause_after_a_round_outlives_the_process_and_a_clock_that_is_set_back(tmp_path: Path) -> None:
    clock = Hands()
    usage = Usage(tmp_path / "usage.json", clock)
    assert usage.since_round_s() == float("inf")
    usage.end_round()
    clock.move(600)
    again = Usage(tmp_path / "usage.json", clock)
    assert again.since_round_s() == pytest.approx(600)
    clock.at -= timedelta(days=400)
    assert again.since_round_s() == 0  # it counts from now, not from a year to come
    clock.move(60)
    assert again.since_round_s() == pytest.approx(60)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"bytes": -1, "round_at": "x", "day": 3}', b"\xff"])
def test_a_damaged_note_of_what_was_used_begins_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "usage.json").write_bytes(content)
    usage = Usage(tmp_path / "usage.json", Hands())
    assert (usage.bytes_today(), usage.since_round_s()) == (0, float("inf"))


def test_room_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(bytes(500))
    assert home_bytes(tmp_path) == 1500
    check_room(tmp_path, 500, 1500, 2000.0)
    with pytest.raises(StorageError, match=r"would have 0 MB; the app allows 0\.002, see max_disk_mb"):
        check_room(tmp_path, 501, 1500, 2000.0)
    with pytest.raises(StorageError, match="MB more do not fit on the disk of"):
        check_room(tmp_path, 10**18, 0, float("inf"))


# ---- watching --------------------------------------------------------------------------------------------------------


def watch(source: Callable[[], Readings], folder: Path, clock: Hands, asked: Conditions | None = None) -> Watch:
    return Watch(asked or Conditions(charging=True), source, Usage(folder / "usage.json", clock), folder, clock)


def test_the_sensors_are_asked_once_a_second_and_at_once_when_the_app_says_so(tmp_path: Path) -> None:
    clock, asked = Hands(), []

    def source() -> Readings:
        asked.append(1)
        return Readings(charging=len(asked) != 2)

    watched = watch(source, tmp_path, clock)
    for _ in range(100):
        assert watched.may_compute()
    assert len(asked) == 1
    clock.move(FRESH_S)
    assert not watched.may_compute()
    watched.forget_reading()
    assert watched.may_compute()
    assert len(asked) == 3


@pytest.mark.parametrize("broken", [lambda: 1 / 0, lambda: None, lambda: {"charging": True}])
def test_fault_28_a_readings_callback_that_fails_holds_the_device_back_and_is_logged_once(
    broken: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Hands()
    watched = watch(broken, tmp_path, clock)
    with caplog.at_level(logging.ERROR, "pocketfed"):
        for _ in range(3):
            assert "the app's readings callback to work again" in watched.look().compute["app"]
            clock.move(2.0)
    assert len(caplog.records) == 1


def test_fault_28_a_callback_that_raises_is_contained_logged_once_and_told(caplog: pytest.LogCaptureFixture) -> None:
    def broken(value: object) -> None:
        raise ZeroDivisionError("the app's own")

    voice = Voice("phone", broken, broken)
    with caplog.at_level(logging.ERROR, "pocketfed"):
        for number in range(3):
            voice.say(f"status {number}")
            voice.tell(Progress(1, "training", 1.0))
    assert len(caplog.records) == 2  # one for each callback
    assert voice.status == "status 2"
    assert voice.last_error == "the app's on_progress callback failed: ZeroDivisionError"


def test_progress_is_told_at_the_ends_and_seldom_in_between() -> None:
    told: list[Progress] = []
    voice = Voice("phone", None, told.append)
    for step in range(1001):
        voice.tell(Progress(1, "training", step / 1000))
    assert told[0].fraction == 0.0
    assert told[-1].fraction == 1.0
    assert len(told) < 20
    assert json.dumps([t.phase for t in told[:1]]) == '["training"]'
