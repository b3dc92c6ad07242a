"""The device's own examples: whatever is thrown at them is kept or counted, and what is forgotten is gone."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pocketfed.client_sdk.clock import Clock
from pocketfed.client_sdk.errors import ConfigurationError, StorageError
from pocketfed.client_sdk.example_rows import reseal
from pocketfed.client_sdk.examples import MAX_TEXT, Added, ExampleStore, Usable, usable
from pocketfed.client_sdk.local import LocalExamples
from pocketfed.client_sdk.sealing import Seal


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExampleStore]:
    opened = ExampleStore(tmp_path / "examples.db")
    yield opened
    opened.close()


def texts(store: ExampleStore) -> list[str]:
    return [e.text for e in store.labelled()]


def test_examples_are_kept_in_order_with_their_pair_and_survive_a_restart(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "examples.db")
    added = store.add([("play jazz", "music"), ("who is it", None), ("a", "same", "b")])
    assert (added.added, added.skipped) == (3, {})
    store.close()
    again = ExampleStore(tmp_path / "examples.db")
    kept = [(e.text, e.text_pair, e.label) for e in again.labelled()]
    assert kept == [("play jazz", None, "music"), ("a", "b", "same")]
    assert (again.count(), again.count(labelled=True)) == (3, 2)
    again.close()


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (("", "x"), "empty"),
        ((" \t\n\u3000", "x"), "empty"),
        (("\0\0\0", "x"), "empty"),
        (("a" * 10_000_000, "x"), f"longer than {MAX_TEXT} characters"),
        (("a", "x", "b" * 2_000_000), f"longer than {MAX_TEXT} characters"),
        ((None, "x"), "not text"),
        ((b"bytes", "x"), "not text"),
        ((3.5, "x"), "not text"),
        (("a", "x", 7), "not text"),
        (("a",), "not text"),
        (("a", "x", "b", "c"), "not text"),
        ("a bare text", "not text"),
        (None, "not text"),
        (("a", ""), "unusable label"),
        (("a", 3), "unusable label"),
        (("a", "l" * 201), "unusable label"),
        (("a", "l\0"), "unusable label"),
        (("a", "\ud800"), "unusable label"),
    ],
)
def test_fault_27_a_hostile_example_is_skipped_and_counted_and_the_others_are_kept(
    example: Any, reason: str, store: ExampleStore
) -> None:
    added = store.add([("before", "x"), example, example, ("after", "x")])
    assert added.added == 2
    assert added.skipped == {reason: 2}
    assert texts(store) == ["before", "after"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\u202eright to left\u202c שלום مرحبا", "\u202eright to left\u202c שלום مرحبا"),
        ("👩‍👩‍👧‍👦 🏳️‍🌈", "👩‍👩‍👧‍👦 🏳️‍🌈"),
        ("nul\0in\0side", "nulinside"),
        ("half \ud83d of a pair", "half ? of a pair"),
        ("'; drop table examples; --", "'; drop table examples; --"),
        ("a" * MAX_TEXT, "a" * MAX_TEXT),
        ("line\r\nbreak\u2028", "line\r\nbreak\u2028"),
    ],
    ids=["right to left", "emoji", "NUL", "lone surrogate", "SQL", "longest", "line breaks"],
)
def test_fault_27_odd_text_is_kept_as_text_that_can_be_encoded(text: str, kept: str, store: ExampleStore) -> None:
    assert store.add([(text, "x", text)]).added == 1
    (example,) = store.labelled()
    assert example.text == example.text_pair == kept
    example.text.encode()


def test_one_example_is_forgotten_and_then_all_the_others(store: ExampleStore) -> None:
    store.add([("one", "x"), ("two", "x"), ("three", None)])
    first = next(store.labelled()).id
    assert store.forget(first) == 1
    assert store.forget(first) == 0
    assert texts(store) == ["two"]
    assert store.forget() == 2
    assert store.count() == 0


def test_the_state_changes_whenever_the_examples_do_even_if_their_number_does_not(store: ExampleStore) -> None:
    """A device reads its examples again when the state changes; an id given twice would hide a replaced example."""
    states = [store.state()]
    store.add([("one", "x"), ("two", "x")])
    states.append(store.state())
    store.forget(list(store.labelled())[-1].id)
    store.add([("another", "x")])
    states.append(store.state())
    store.forget()
    store.add([("one", "x"), ("two", "x")])
    states.append(store.state())
    assert len(set(states)) == 4
    assert store.state() == states[-1]


@pytest.mark.parametrize("damage", ["not a database", "cut short", "a page overwritten"])
def test_fault_27_a_damaged_file_is_set_aside_and_the_app_goes_on(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    store = ExampleStore(path)
    store.add([(f"text {i} " + "word " * 40, "x") for i in range(200)])
    store.close()
    whole = path.read_bytes()
    assert len(whole) > 4 * 4096
    broken = {
        "not a database": b"this was a database once" * 500,
        "cut short": whole[: len(whole) // 2],
        "a page overwritten": whole[:8192] + b"\xa5" * 4096 + whole[12288:],
    }[damage]
    path.write_bytes(broken)
    again = ExampleStore(path)
    assert again.count() == 0
    assert again.add([("new", "x")]).added == 1
    assert texts(again) == ["new"]
    again.close()
    assert (tmp_path / "examples.damaged").read_bytes()[:8192] == broken[:8192]


def test_a_database_that_is_only_locked_is_not_taken_for_damaged_and_is_used_once_it_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "examples.db"
    store = ExampleStore(path)
    store.add([("precious", "x")])
    store.close()
    connect = sqlite3.connect
    holder = connect(path)
    holder.execute("pragma locking_mode=exclusive")
    holder.execute("begin exclusive")
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k | {"timeout": 0.01}))
    again = ExampleStore(path)
    with pytest.raises(StorageError, match=r"examples\.db cannot be used now: database is locked; the next call"):
        again.count()
    assert again.add([("another", "x")]) == Added(0, {"not stored: database is locked": 1}, (0,))
    holder.rollback()
    holder.close()
    assert not (tmp_path / "examples.damaged").exists()
    assert texts(again) == ["precious"]
    again.close()


def test_two_threads_add_and_read_at_once_and_nothing_is_lost(store: ExampleStore) -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for i in range(100):
                store.add([(f"{name} {i}", name)])
                assert store.count() >= i
                list(store.labelled())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ada", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(texts(store)) == sorted(f"{name} {i}" for name in ("ada", "bob") for i in range(100))
    mine = [e.text for e in store.labelled() if e.label == "ada"]
    assert mine == [f"ada {i}" for i in range(100)], "each thread's own order is kept"


def test_forgotten_text_is_gone_from_the_files_too(tmp_path):
    secret = "a very particular sentence about marmalade"
    store = ExampleStore(tmp_path / "examples.db")
    store.add([(secret, "label")])
    assert any(secret.encode() in p.read_bytes() for p in tmp_path.iterdir())
    assert store.forget() == 1
    assert not any(secret.encode() in p.read_bytes() for p in tmp_path.iterdir())
    store.close()


def test_a_text_in_place_of_a_list_is_the_callers_mistake(tmp_path):
    store = ExampleStore(tmp_path / "examples.db")
    with pytest.raises(ConfigurationError, match="add_examples got the text 'hello'; give a list of"):
        store.add("hello")
    store.close()


# ---- labels ------------------------------------------------------------------------------------------------------------


def test_ids_tell_which_example_is_which_even_after_one_that_was_skipped(store: ExampleStore) -> None:
    assert store.add([("one", None), ("", "x"), ("three", None)]).ids == (1, 0, 2)
    assert store.correct(2, "x")
    assert [(e.id, e.text, e.label) for e in store.labelled()] == [(2, "three", "x")]


def test_feedback_labels_relabels_and_takes_a_label_away(store: ExampleStore) -> None:
    (example,) = store.add([("put on a record", None)]).ids
    states = [store.state()]
    for label, counted in (("music", 1), ("lights", 1), (None, 0)):
        assert store.correct(example, label)
        assert [e.label for e in store.labelled()] == [label] * counted
        assert dict(store.label_counts()) == ({label: 1} if label else {})
        states.append(store.state())
    assert len(set(states)) == 4, "an in-place change of a label changes the state too"
    assert store.count() == 1


def test_what_waits_for_a_label_does_not_change_the_state(store: ExampleStore) -> None:
    store.add([("one", "x")])
    before = store.state()
    (waiting,) = store.add([("two", None)]).ids
    store.forget(waiting)
    assert store.state() == before


@pytest.mark.parametrize("example", [0, -1, 99, 1 << 70, "1", None])
def test_feedback_on_an_example_that_is_not_there_changes_nothing(example: Any, store: ExampleStore) -> None:
    store.add([("one", "x")])
    before = store.state()
    assert not store.correct(example, "y")
    assert store.state() == before


@pytest.mark.parametrize("label", ["", 3, "l" * 201, "l\0", "\ud800", b"x"])
def test_fault_27_a_label_that_cannot_be_one_leaves_the_one_before(label: Any, store: ExampleStore) -> None:
    (example,) = store.add([("one", "x")]).ids
    assert not store.correct(example, label)
    assert next(store.labelled()).label == "x"


def test_fault_27_labels_that_a_model_does_not_know_are_kept_and_counted_apart(store: ExampleStore) -> None:
    store.add([("a", "music"), ("b", "music"), ("c", "lights"), ("d", "of an older model"), ("e", None)])
    assert usable(store.label_counts(), ("music", "lights", "alarm")) == Usable(examples=3, labels=2, unknown=1)
    assert usable(store.label_counts(), ("of an older model",)) == Usable(1, 1, 3)
    assert usable(store.label_counts(), ()) == Usable(0, 0, 4)


# ---- retention -----------------------------------------------------------------------------------------------------------


def in_files(folder: Path, text: str) -> list[str]:
    """Which files hold it."""
    return sorted(p.name for p in folder.iterdir() if text.encode() in p.read_bytes())


class Days(Clock):
    """A clock that is moved by days."""

    day = 0.0

    def now(self) -> datetime:
        return datetime(2026, 3, 1, 12) + timedelta(days=self.day)


def test_the_oldest_go_when_there_are_too_many_and_their_text_is_overwritten(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "examples.db", max_examples=3)
    first = store.add([(f"marmalade {i}", "x") for i in range(3)]).ids
    assert in_files(tmp_path, "marmalade 0")
    store.add([("honey 0", "x"), ("honey 1", None)])
    assert [(e.id, e.text) for e in store.labelled()] == [(3, "marmalade 2"), (4, "honey 0")]
    assert (store.count(), in_files(tmp_path, "marmalade 0")) == (3, [])
    assert not store.correct(first[0], "y")
    store.close()


def test_what_is_too_old_goes_at_opening_when_one_is_added_and_when_asked(tmp_path: Path) -> None:
    path, clock = tmp_path / "examples.db", Days()
    store = ExampleStore(path, clock=clock)
    for day in (0, 20, 30, 39):
        clock.day = day
        store.add([(f"marmalade {day}", "x")])
    store.close()
    clock.day = 40
    store = ExampleStore(path, max_age_days=30, clock=clock)
    assert texts(store) == ["marmalade 20", "marmalade 30", "marmalade 39"]
    clock.day = 51
    store.add([("new", "x"), ("and another", "y")])
    assert texts(store) == ["marmalade 30", "marmalade 39", "new", "and another"]
    clock.day = 61
    assert LocalExamples(store, 0.0).eligible(("x", "y")) == (3, ""), "as a device does at each check-in"
    clock.day = 71
    assert (store.expire(), store.expire()) == (1, 0)
    store.close()
    assert [in_files(tmp_path, f"marmalade {day}") for day in (0, 20, 30, 39)] == [[]] * 4


def test_a_limit_that_is_none_is_the_callers_mistake(tmp_path: Path) -> None:
    for limits, found in (
        ({"max_examples": 0}, "max_examples is 0; give 1"),
        ({"max_age_days": -1}, "is -1; give more"),
    ):
        with pytest.raises(ConfigurationError, match=found):
            ExampleStore(tmp_path / "examples.db", **limits)  # type: ignore[arg-type]


def test_a_store_set_aside_is_deleted_with_all_examples_and_when_it_is_too_old(tmp_path: Path) -> None:
    path, aside = tmp_path / "examples.db", tmp_path / "examples.damaged"
    path.write_bytes(b"marmalade " * 500)
    store = ExampleStore(path, max_age_days=1)
    assert in_files(tmp_path, "marmalade") == ["examples.damaged"]
    store.forget()
    assert not aside.exists()
    aside.write_bytes(b"marmalade " * 500)
    store.expire()
    assert aside.exists()
    os.utime(aside, (0, 0))
    store.expire()
    assert not aside.exists()
    store.close()


# ---- encryption ----------------------------------------------------------------------------------------------------------

KEY, OTHER = bytes(range(32)), bytes(32)
SECRETS = ("a very particular sentence about marmalade", "and one about honey", "breakfast-topics")


def test_with_a_key_no_text_pair_or_label_is_in_any_file(tmp_path: Path) -> None:
    text, pair, label = SECRETS
    store = ExampleStore(tmp_path / "examples.db", KEY)
    (waiting, _) = store.add([(text, None, pair), (text, label, pair)]).ids
    store.correct(waiting, label)
    assert "examples.db-wal" in {p.name for p in tmp_path.iterdir()}, "the log is looked at while it is written"
    assert [in_files(tmp_path, s) for s in (*SECRETS, KEY.decode("latin-1"))] == [[]] * 4
    assert [(e.text, e.text_pair, e.label) for e in store.labelled()] == [SECRETS] * 2
    assert usable(store.label_counts(), [label]) == Usable(2, 1, 0)
    store.close()
    again = ExampleStore(tmp_path / "examples.db", KEY)
    assert texts(again) == [text] * 2
    again.close()


def test_labels_of_different_lengths_cannot_be_told_by_their_length(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "examples.db", KEY)
    store.add([("on", "yes"), ("turn off the light", "no, never")])
    store.close()
    with sqlite3.connect(tmp_path / "examples.db") as db:
        lengths = db.execute("select length(text), length(label) from examples").fetchall()
    assert lengths == [(24 + 64 + 16,) * 2] * 2  # nonce, padded text, tag
    db.close()


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (None, "examples.db is encrypted; give the key that it was encrypted with"),
        (OTHER, "the key is not the one that .*examples.db was encrypted with; give that one, or delete the file"),
        (b"short", "the key is 5 bytes; give 32 random bytes"),
        ("x" * 32, "the key is str; give 32 random bytes"),
    ],
)
def test_the_wrong_key_is_told_in_a_sentence_and_harms_nothing(key: Any, found: str, tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "examples.db", KEY)
    store.add([("precious", "x")])
    store.close()
    with pytest.raises(ConfigurationError, match=found):
        ExampleStore(tmp_path / "examples.db", key)
    again = ExampleStore(tmp_path / "examples.db", KEY)
    assert texts(again) == ["precious"]
    again.close()


def test_a_plain_store_is_encrypted_when_a_key_is_first_given_and_its_pages_are_overwritten(tmp_path: Path) -> None:
    plain = ExampleStore(tmp_path / "examples.db")
    ids = plain.add([(f"marmalade {i} " + "and toast " * 30, "breakfast", None) for i in range(300)]).ids
    plain.close()
    (tmp_path / "examples.damaged").write_bytes(b"marmalade of old")
    assert in_files(tmp_path, "marmalade") == ["examples.damaged", "examples.db"]
    sealed = ExampleStore(tmp_path / "examples.db", KEY)
    assert in_files(tmp_path, "marmalade") == in_files(tmp_path, "breakfast") == []
    assert [(e.id, e.text[:12], e.label) for e in sealed.labelled()] == [
        (i, f"marmalade {n} "[:12], "breakfast") for n, i in enumerate(ids)
    ]
    sealed.close()


def test_after_a_change_of_keys_only_the_new_one_opens_the_store(tmp_path: Path) -> None:
    store = ExampleStore(tmp_path / "examples.db", KEY)
    store.add([("one", "x", "pair"), ("two", None)])
    with sqlite3.connect(tmp_path / "examples.db") as db:
        before = [cell for row in db.execute("select text, text_pair, label from examples") for cell in row if cell]
    db.close()
    store.rekey(OTHER)
    store.add([("three", "x")])
    assert texts(store) == ["one", "three"]
    store.close()
    assert not any(cell in p.read_bytes() for cell in before for p in tmp_path.iterdir()), (
        "what the old key opens is gone"
    )
    with pytest.raises(ConfigurationError, match="the key is not the one"):
        ExampleStore(tmp_path / "examples.db", KEY)
    again = ExampleStore(tmp_path / "examples.db", OTHER)
    assert [(e.text, e.text_pair) for e in again.labelled()] == [("one", "pair"), ("three", None)]
    again.close()


def test_an_encrypted_example_that_was_changed_moved_or_put_there_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    store = ExampleStore(path, KEY)
    store.add([(f"text {i}", "x") for i in range(5)])
    with sqlite3.connect(path) as db:
        db.execute("update examples set text = zeroblob(92) where id = 1")
        db.execute("update examples set text = (select text from examples where id = 3) where id = 2")
        db.execute("update examples set label = x'00' where id = 4")
        db.execute("insert into examples (text, label) values ('planted', 'x')")
    db.close()
    assert texts(store) == ["text 2", "text 4"]
    assert store.count() == 6
    store.close()


# ---- files ---------------------------------------------------------------------------------------------------------------

SCHEMA_0 = """
create table if not exists examples (
    id integer primary key autoincrement, -- never given twice: state() relies on it
    text text not null, text_pair text, label text,
    added_at real not null default ((julianday('now') - 2440587.5) * 86400.0) -- seconds since 1970
)"""  # as SDK 0.2.0 made it


def store_of_020(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("pragma journal_mode=wal")
    db.execute(SCHEMA_0)
    rows = [("play jazz", None, "music"), ("a", "b", "same"), ("gone", None, None), ("who is it", None, None)]
    db.executemany("insert into examples (text, text_pair, label) values (?, ?, ?)", rows)
    db.execute("delete from examples where text = 'gone'")
    db.commit()
    db.close()
    path.chmod(0o644)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "with a key"])
def test_a_store_of_sdk_020_opens_with_its_ids_and_goes_on(key: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    store_of_020(path)
    store = ExampleStore(path, key)
    assert [(e.id, e.text, e.text_pair, e.label) for e in store.labelled()] == [
        (1, "play jazz", None, "music"),
        (2, "a", "b", "same"),
    ]
    assert (store.count(), store.correct(4, "door")) == (3, True)
    assert store.add([("new", "x")]).ids == (5,)
    assert bool(in_files(tmp_path, "jazz")) == (key is None)
    store.close()
    again = ExampleStore(path, key)
    assert texts(again) == ["play jazz", "a", "who is it", "new"]
    again.close()


def test_a_store_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    store_of_020(path)
    with sqlite3.connect(path) as db:
        db.execute("pragma user_version=7")
    db.close()
    with pytest.raises(
        ConfigurationError, match=r"has version 7, this SDK knows 1; update the app, or delete the file"
    ):
        ExampleStore(path)
    assert in_files(tmp_path, "play jazz") == ["examples.db"]


def test_fault_27_another_programs_database_is_set_aside(tmp_path: Path) -> None:
    for number, table in enumerate(("examples (id, word)", "facts (name)", "contacts (name, phone)")):
        path = tmp_path / f"{number}.db"
        with sqlite3.connect(path) as db:
            db.execute(f"create table {table}")
        db.close()
        store = ExampleStore(path)
        assert (store.add([("new", "x")]).added, store.count()) == (1, 1)
        store.close()
        assert path.with_suffix(".damaged").exists()


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")
def test_the_files_are_for_this_user_alone_whatever_they_were_before(tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    store_of_020(path)
    store = ExampleStore(path)
    store.add([("one", "x")])
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == {"examples.db": 0o600, "examples.db-wal": 0o600, "examples.db-shm": 0o600}
    store.close()


def test_ten_thousand_short_texts_are_added_at_one_go_and_read_a_page_at_a_time(tmp_path: Path) -> None:
    for key in (None, KEY):
        store = ExampleStore(tmp_path / f"{key is None}.db", key)
        said: list[str] = []
        store._file.read(lambda db, hear=said.append: db.set_trace_callback(hear))
        assert len(set(store.add([(f"play song number {i}", f"label {i % 7}") for i in range(10_000)]).ids)) == 10_000
        assert said.count("commit") == 2, "a commit waits for the disk: one for the texts, one for what is too old"
        reading = store.labelled()
        assert next(reading).text == "play song number 0"
        store.add([("while it is read", "x")])
        assert sum(1 for _ in reading) == 10_000, "it goes on from where it was, new ones included"
        store.close()


# ---- a disk that is full, a file that breaks while it is open -----------------------------------------------------------------


def test_fault_27_a_store_that_breaks_while_it_is_open_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    store = ExampleStore(path)
    store.add([(f"text {i} " + "word " * 40, "x") for i in range(200)])
    before = store.state()
    store._file.scrub()  # all of it is in the file, none in the log
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xa5" * size)
    store._file.read(lambda db: db.execute("pragma shrink_memory"))  # what it still knows of it
    assert store.add([("new", "x")]).added == 1
    assert (texts(store), store.count()) == (["new"], 1)
    assert store.state() != before
    store.close()
    assert (tmp_path / "examples.damaged").read_bytes()[:4096] == b"\xa5" * 4096


FULL = """
import resource, sys
from pathlib import Path
from pocketfed.client_sdk.examples import ExampleStore
from pocketfed.client_sdk.sealing import Seal

path, key = Path(sys.argv[1]), bytes(32) if sys.argv[2] == "key" else None
store = ExampleStore(path, key)
store.add([("before", "x")] * 20)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, unlimited[1]))  # no file of this process grows beyond it
waiting, skipped = 0, 0
for i in range(40):
    added = store.add([(f"text {i} " + "word " * 1000, None)])
    assert added.added + sum(added.skipped.values()) == 1, added
    assert (added.ids == (0,)) == (added.added == 0), added
    waiting, skipped = waiting + added.added, skipped + sum(added.skipped.values())
assert 0 < waiting and 0 < skipped, (waiting, skipped)
print(added.skipped)
assert (store.count(), store.count(labelled=True), len(list(store.labelled()))) == (20 + waiting, 20, 20)
store.close()
store = ExampleStore(path, key)  # opened while there is no space
assert store.count() == 20 + waiting
assert store.forget() == 20 + waiting  # it must be possible for want of space
assert store.count() == 0 and not any(b"word word" in p.read_bytes() for p in path.parent.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
assert store.add([("after", "x")]).added == 1
assert store.forget() == 1
store.close()
"""


@pytest.mark.parametrize("kind", ["plain", "key"])
def test_fault_27_files_that_cannot_grow_cost_the_new_examples_only(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="limits on files are POSIX's")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "examples.db"), kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "not stored: " in done.stdout


# ---- a process that is killed ----------------------------------------------------------------------------------------------


def test_killed_before_old_pages_were_overwritten_it_is_done_when_next_opened(tmp_path: Path) -> None:
    path = tmp_path / "examples.db"
    store = ExampleStore(path)
    store.add([(f"marmalade {i} " + "and toast " * 30, "breakfast") for i in range(300)])
    store.close()
    killed = sqlite3.connect(path, isolation_level=None)
    killed.execute("pragma secure_delete=off")
    reseal(killed, None, Seal(KEY))
    killed.close()
    assert in_files(tmp_path, "marmalade") == ["examples.db"]
    again = ExampleStore(path, KEY)
    assert in_files(tmp_path, "marmalade") == []
    assert len(texts(again)) == 300
    again.close()


KILLED = """
import os, sys
from pathlib import Path
from pocketfed.client_sdk.examples import ExampleStore
from pocketfed.client_sdk.sealing import Seal

store = ExampleStore(Path(sys.argv[1]))
store.add([("marmalade", "x"), ("honey", "x")])
store._file.scrub = lambda: os.kill(os.getpid(), 9)
store.forget(1)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_killed_after_it_forgot_the_log_is_emptied_when_next_opened(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "examples.db")], check=False)
    assert (done.returncode, in_files(tmp_path, "marmalade")) == (-9, ["examples.db-wal"])
    store = ExampleStore(tmp_path / "examples.db")
    assert (texts(store), in_files(tmp_path, "marmalade")) == (["honey"], [])
    store.close()
