"""The demo's text: people who talk to an assistant, each in their own way.

A seeded grammar in which about half of the utterances mean what they mean by word *order*: "move 20 from savings to
checking" and its reverse, "remind anna to call ben" and "call anna to remind ben", "stop the music rather than start a
timer" and the other way round. Such pairs share every word, so a bag of words can only guess between them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pocketfed.model.tasks import Dataset, Example

SLOTS: Mapping[str, tuple[str, ...]] = {
    "room": ("kitchen", "bedroom", "bathroom", "hallway", "garage", "office", "garden", "living room"),
    "music": ("jazz", "rock", "some blues", "my playlist", "the radio", "piano music", "the new album", "some reggae"),
    "time": ("six", "seven", "half past eight", "nine", "noon", "quarter to five", "midnight", "ten thirty"),
    "minutes": ("five", "ten", "fifteen", "twenty", "thirty", "forty", "ninety", "two"),
    "city": ("paris", "london", "oslo", "madrid", "tokyo", "lagos", "lima", "chicago"),
    "day": ("today", "tomorrow", "tonight", "on monday", "on friday", "this weekend"),
    "food": ("milk", "eggs", "bread", "coffee", "apples", "rice", "cheese", "soap"),
    "person": ("anna", "ben", "clara", "david", "emma", "felix", "grace", "hugo", "ines", "jonas"),
    "matter": ("the dentist", "the meeting", "the rent", "dinner", "the party", "the keys", "the tickets", "the dog"),
    "amount": ("20", "50", "75", "100", "250", "300", "500", "1000"),
    "number": ("3", "8", "12", "15", "40", "60", "70", "90"),
    "account": ("checking", "the joint account", "my travel card", "the household account"),
    "place": ("work", "the airport", "the gym", "school", "the station", "the library"),
    "units": ("miles/kilometers", "pounds/kilos", "feet/meters", "gallons/liters", "inches/centimeters"),
}

# What can be asked for in one clause, as an imperative: these are also the parts of corrections and sequences.
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "lights_on": ("turn on the {room} lights", "switch the lights on in the {room}", "light up the {room}"),
    "lights_off": ("turn off the {room} lights", "switch the lights off in the {room}", "make the {room} dark"),
    "play_music": ("play {music}", "put on {music}", "start playing {music} in the {room}"),
    "stop_music": ("stop the music in the {room}", "pause {music}", "stop playing {music}"),
    "set_alarm": ("set an alarm for {time} {day}", "wake me up at {time} {day}", "make an alarm for {time}"),
    "set_timer": (
        "set a timer for {minutes} minutes",
        "start a {minutes} minute timer",
        "count down {minutes} minutes",
    ),
    "get_weather": (
        "check the weather in {city} {day}",
        "tell me if it rains in {city} {day}",
        "show the forecast for {city}",
    ),
    "add_to_list": ("add {food} to my list", "put {food} and {food2} on the list", "write {food} on the shopping list"),
}

# Who does what to whom: the same words, the other way round, are another intent. {one} and {other} trade places.
ROLES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("transfer_to_savings", "transfer_from_savings"): (
        "move {amount} from {other} to {one}",
        "transfer {amount} to {one} from {other}",
        "take {amount} out of {other} and put it in {one}",
        "put {amount} in {one} and take it out of {other}",
    ),
    ("navigate_home", "navigate_away"): (
        "how do i get from {other} to {one}",
        "take me to {one} from {other}",
        "i am at {other} and have to be at {one} by {time}",
        "show the way to {one} from {other}",
    ),
    ("convert_to_metric", "convert_to_imperial"): (
        "convert {number} {other} to {one}",
        "what is {number} {other} in {one}",
        "how many {one} are {number} {other}",
        "i need {number} {other} in {one}",
    ),
    ("make_call", "set_reminder"): (
        "{one} {person} to {other} {person2}",
        "{one} {person} to {other} {person2} about {matter}",
        "{one} {person} about {matter} and {other} {person2}",
        "please {one} {person} then {other} {person2} about {matter}",
    ),
}

# The same intents said so that no order is needed.
PLAIN: Mapping[str, tuple[str, ...]] = {
    "transfer_to_savings": ("save {amount}", "deposit {amount} in savings", "set {amount} aside {day}"),
    "transfer_from_savings": ("withdraw {amount} from savings", "spend {amount} of my savings", "cash {amount} {day}"),
    "navigate_home": ("drive me home by {time}", "avoid {place} and go home", "quickest route home {day}"),
    "navigate_away": ("drive me to {place} by {time}", "find {place} in {city}", "quickest route to {place} {day}"),
    "convert_to_metric": ("give me {number} {imperial} in metric units", "{number} {imperial} in the metric system"),
    "convert_to_imperial": ("give me {number} {metric} in imperial units", "{number} {metric} in the imperial system"),
    "make_call": ("call {person} {day}", "phone {person} about {matter}", "ring {person} at {time}"),
    "set_reminder": ("remind me about {matter} {day}", "remind {person} of {matter}", "do not let me forget {matter}"),
}

# Two commands in one utterance; the label is {A}'s: in a correction what is wanted, in a sequence what comes first.
CONNECTIVES: tuple[str, ...] = (
    "{B} no wait {A}",
    "{A} rather than {B}",
    "do not {B} but {A}",
    "{A} and do not {B}",
    "{A} before you {B}",
    "before you {B} {A}",
    "{B} after you {A}",
    "after you {A} {B}",
)

LABELS: tuple[str, ...] = tuple(sorted([*COMMANDS, *(label for pair in ROLES for label in pair)]))
COMPOUND_RATE = 0.25  # of commands, how many come as a correction or a sequence
PLAIN_RATE = 0.3  # of the intents that come in pairs, how many are said without the other's words
HELD_OUT = 64  # of 256 hash buckets, how many belong to the test
TEST_SPEAKER_UTTERANCES = 25  # a new speaker of the test says this many

_OPENINGS = ("", "please", "hey", "could you", "ok", "i want you to", "listen")
_CLOSINGS = ("", "please", "thanks", "now", "thank you")
_FILLERS = ("um", "uh", "like", "well", "you know")


@dataclass(frozen=True)
class Speaker:
    """One person's habits. Weights are relative; rates are per utterance, `typo_rate` per word."""

    name: str
    intents: Mapping[str, float]
    phrasings: Mapping[str, tuple[float, ...]]  # over COMMANDS[intent] or a pair's templates
    connectives: tuple[float, ...]
    favourites: Mapping[str, tuple[str, ...]]
    opening: str
    closing: str
    polite_rate: float
    filler_rate: float
    typo_rate: float
    capitals: bool


def _dirichlet(random_: random.Random, size: int, alpha: float) -> tuple[float, ...]:
    """Weights that sum to one; the smaller alpha, the more they favour a few."""
    draws = [random_.gammavariate(alpha, 1.0) + 1e-9 for _ in range(size)]
    return tuple(d / sum(draws) for d in draws)


def make_speaker(name: str, random_: random.Random) -> Speaker:
    """A person with preferences drawn from the population's."""
    templates: dict[str, tuple[str, ...]] = dict(COMMANDS)
    for pair, phrasings in ROLES.items():
        templates |= dict.fromkeys(pair, phrasings)
    return Speaker(
        name=name,
        intents=dict(zip(LABELS, _dirichlet(random_, len(LABELS), 0.6), strict=True)),
        phrasings={label: _dirichlet(random_, len(templates[label]), 1.0) for label in LABELS},
        connectives=_dirichlet(random_, len(CONNECTIVES), 0.7),
        favourites={slot: tuple(random_.sample(values, 3)) for slot, values in SLOTS.items()},
        opening=random_.choice(_OPENINGS),
        closing=random_.choice(_CLOSINGS),
        polite_rate=random_.uniform(0.0, 0.6),
        filler_rate=random_.choice((0.0, 0.1, 0.3)),
        typo_rate=random_.choice((0.0, 0.0, 0.01, 0.03)),
        capitals=random_.random() < 0.3,
    )


def _fill(template: str, speaker: Speaker, random_: random.Random, fixed: Mapping[str, str] = {}) -> str:
    """Slots take the speaker's favourites three times out of four; {food2} differs from {food}."""
    used = dict(fixed)

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in used:
            slot = name.rstrip("2")
            pool = speaker.favourites[slot] if random_.random() < 0.75 else SLOTS[slot]
            used[name] = random_.choice([v for v in pool if v != used.get(slot)])
        return used[name]

    return re.sub(r"\{(\w+)\}", value, template)


def _command(label: str, speaker: Speaker, random_: random.Random) -> str:
    return _fill(random_.choices(COMMANDS[label], speaker.phrasings[label])[0], speaker, random_)


def _roles(label: str, speaker: Speaker, random_: random.Random) -> str:
    """A sentence of a pair of intents: which of the two it is lies in who stands where."""
    imperial, metric = _fill("{units}", speaker, random_).split("/")
    if random_.random() < PLAIN_RATE:
        return _fill(random_.choice(PLAIN[label]), speaker, random_, {"imperial": imperial, "metric": metric})
    pair = next(p for p in ROLES if label in p)
    if pair[0] == "transfer_to_savings":
        sides = ("savings", _fill("{account}", speaker, random_))
    elif pair[0] == "navigate_home":
        sides = ("home", _fill("{place}", speaker, random_))
    elif pair[0] == "convert_to_metric":
        sides = (metric, imperial)
    else:
        sides = ("call", "remind")
    one, other = sides if label == pair[0] else sides[::-1]
    template = random_.choices(ROLES[pair], speaker.phrasings[label])[0]
    return _fill(template, speaker, random_, {"one": one, "other": other})


def combine(connective: str, meant: str, also: str) -> str:
    """Two commands in one utterance; its label is that of `meant`.

    >>> combine("{B} no wait {A}", meant="play jazz", also="stop the radio")
    'stop the radio no wait play jazz'
    """
    return connective.replace("{A}", meant).replace("{B}", also)


def core_utterance(label: str, speaker: Speaker, random_: random.Random) -> str:
    """What is asked, without the speaker's manners."""
    if label not in COMMANDS:
        return _roles(label, speaker, random_)
    meant = _command(label, speaker, random_)
    if random_.random() >= COMPOUND_RATE:
        return meant
    other = random_.choice([c for c in COMMANDS if c != label])
    connective = random_.choices(CONNECTIVES, speaker.connectives)[0]
    return combine(connective, meant, _command(other, speaker, random_))


def _misspell(word: str, random_: random.Random) -> str:
    """Two neighbouring letters swapped, or one lost."""
    at = random_.randrange(1, len(word) - 1)
    if random_.random() < 0.5:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :]


def _decorate(core: str, speaker: Speaker, random_: random.Random) -> str:
    """Manners, fillers, typing mistakes and capitals."""
    words = core.split()
    # Numbers are spared: 1000 misspelt as 100 would be another command, perhaps one of the test.
    slips = [len(w) > 3 and w.isalpha() and random_.random() < speaker.typo_rate for w in words]
    words = [_misspell(w, random_) if slip else w for w, slip in zip(words, slips, strict=True)]
    if random_.random() < speaker.filler_rate:
        words.insert(random_.randrange(len(words)), random_.choice(_FILLERS))
    before = speaker.opening if random_.random() < speaker.polite_rate else ""
    after = speaker.closing if random_.random() < speaker.polite_rate else ""
    text = " ".join(filter(None, [before, *words, after]))
    return text[0].upper() + text[1:] + "." if speaker.capitals else text


def _held_out(core: str) -> bool:
    """Whether a command belongs to the test: its own hash decides, the same for every seed, so nothing leaks."""
    return hashlib.blake2b(core.encode(), digest_size=1).digest()[0] < HELD_OUT


def _utterances(speaker: Speaker, random_: random.Random, wanted: Callable[[str], bool]) -> Iterator[Example]:
    while True:
        label = random_.choices(LABELS, [speaker.intents[name] for name in LABELS])[0]
        core = core_utterance(label, speaker, random_)
        while not wanted(core):
            core = core_utterance(label, speaker, random_)
        yield Example(text=_decorate(core, speaker, random_), label=label, user=speaker.name)


def _speaker_stream(name: str, seed: int, wanted: Callable[[str], bool]) -> Iterator[Example]:
    random_ = random.Random(f"{seed}/{name}")
    return _utterances(make_speaker(name, random_), random_, wanted)


def _train_side(core: str) -> bool:
    return not _held_out(core)


def assistant_dataset(
    seed: int = 0, users: int = 24, utterances_per_user: int = 120, test_utterances: int = 1000
) -> Dataset:
    """Labelled utterances of `users` people, and a test spoken by others.

    No command of the test, manners stripped, occurs in the training texts of any seed.

    Raises:
        ValueError: nobody, or nothing said.
    """
    if users < 1 or utterances_per_user < 1:
        raise ValueError(f"{users} users saying {utterances_per_user} utterances say nothing; give at least 1 of each")
    train = [
        example
        for u in range(users)
        for example in islice(_speaker_stream(f"user-{u:03d}", seed, _train_side), utterances_per_user)
    ]
    labels = tuple(sorted({e.label for e in train if e.label is not None}))
    test: list[Example] = []
    while len(test) < test_utterances:
        guest = _speaker_stream(f"guest-{len(test) // TEST_SPEAKER_UTTERANCES:03d}", seed, _held_out)
        known = (e for e in guest if e.label in labels)  # a handful of users may not have said everything
        test += islice(known, min(TEST_SPEAKER_UTTERANCES, test_utterances - len(test)))
    return Dataset(name=f"assistant-{seed}", train=tuple(train), dev=(), test=tuple(test), labels=labels, skipped={})


def assistant_corpus(seed: int = 0, lines: int = 12000) -> list[str]:
    """Unlabelled lines of the same language, from people who are in no `assistant_dataset`; nothing of the test."""
    texts: list[str] = []
    while len(texts) < lines:
        writer = _speaker_stream(f"writer-{len(texts) // 100:04d}", seed, _train_side)
        texts += (example.text for example in islice(writer, min(100, lines - len(texts))))
    return texts


def write_dataset(dataset: Dataset, folder: Path) -> None:
    """`train.jsonl`, `dev.jsonl` and `test.jsonl` (where not empty) with text, label and user, for `--data folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits: Mapping[str, Sequence[Example]] = {"train": dataset.train, "dev": dataset.dev, "test": dataset.test}
    for split, examples in splits.items():
        if not examples:
            continue
        lines = []
        for e in examples:
            row = {"text": e.text, "text_pair": e.text_pair, "label": e.label, "user": e.user, **e.fields}
            lines.append(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) + "\n")
        part = folder / f".{split}.jsonl.part"
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(folder / f"{split}.jsonl")
