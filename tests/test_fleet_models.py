"""Fleets from models and traces: who is there when, how an assignment fares, and what is refused, in a sentence."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pocketfed.simulations.fleet import (
    WEEK_S,
    Dropout,
    FleetDevice,
    FleetError,
    Rules,
    Visit,
    Work,
    travel,
)
from pocketfed.simulations.fleet_files import load_fleet, preset_names
from pocketfed.simulations.fleet_model import FleetModel, Tier

HOUR = 3600.0
NIGHT = tuple(1.0 if hour < 6 else 0.0 for hour in range(24))


def device(*visits: tuple[float, float]) -> FleetDevice:
    """1 ms a token, 8 kbit/s down, 4 kbit/s up."""
    return FleetDevice("all", 1.0, 8000.0, 4000.0, tuple(Visit(*visit) for visit in visits))


# ---- visits ----------------------------------------------------------------------------------------------------------


def test_a_week_repeats_and_visits_that_touch_are_one() -> None:
    found = device((0.0, 100.0), (1000.0, 2000.0), (2000.0, 3000.0), (WEEK_S - 50, WEEK_S))
    assert found.visit(50.0) == Visit(-50.0, 100.0)  # the one of the week's end goes on at its beginning
    assert found.visit(500.0) is None
    assert found.visit(1500.0) == Visit(1000.0, 3000.0)
    assert found.visit(3 * WEEK_S + 2500) == Visit(3 * WEEK_S + 1000, 3 * WEEK_S + 3000)
    assert found.visit(WEEK_S + 99) == Visit(WEEK_S - 50, WEEK_S + 100)
    assert found.visit(100.0) is None  # the end is not in it
    assert [found.next_there(at) for at in (0.0, 100.0, 999.0, 1500.0, 3000.0)] == [0, 1000, 1000, 1500, WEEK_S - 50]
    assert found.next_there(WEEK_S + 100) == WEEK_S + 1000


def test_visits_that_touch_but_differ_keep_what_each_is() -> None:
    plugged = (Visit(0.0, HOUR, charging=False, battery=0.3), Visit(HOUR, 2 * HOUR))
    found = FleetDevice("all", 1.0, 8000.0, 4000.0, plugged)
    assert [found.visit(at) for at in (10.0, HOUR)] == list(plugged)
    pulled = (Visit(0.0, HOUR, metered=True), Visit(HOUR, WEEK_S, charging=False, battery=0.3))
    found = FleetDevice("all", 1.0, 8000.0, 4000.0, pulled)
    assert [found.visit(at) for at in (10.0, HOUR, WEEK_S - 1)] == [*pulled, pulled[1]]
    assert found.visit(WEEK_S) == Visit(WEEK_S, WEEK_S + HOUR, metered=True)


def test_a_visit_begins_where_the_one_before_ends_whatever_the_sums_are_rounded_to() -> None:
    third = 100_000 / 3
    two = (Visit(0.0, third, charging=False, battery=0.5), Visit(third, HOUR * 20))
    found = FleetDevice("all", 1.0, 8000.0, 4000.0, two)
    for week in range(200):
        first = found.visit(week * WEEK_S)
        assert first is not None
        second = found.visit(first.end)
        assert second is not None
        assert (second.begin, second.charging) == (first.end, True)


def test_a_device_that_is_there_all_week_is_always_there() -> None:
    assert device((0.0, WEEK_S)).visit(1e8) == Visit(0.0, math.inf)
    assert device((0.0, HOUR), (HOUR, WEEK_S)).visit(5 * WEEK_S) == Visit(0.0, math.inf)


# ---- one assignment --------------------------------------------------------------------------------------------------

WORK = Work(down_bytes=10_000, tokens=30_000, up_bytes=10_000)  # 10 s down, 30 s of training, 20 s up


def test_an_assignment_takes_its_download_its_training_and_its_upload() -> None:
    whole = travel(device(), WORK, 100.0, Dropout(), (0.0, 0.0, 0.0))
    assert (whole.begin, whole.end, whole.lost) == (100.0, 160.0, "")
    assert [whole.phase(at) for at in (105.0, 110.0, 139.0, 140.0, 500.0)] == [
        "download", "training", "training", "upload", "upload",
    ]  # fmt: skip
    assert [whole.downloaded(at) for at in (100.0, 105.0, 110.0, 160.0)] == [0, 5000, 10_000, 10_000]
    assert [whole.trained(at) for at in (105.0, 120.0, 140.0, 500.0)] == [0.0, 10.0, 30.0, 30.0]


@pytest.mark.parametrize(
    ("dice", "leaves", "end", "lost", "silent"),
    [
        ((0.49, 0.5, 0.0), math.inf, 25.0, "training", True),  # half of the 30 s after the download
        ((0.51, 0.5, 0.0), math.inf, 40.0, "upload", True),  # trained, and lost before the upload
        ((0.51, 0.5, 0.99), math.inf, 60.0, "", False),
        ((0.51, 0.5, 0.99), 4.0, 4.0, "download", False),  # it had to go, and said so
        ((0.49, 0.5, 0.0), 20.0, 20.0, "training", False),
        ((0.51, 0.5, 0.99), 59.0, 59.0, "upload", False),
    ],
)
def test_dice_and_the_visits_end_decide_where_a_device_is_lost(
    dice: tuple[float, ...], leaves: float, end: float, lost: str, silent: bool
) -> None:
    found = travel(device(), WORK, 0.0, Dropout(training=0.5, upload=0.5), dice).left(leaves)
    assert (found.end, found.lost, found.silent) == (end, lost, silent)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_every_preset_draws_as_many_devices_as_asked_and_the_seed_decides() -> None:
    assert preset_names() == ["long-tail", "phones", "steady"]
    for name in preset_names():
        fleet = load_fleet(name, 7, 0)
        assert len(fleet.devices) == 7
        assert fleet == load_fleet(name, 7, 0)
        assert all(device.visits for device in fleet.devices)
    assert load_fleet("phones", 7, 0) != load_fleet("phones", 7, 1)


def test_the_long_tail_is_a_tenth_ten_times_slower_and_thirty_percent_lost() -> None:
    fleet = load_fleet("long-tail", 2000, 0)
    slow = [d for d in fleet.devices if d.tier == "slow"]
    assert len(slow) == 200  # tiers are dealt, not drawn: exactly a tenth
    usual = [d for d in fleet.devices if d.tier == "usual"]
    for name, factor in (("ms_per_token", 10.0), ("down_bps", 0.1), ("up_bps", 0.1)):
        ratio = np.median([getattr(d, name) for d in slow]) / np.median([getattr(d, name) for d in usual])
        assert ratio == pytest.approx(factor, rel=0.15)
    lost = fleet.rules.dropout
    assert 1 - (1 - lost.download) * (1 - lost.training) * (1 - lost.upload) == pytest.approx(0.3, abs=0.001)


def test_availability_is_the_share_of_devices_that_are_there_at_each_local_hour() -> None:
    """2000 devices at 0.25 by day and 0.75 by night: three standard deviations of a share are 0.03."""
    shares = tuple(0.75 if hour < 6 else 0.25 for hour in range(24))
    fleet = FleetModel(availability=shares, time_zones=(5.0,)).draw(2000, 0)
    for local_hour, share in ((1, 0.75), (4, 0.75), (11, 0.25), (20, 0.25)):
        # Hours begin at another minute on each device: an hour's middle is in that hour, or the next, for all of them.
        at = 2 * 24 * HOUR + (local_hour - 5 - 0.5) * HOUR + 0.5 * HOUR
        there = sum(device.visit(at) is not None for device in fleet) / 2000
        assert there == pytest.approx(share, abs=0.03), local_hour


def test_a_device_that_is_always_there_charges_anew_every_day() -> None:
    """200 devices and 7 days: a standard deviation of the share of days is 0.013."""
    days = [found.visits for found in FleetModel((Tier(charging=0.5),)).draw(200, 0)]
    allowed = FleetModel((Tier(charging=0.5),), rules=Rules(min_battery=0.0)).draw(200, 0)
    for found in allowed:
        assert all(found.visit(hour * HOUR) is not None for hour in range(168))
    plugged = np.mean([[found.visit((24 * day + 0.5) * HOUR).charging for day in range(7)] for found in allowed])  # type: ignore[union-attr]
    assert plugged == pytest.approx(0.5, abs=0.05)
    off = [visit for visits in days for visit in visits if not visit.charging]
    assert all(visit.end - visit.begin <= 24 * HOUR + 1e-6 for visit in off)
    assert len({visit.battery for visit in off}) > 0.8 * len(
        off
    )  # the two parts of one at the week's end have the same


def test_a_fleet_that_always_charges_is_there_for_ever() -> None:
    for found in FleetModel().draw(5, 0):
        assert found.visits == (Visit(0.0, WEEK_S),)


def test_time_zones_shift_the_night() -> None:
    """Local 0 to 6 h, five hours east of UTC: from 19 to 1 h UTC, and up to an hour earlier for the device's own minute."""
    for found in FleetModel(availability=NIGHT, time_zones=(5.0,)).draw(20, 0):
        assert found.visit(24 * HOUR + 20 * HOUR) is not None
        assert found.visit(24 * HOUR + 2 * HOUR) is None
        whole = [visit.end - visit.begin for visit in found.visits if visit.end < WEEK_S and visit.begin > 0]
        assert whole == pytest.approx([6 * HOUR] * len(whole))
        assert len(whole) >= 6


def test_rules_take_away_visits_off_the_charger_and_on_metered_links() -> None:
    tier = Tier(charging=0.5, metered=0.5)
    everything = FleetModel((tier,), NIGHT).draw(300, 0)
    allowed = FleetModel((tier,), NIGHT, rules=Rules(needs_charging=True, metered_allowed=False)).draw(300, 0)
    before, after = (sum(len(device.visits) for device in fleet) for fleet in (everything, allowed))
    # Unplugged ones with a battery below 20 % are no visits in either: (0.5 + 0.5 * 0.8) of all against 0.25 of all; and
    # whoever has none left in seven nights has another week.
    assert after / before == pytest.approx(0.25 / 0.9 / (1 - 0.75**7), rel=0.1)
    assert all(v.charging and not v.metered for device in allowed for v in device.visits)


# ---- traces ----------------------------------------------------------------------------------------------------------

TRACE = """device,active,inactive,computation,download,upload,charging,metered,battery,tier
x,0,100,2.5,1000,500,1,0,,old
y,50,60,,,,,,,
x,200,300,,,,0,0,0.9,
"""


def write(folder: Path, text: str, name: str = "fleet.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_a_trace_is_read_as_it_stands(tmp_path: Path) -> None:
    fleet = load_fleet(write(tmp_path, TRACE), 2, 0)
    x, y = fleet.devices
    assert (x.tier, x.ms_per_token, x.down_bps, x.up_bps) == ("old", 2.5, 1e6, 5e5)
    assert x.visits == (Visit(0.0, 100.0), Visit(200.0, 300.0, charging=False, battery=0.9))
    assert (y.tier, y.ms_per_token, y.down_bps, y.up_bps) == ("trace", 1.0, 2e7, 2e7)
    assert x.visit(WEEK_S + 50) == Visit(WEEK_S, WEEK_S + 100)
    assert load_fleet(write(tmp_path, TRACE), 1, 0).devices == (x,)


def test_a_trace_says_what_a_battery_holds_and_what_work_takes(tmp_path: Path) -> None:
    rows = "device,active,inactive,battery_wh,watts\nx,0,9,20,2.5\nx,10,19,,\ny,0,9,,\n"
    x, y = load_fleet(write(tmp_path, rows), 2, 0).devices
    assert [(d.battery_wh, d.watts) for d in (x, y)] == [(20.0, 2.5), (15.0, 4.0)]


def test_a_model_file_may_take_its_devices_from_a_trace_and_set_the_rules(tmp_path: Path) -> None:
    write(tmp_path, TRACE)
    fleet = load_fleet(
        write(tmp_path, 'trace = "fleet.csv"\nneeds_charging = true\n[dropout]\nupload = 0.5\n', "f.toml"), 2, 0
    )
    assert fleet.devices[0].visits == (Visit(0.0, 100.0),)
    assert fleet.rules.dropout == Dropout(upload=0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("device,active\nx,0\n", "lacks the column 'inactive'; it needs device, active, inactive"),
        ("device,active,inactive,speed\nx,0,1,2\n", "has the unknown column 'speed'"),
        ("device,active,inactive,active\nx,0,1,2\n", "has a column twice"),
        ("device,active,inactive\n", "has no device; give one line"),
        ("device,active,inactive\nx,-1,5\n", "line 2: active is '-1'; it is a number between 0 and 1e"),
        ("device,active,inactive\nx,nan,5\n", "line 2: active is 'nan'; it is a number"),
        ("device,active,inactive\nx,0,inf\n", "line 2: inactive is 'inf'; it is a number"),
        ("device,active,inactive\nx,0,\n", "line 2: inactive is ''; it is a number"),
        ("device,active,inactive\nx,5,5\n", "line 2: it goes at 5 s, and comes at 5 s"),
        (
            "device,active,inactive\nx,0,10\ny,0,1\nx,9,20\n",
            "line 4: device 'x' comes at 9 s, before it has gone at 10 s",
        ),
        ("device,active,inactive,computation\nx,0,1,0\n", "computation is '0'; it is a number between 1e-09"),
        ("device,active,inactive,computation\nx,0,1,2\nx,2,3,4\n", "line 3: device 'x' has another 'computation'"),
        ("device,active,inactive\nx,0,1,2\n", "line 2 has more cells than columns"),
        ("device,active,inactive\n,0,1\n", "or no device; mend the line"),
        (
            "device,active,inactive,charging,battery\nx,0,1,0,0.1\ny,0,1,1,1\n",
            "device 'x' is never there while it may work",
        ),
        ("device,active,inactive\nx,0,1\n", "has 1 devices for 2; give at most 1 devices or a longer trace"),
        ('device,active,inactive\n"x,0,1\n', "cannot be read as CSV"),
    ],
)
def test_a_bad_trace_is_refused_in_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FleetError, match=says) as caught:
        load_fleet(write(tmp_path, text), 2, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed = 3", "there is no setting speed; the settings are availability, away_s, dropout"),
        ("availability = [1.0, 2.0]", "availability has 2 values; give 24, one for each hour, or 168"),
        (f"availability = {[0.0] * 24}", "availability is 0 at every hour, so no device is ever there"),
        (f"availability = {[-0.5] * 24}", "availability has -0.5; its values lie between 0 and 1"),
        ("availability = [nan" + ", 1.0" * 23 + "]", "availability has nan"),
        ("availability = 1.0", "availability is 1.0; it is a list of numbers"),
        ("time_zones = []", "at least one tier and one time zone"),
        ("time_zones = [99]", "time_zones has 99; its values lie between -24 and 24"),
        ("away_s = -1.0", "away_s is -1; it lies between 0 and 1e"),
        ("away_s = 'long'", "away_s is 'long'; it is a float"),
        ("needs_charging = 1", "needs_charging is 1; it is a bool"),
        ("[dropout]\ntraining = 1.5", "dropout.training is 1.5; it lies between 0 and 1"),
        ("[dropout]\nearly = 0.5", "there is no setting dropout.early; the settings are download, training, upload"),
        ("dropout = 0.3", "dropout is 0.3; it is a table"),
        ("[[tiers]]\nname = 'a'\nms_per_token = 0.0", "tier 'a': ms_per_token is 0; it lies between 1e-09"),
        ("[[tiers]]\nname = 'a'\nms_per_token = nan", "tier 'a': ms_per_token is nan"),
        ("[[tiers]]\nupload_mbps = -5", "upload_mbps is -5"),
        ("[[tiers]]\ncpu = 5", "there is no setting tiers.cpu"),
        ("[tiers]\nshare = 1.0", r"tiers are tables of their own; write \[\[tiers\]\]"),
        (
            "needs_charging = true\n[[tiers]]\nname = 'b'\ncharging = 0.0",
            "tier 'b' never charges, or is always metered",
        ),
        ("needs_charging = true\n[[tiers]]\nname = 'b'\ncharging = 1e-12", "tier 'b' was not there once in 1000 weeks"),
        ("trace = 'x.csv'\ntime_zones = [1.0]", "a trace has its devices itself; leave out time_zones"),
        ("tiers = [", "cannot be read as TOML"),
    ],
)
def test_a_bad_model_is_refused_in_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FleetError, match=says) as caught:
        load_fleet(write(tmp_path, text, "fleet.toml"), 2, 0)
    assert "\n" not in str(caught.value).replace("(at line 1, column 10)\n", "")


def test_a_fleet_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        FleetError, match=r"there is no fleet 'tablets'; give long-tail, phones, steady, or a TOML or CSV"
    ):
        load_fleet("tablets", 2, 0)
    with pytest.raises(FleetError, match=r"is neither \.toml \(a model\) nor \.csv \(a trace\); rename it"):
        load_fleet(write(tmp_path, "", "fleet.json"), 2, 0)
