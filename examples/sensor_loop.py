"""A sensor box, a Raspberry Pi say: tells what a sensor's events mean, learns from its owner, and trains at night.

    pip install pocketfed
    read-sensors | python examples/sensor_loop.py --coordinator 127.0.0.1:8765 --home sensor-home

A line of input is a reading, `kitchen 21.5`, what the last event was, `= cooking`, or `?` for what the box waits for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime

from pocketfed.client_sdk import Conditions, Device, PocketfedError

THRESHOLDS = (3.0, 16.0, 26.0, 35.0)  # degrees Celsius
DAY_PARTS = ("at night", "in the morning", "in the afternoon", "in the evening")


def events(place: str, before: float, now: float, at: datetime) -> Iterator[str]:
    """What a language model can read: one sentence for each threshold that was crossed."""
    speed = "fast" if abs(now - before) > 5 else "slowly"
    for threshold in THRESHOLDS:
        if (before < threshold) != (now < threshold):
            way = "rose above" if now > before else "fell below"
            yield f"the {place} {way} {threshold:g} degrees {speed} {DAY_PARTS[at.hour // 6]}"


def watch(device: Device, lines: Iterable[str]) -> None:
    last: dict[str, float] = {}
    event = 0  # the id of the newest
    for line in lines:
        first, _, rest = line.strip().partition(" ")
        if first == "=":  # the owner's word, from a button or a chat
            print("noted" if device.correct(event, rest) else f"nothing to call {rest!r}", flush=True)
            continue
        if first == "?":
            print(device.status(), flush=True)
            continue
        try:
            reading = float(rest)
        except ValueError:
            print(f"{line.strip()!r} is no reading; give PLACE DEGREES", flush=True)
            continue
        for text in events(first, last.get(first, reading), reading, datetime.now()):
            try:
                guess = device.predict(text, keep=True)
                event = guess.example_id
                print(f"{text}: {guess.label} ({guess.probability:.0%})", flush=True)
            except PocketfedError as error:  # no model yet: the event is kept, and can be labelled all the same
                event = device.add_examples([(text, None)]).ids[0]
                print(f"{text}: {error}", flush=True)
        last[first] = reading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", required=True, help="HOST:PORT")
    parser.add_argument("--home", required=True, help="a folder for this device alone")
    parser.add_argument("--window", nargs=2, default=("22:00", "06:00"), metavar=("FROM", "TO"), help="when to train")
    given = parser.parse_args()
    cool = Conditions(window=tuple(given.window), max_temperature_c=75)  # of the board, not of the kitchen
    with Device(given.coordinator, given.home, conditions=cool, max_memory_mb=400, max_examples=2000) as device:
        device.start()
        watch(device, sys.stdin)
        print(device.status(), flush=True)


if __name__ == "__main__":
    main()
