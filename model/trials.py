"""Fine-tuning again and again: seeds, a search over settings, rows that need not be done twice, and their table."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketfed.model.checkpoints import load, tokens_of
from pocketfed.model.config import MobileBertConfig, preset
from pocketfed.model.encoded import Encoded, Kind
from pocketfed.model.finetuning import FineTuningError, Recipe, fine_tune, make_model, predict
from pocketfed.model.metrics import classification_scores, goodness, scope_scores, summarised
from pocketfed.model.rows import append_row
from pocketfed.model.shipped import located, starts_untrained
from pocketfed.model.supervision import kind_of
from pocketfed.model.tasks import DataError, Dataset
from pocketfed.model.tfidf import tfidf_guesses
from pocketfed.model.tokenization import Tokenizer, Vocabulary, train_vocabulary

# Sun et al. 2020, section 4.3: where the best of each task was looked for.
PAPER_SPACE: Mapping[str, tuple[float, ...]] = {
    "learning_rate": tuple(rate * 1e-5 for rate in range(1, 11)),
    "batch_size": (16, 32, 48),
    "epochs": tuple(range(2, 11)),
}
CHOSEN_ON = 0.1  # of train, held out to choose settings by where there is no dev
Row = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """What fine-tuning starts from; state: the encoder's tensors, empty for a student that starts untrained."""

    name: str
    config: MobileBertConfig
    state: Mapping[str, Tensor] = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)

    def digest(self) -> str:
        """sha256 in hex of all that is in it but its name."""
        digest = hashlib.sha256(json.dumps([self.config.to_dict(), self.vocabulary.digest()]).encode())
        for name in sorted(self.state):
            digest.update(name.encode() + self.state[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


def start_of(model: str, dataset: Dataset) -> Start:
    """A model folder, or a preset whose vocabulary is trained on the training texts.

    Raises:
        CheckpointError, ConfigError: neither of them.
    """
    if starts_untrained(model):
        config = preset(model)
        texts = (text for e in dataset.train for text in (e.text, e.text_pair) if text)
        vocabulary = train_vocabulary(texts, config.vocab_size)
        return Start(f"{model}, untrained", config.with_changes(vocab_size=len(vocabulary)), {}, vocabulary)
    folder = located(model)
    checkpoint = load(folder)
    state = {name: value for name, value in checkpoint.state.items() if not name.startswith("classifier.")}
    return Start(folder.resolve().name, checkpoint.config, state, tokens_of(checkpoint))


def untrained(name: str, like: Start) -> Start:
    """The preset without any training, for comparison: it reads with the vocabulary of `like`.

    Raises:
        ConfigError: no such preset.
    """
    config = preset(name).with_changes(vocab_size=len(like.vocabulary))
    return Start(f"{name}, untrained", config, {}, like.vocabulary)


@dataclass(frozen=True)
class Plan:
    """What to try. space: settings of `Recipe` with the values to search, each with the first seed; empty for no search.

    at_most: so many of the combinations, drawn by the first seed; 0 for all.
    """

    recipe: Recipe
    seeds: tuple[int, ...] = (0,)
    space: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    at_most: int = 0

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise FineTuningError(f"the seeds are {', '.join(map(str, self.seeds)) or 'none'}; give each once")
        if not all(0 <= seed < 1 << 63 for seed in self.seeds):
            raise FineTuningError(
                f"the seed {max(self.seeds, key=abs)} is not a number from 0 to 2**63 - 1; give another"
            )

    def candidates(self) -> list[Recipe]:
        """The recipes to choose from, in order.

        >>> [r.epochs for r in Plan(Recipe(), space={"epochs": (2, 4)}).candidates()]
        [2, 4]
        """
        names = list(self.space)
        every = [dict(zip(names, values, strict=True)) for values in itertools.product(*self.space.values())]
        if self.at_most and self.at_most < len(every):
            drawn = np.random.Generator(np.random.PCG64(self.seeds[0])).permutation(len(every))[: self.at_most]
            every = [every[i] for i in sorted(drawn)]
        return [self._changed(values) for values in every]

    def _changed(self, values: Mapping[str, float]) -> Recipe:
        old = self.recipe
        return replace(
            old,
            learning_rate=values.get("learning_rate", old.learning_rate),
            batch_size=int(values.get("batch_size", old.batch_size)),
            epochs=int(values.get("epochs", old.epochs)),
        )


def run_trials(
    dataset: Dataset,
    starts: Sequence[Start],
    plan: Plan,
    out: Path | None = None,
    progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> list[Row]:
    """Fine-tunes each start with each seed and measures it on the test split; returns a row a trial.

    The epoch that is kept is the best on dev, where the data has a dev beside its test, else the last. A search chooses
    by dev too, or by a tenth of train that is held out from its trials.

    Args:
        dataset: with a test (`Dataset.with_test`).
        out: a JSON-lines file of rows: trials that stand there are not done again, others are added as they end.

    Raises:
        DataError, FineTuningError: data that leaves nothing to test, or a loss that diverged.
    """
    if not dataset.test:
        raise DataError(f"{dataset.name} leaves no example to test on; give more data or a test split")
    torch.set_num_threads(1)
    done = {row["key"]: row for row in read_rows(out)} if out else {}
    data = _digest(dataset)
    rows: list[Row] = []
    for start in starts:
        desk = _Desk(dataset, start, data, out, done, progress)
        recipe = plan.recipe
        candidates = plan.candidates() if plan.space else []
        if candidates:
            tried = [
                desk.trial(candidate, plan.seeds[0], f"search {i + 1} of {len(candidates)}", searching=True)
                for i, candidate in enumerate(candidates)
            ]
            best = max(tried, key=lambda row: goodness(row["dev"], dataset.metric))  # max keeps the first of equals
            recipe = candidates[tried.index(best)]
            rows += tried
        rows += [desk.trial(recipe, seed, f"seed {seed}") for seed in plan.seeds]
    return rows


class _Desk:
    """Trials of one start on one data set; its texts are tokenized once for each length."""

    def __init__(
        self,
        dataset: Dataset,
        start: Start,
        data: str,
        out: Path | None,
        done: dict[str, Row],
        progress: Callable[[str, float], None],
    ) -> None:
        self.dataset, self.start, self.out, self.done, self.progress = dataset, start, out, done, progress
        self.kind: Kind = kind_of(dataset)
        self.identity = [data, start.digest()]
        self.tokenizer = Tokenizer(start.vocabulary)
        self.encoded: dict[tuple[str, int], Encoded] = {}

    def trial(self, recipe: Recipe, seed: int, what: str, searching: bool = False) -> Row:
        key = hashlib.sha256(json.dumps([*self.identity, asdict(recipe), seed, searching]).encode()).hexdigest()[:32]
        if key in self.done:
            return self.done[key]
        begun = time.process_time()
        name = f"{self.start.name}, {what}"
        self.progress(name, 0.0)
        dev, train = self._split(recipe.max_length, searching)
        model = make_model(self.start.config, self.start.state, self.start.vocabulary.sep_id, self.kind, seed)
        tuned = fine_tune(
            model,
            self.kind,
            train,
            recipe,
            seed,
            dev,
            self.dataset.metric,
            lambda fraction: self.progress(name, fraction),
        )
        row: Row = {
            "key": key,
            "data": self.dataset.name,
            "kind": self.dataset.kind,
            "start": self.start.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "phase": "search" if searching else "final",
            "seed": seed,
            **asdict(recipe),
            "metric": self.dataset.metric,
            "chosen_on": "last epoch" if dev is None else "held out" if searching and not self.dataset.dev else "dev",
            "epoch": tuned.epoch,
            "losses": list(tuned.losses),
            "dev": dict(tuned.dev[tuned.epoch - 1]) if tuned.dev else {},
            "train_examples": len(train.examples),
        }
        if not searching:
            row |= {"test_source": self.dataset.test_source, "test_examples": len(self.dataset.test)}
            row["test"] = self._measured(model, tuned.kind, "test", recipe)
            for split in self.dataset.further:
                row[split] = self._measured(model, tuned.kind, split, recipe)
        row["cpu_seconds"] = round(time.process_time() - begun, 2)
        self.done[key] = row
        if self.out is not None:
            append_row(self.out, row)
        return row

    def _measured(self, model: torch.nn.Module, kind: Kind, split: str, recipe: Recipe) -> dict[str, float]:
        examples = self._encoded(split, recipe.max_length)
        return kind.score(predict(model, examples, recipe.precision), examples)

    def _encoded(self, split: str, max_length: int) -> Encoded:
        if (split, max_length) not in self.encoded:
            self.progress(f"tokenizing {split}", 0.0)
            examples = self.dataset.further[split] if split in self.dataset.further else getattr(self.dataset, split)
            self.encoded[split, max_length] = self.kind.encode(examples, self.tokenizer, max_length)
        return self.encoded[split, max_length]

    def _split(self, max_length: int, searching: bool) -> tuple[Encoded | None, Encoded]:
        """What choices are made by, if anything, and what is trained on."""
        if self.dataset.dev:
            return self._encoded("dev", max_length), self._encoded("train", max_length)
        if not searching:
            return None, self._encoded("train", max_length)
        for split, part in zip(("held out", "kept"), self._cut(), strict=True):
            if (split, max_length) not in self.encoded:
                self.encoded[split, max_length] = self.kind.encode(part, self.tokenizer, max_length)
        return self.encoded["held out", max_length], self.encoded["kept", max_length]

    def _cut(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        whole = replace(self.dataset, dev=(), test=(), further={}).with_test(CHOSEN_ON)
        return whole.test, whole.train


# --- rows -----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `run_trials` wrote; none where there is no file. A line cut short by a kill is dropped.

    Raises:
        DataError: a file of something else.
    """
    if not path.exists():
        return []
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file for the rows")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines() if line.strip()]
    except ValueError:
        rows = [None]
    cut = not whole and content.startswith(b'{"key": "')  # the very first line
    if not all(isinstance(row, dict) and "key" in row for row in rows) or (content and not rows and not cut):
        raise DataError(f"{path} does not hold rows of evaluate; name a new file")
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return rows


def floor(dataset: Dataset) -> dict[str, float]:
    """The measures of a guess that reads nothing: train's commonest label, its mean score, O for every word, no answer."""
    kind, test = kind_of(dataset), dataset.test
    said = np.zeros(kind.outputs, np.float32)
    if dataset.kind == "classification":
        counts = Counter(e.label for e in dataset.train)
        said[max(range(len(dataset.labels)), key=lambda i: counts[dataset.labels[i]])] = 1
    notes: tuple[list[int], ...] = tuple([] for _ in test)  # no word, no window is shown
    starts = np.zeros(len(test) + 1, np.int64)
    if dataset.kind == "spans":
        return kind.score([], Encoded(test, starts[:0], starts[:1], starts[:0]))
    return kind.score([said] * len(test), Encoded(test, starts[:0], starts, starts[:0], notes=notes))


def floor_rows(dataset: Dataset, out: Path | None = None) -> list[Row]:
    """Rows of what a student has to beat: a guess that reads nothing and, for classification, TF-IDF with a linear model."""
    guesses = {"regression": "train's mean", "tokens": "always O", "spans": "no answer"}
    rows = [_floor_row(dataset, guesses.get(dataset.kind, "always the commonest label"), floor(dataset))]
    known = {e.label for e in dataset.test} <= set(dataset.labels)  # not where a threshold is to tell out of scope
    if dataset.kind == "classification" and known and "choice of" not in dataset.test[0].fields:
        done = {row["key"]: row for row in read_rows(out)} if out else {}
        row = _floor_row(dataset, "TF-IDF, logistic regression", {})
        if row["key"] not in done:
            guessed, expected = tfidf_guesses(dataset), [e.label or "" for e in dataset.test]
            scores = classification_scores(guessed, expected, dataset.labels)
            row["test"] = scores | (scope_scores(guessed, expected, dataset.outside) if dataset.outside else {})
            if out is not None:
                append_row(out, row)
        rows.append(done.get(row["key"], row))
    return rows


def _floor_row(dataset: Dataset, name: str, scores: Mapping[str, float]) -> Row:
    key = hashlib.sha256(json.dumps([name, _digest(dataset)]).encode()).hexdigest()[:32]
    return {"key": key, "data": dataset.name, "start": name, "phase": "floor", "test": dict(scores)}


def _digest(dataset: Dataset) -> str:
    """sha256 in hex of every example, in order."""
    return hashlib.sha256(repr(dataset).encode()).hexdigest()


def markdown(dataset: Dataset, rows: Sequence[Row]) -> str:
    """Mean, least and greatest of each measure over the seeds, a line a start, and the floors below."""
    final = [row for row in rows if row["phase"] == "final"]
    names = sorted(final[0]["test"], key=lambda name: name != dataset.metric)
    lines = ["| start | seeds | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for split in ("test", *dataset.further):
        for start in dict.fromkeys(row["start"] for row in final):
            mine = [row[split] for row in final if row["start"] == start]
            told = {name: f"{mean:.4f} ({low:.4f} to {high:.4f})" for name, mean, low, high in summarised(mine)}
            shown = start if split == "test" else f"{start}, {split}"
            lines.append(f"| {shown} | {len(mine)} | " + " | ".join(told.get(name, "") for name in names) + " |")
    for row in rows:
        if row["phase"] == "floor":
            cells = (f"{row['test'][name]:.4f}" if name in row["test"] else "" for name in names)
            lines.append(f"| {row['start']} | | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def best_metric(dataset: Dataset, name: str) -> Dataset:
    """The data set, chosen and told by another measure; unchanged for "".

    Raises:
        DataError: no such measure of its kind.
    """
    known = list(floor(dataset)) if name else [""]
    if name and name not in known:
        raise DataError(f"{name!r} is not measured on {dataset.name}; choose one of {', '.join(known)}")
    return replace(dataset, metric=name) if name else dataset
