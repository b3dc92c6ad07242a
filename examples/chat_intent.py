"""A chat box that guesses what you want, and learns from what you say it should have guessed.

    pip install pocketfed                                     # and somewhere: pocketfed serve --database fleet.db
    python examples/chat_intent.py --coordinator 127.0.0.1:8765 --home chat-home

Your sentences stay in --home; encrypted, if CHAT_KEY holds 64 hex digits (of `openssl rand -hex 32`, say).
"""

from __future__ import annotations

import argparse
import os
import sys

from pocketfed.client_sdk import Device, PocketfedError, Prediction

HELP = """Say what you want. Then: /yes, /no LABEL (it should have been LABEL), /drop (forget that sentence),
/forget (all sentences), /status, /quit."""


def answer(device: Device, line: str, last: Prediction | None) -> tuple[str, Prediction | None]:
    """What to print, and the guess that the next command is about."""
    command, _, rest = line.partition(" ")
    if not line.startswith("/"):
        guess = device.predict(line, keep=True)  # kept without a label, which /yes or /no gives it
        return f"{guess.label} ({guess.probability:.0%})", guess
    if command == "/forget":
        return f"{device.forget()} sentences are forgotten", None
    if command == "/status":
        return f"{device.status()}; {device.count(labelled=True)} of {device.count()} sentences have a label", last
    if last is None or command not in ("/yes", "/no", "/drop"):
        return HELP, last
    if command == "/drop":
        device.forget(last.example_id)
        return "forgotten", None
    label = last.label if command == "/yes" else rest.strip()
    if label not in last.probabilities:
        return f"choose one of {', '.join(last.probabilities)}", last
    return "thank you" if device.correct(last.example_id, label) else "that sentence is gone", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", required=True, help="HOST:PORT")
    parser.add_argument("--home", required=True, help="a folder for this device alone")
    parser.add_argument("--enrolment-key", default="")
    given = parser.parse_args()
    key = bytes.fromhex(os.environ["CHAT_KEY"]) if "CHAT_KEY" in os.environ else None
    with Device(
        given.coordinator,
        given.home,
        enrolment_key=given.enrolment_key,
        examples_key=key,
        max_examples=5000,
        max_age_days=90,
    ) as device:
        device.start()  # takes part in rounds from a thread of its own
        print(HELP, flush=True)
        last: Prediction | None = None
        for line in map(str.strip, sys.stdin):
            if line == "/quit":
                break
            try:
                said, last = answer(device, line, last) if line else (HELP, last)
            except PocketfedError as error:  # no coordinator yet, no space: a sentence, and the chat goes on
                said = str(error)
            print(said, flush=True)


if __name__ == "__main__":
    main()
