"""The device's own examples: whatever is thrown at them is kept or counted, and what is forgotten is gone."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketfed.client_sdk.errors import ConfigurationError
from pocketfed.client_sdk.examples import MAX_TEXT, ExampleStore


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
        (("a" * 2_000_000, "x"), f"longer than {MAX_TEXT} characters"),
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
def test_a_hostile_example_is_skipped_and_counted_and_the_others_are_kept(
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
def test_odd_text_is_kept_as_text_that_can_be_encoded(text: str, kept: str, store: ExampleStore) -> None:
    assert store.add([(text, "x", text)]).added == 1
    (example,) = store.labelled()
    assert example.text == example.text_pair == kept
    example.text.encode()


def test_one_example_is_forgotten_and_then_all_the_others(store: ExampleStore) -> None:
    store.add([("one", "x"), ("two", "x"), ("three", None)])
    first = store.labelled()[0].id
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
    store.forget(store.labelled()[-1].id)
    store.add([("another", "x")])
    states.append(store.state())
    store.forget()
    store.add([("one", "x"), ("two", "x")])
    states.append(store.state())
    assert len(set(states)) == 4
    assert store.state() == states[-1]


@pytest.mark.parametrize("damage", ["not a database", "cut short", "a page overwritten"])
def test_a_damaged_file_is_set_aside_and_the_app_goes_on(damage: str, tmp_path: Path) -> None:
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


def test_a_database_that_is_only_locked_is_not_taken_for_damaged(
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
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, timeout=0.01))
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        ExampleStore(path)
    holder.rollback()
    holder.close()
    assert not (tmp_path / "examples.damaged").exists()
    again = ExampleStore(path)
    assert texts(again) == ["precious"]
    again.close()


def test_two_threads_add_and_read_at_once_and_nothing_is_lost(store: ExampleStore) -> None:
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for i in range(100):
                store.add([(f"{name} {i}", name)])
                assert store.count() >= i
                store.labelled()
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
