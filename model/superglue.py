"""Tasks of SuperGLUE (Wang et al. 2019) as texts and pairs of texts: WiC, COPA, MultiRC and WSC."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pocketfed.model.task_files import Table

ASKED = {"cause": "What was the cause?", "effect": "What happened as a result?"}


def reshaped(table: Table) -> Table:
    """A table whose columns are one of those tasks', as texts with labels; any other as it is."""
    columns, first = set(table.columns), table.rows[0] if table.rows else {}
    if {"word", "sentence1", "sentence2", "start1"} <= columns:
        return _wic(table)
    if {"premise", "choice1", "choice2", "question"} <= columns:
        return _copa(table)
    if isinstance(first.get("passage"), dict) and "questions" in first["passage"]:
        return _multirc(table)
    if isinstance(first.get("target"), dict) and "span1_index" in first["target"]:
        return _wsc(table)
    return table


def _wic(table: Table) -> Table:
    """The word before its first sentence."""
    return replace(
        table, rows=[{**row, "sentence1": f"{row.get('word')}: {row.get('sentence1')}"} for row in table.rows]
    )


def _copa(table: Table) -> Table:
    """A row for each choice."""
    rows = [
        {
            "text": f"{row.get('premise')} {ASKED.get(str(row.get('question')), '')}",
            "text_pair": row.get(f"choice{choice + 1}"),
            "choice of": str(number),
            **({"label": str(int(row["label"] == choice))} if "label" in row else {}),
        }
        for number, row in enumerate(table.rows)
        for choice in (0, 1)
    ]
    named = ("text", "text_pair", "choice of", *(("label",) if "label" in table.columns else ()))
    return Table(table.path, named, rows, table.bad)


# --- MultiRC --------------------------------------------------------------------------------------------------------


def _multirc(table: Table) -> Table:
    """A row for each answer: question and answer, then the passage. `answer to` is the same for those of a question."""
    rows: list[dict[str, Any]] = []
    broken = 0
    for number, row in enumerate(table.rows):
        passage = row.get("passage")
        questions = passage.get("questions") if isinstance(passage, dict) else None
        if not isinstance(passage, dict) or not isinstance(questions, list):
            broken += 1
            continue
        for place, question in enumerate(questions):
            answers = question.get("answers") if isinstance(question, dict) else None
            if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
                broken += 1
                continue
            rows += [
                {
                    "text": f"{question.get('question')} {answer.get('text')}",
                    "text_pair": passage.get("text"),
                    "answer to": f"{number}.{place}",
                    **({"label": str(answer["label"])} if "label" in answer else {}),
                }
                for answer in answers
            ]
    named = ("text", "text_pair", "answer to", *(("label",) if any("label" in row for row in rows) else ()))
    return Table(table.path, named, rows, {**table.bad, "no passage with questions and answers": broken})


# --- WSC ------------------------------------------------------------------------------------------------------------


def _wsc(table: Table) -> Table:
    """The sentence with its two spans marked, as Raffel et al. 2020 mark them: the noun by *, the pronoun by #."""
    marked = [(row, _marked(row.get("text"), row.get("target"))) for row in table.rows]
    rows = [{**row, "text": text} for row, text in marked if text is not None]
    columns = tuple(name for name in table.columns if name != "target")
    return replace(
        table, columns=columns, rows=rows, bad={**table.bad, "span not in its text": len(marked) - len(rows)}
    )


def _marked(text: object, target: object) -> str | None:
    """
    >>> spans = {"span1_text": "Mark", "span1_index": 0, "span2_text": "He", "span2_index": 3}
    >>> _marked("Mark told lies. He should not.", spans)
    '* Mark * told lies. # He # should not.'
    """
    if not isinstance(text, str) or not isinstance(target, dict):
        return None
    words = text.split(" ")  # so the indices count
    marked = list(words)
    for number, mark in ((1, "*"), (2, "#")):
        span, index = _span(target, number)
        if not span or index is None or not 0 <= index <= len(words) - len(span):
            return None
        first = _nearest(words, span, index)
        marked[first] = f"{mark} {marked[first]}"
        marked[first + len(span) - 1] += f" {mark}"
    return " ".join(marked)


def _span(target: Mapping[str, Any], number: int) -> tuple[list[str], int | None]:
    text, index = target.get(f"span{number}_text"), target.get(f"span{number}_index")
    return text.split() if isinstance(text, str) else [], index if isinstance(index, int) else None


def _nearest(words: Sequence[str], span: Sequence[str], index: int) -> int:
    """Where the span begins: some indices are one off, and some spans are not spelt as the text has them."""
    wanted = [_bare(word) for word in span]
    places = range(len(words) - len(span) + 1)
    found = [i for i in places if [_bare(word) for word in words[i : i + len(span)]] == wanted]
    return min(found, key=lambda place: abs(place - index), default=index)


def _bare(word: str) -> str:
    return word.strip(string.punctuation).lower()
