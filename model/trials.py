"""Fine-tuning again and again: seeds, a search over settings, rows that need not be done twice."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketfed.model.answer_files import PREDICTIONS, check_answerable, write_answers
from pocketfed.model.checkpoints import load, tokens_of
from pocketfed.model.config import MobileBertConfig, preset
from pocketfed.model.encoded import Encoded, Kind
from pocketfed.model.finetuning import FineTuningError, Recipe, fine_tune, make_model, predict
from pocketfed.model.metrics import goodness
from pocketfed.model.rows import append_row
from pocketfed.model.shipped import located, starts_untrained
from pocketfed.model.spans import Spans
from pocketfed.model.supervision import kind_of
from pocketfed.model.tasks import DataError, Dataset
from pocketfed.model.tokenization import Tokenizer, Vocabulary, train_vocabulary
from pocketfed.model.trial_rows import Row, data_digest, read_rows

# Sun et al. 2020, section 4.3: where the best of each task was looked for.
PAPER_SPACE: Mapping[str, tuple[float, ...]] = {
    "learning_rate": tuple(rate * 1e-5 for rate in range(1, 11)),
    "batch_size": (16, 32, 48),
    "epochs": tuple(range(2, 11)),
}
CHOSEN_ON = 0.1  # of train, held out to choose settings by where there is no dev


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
    predictions: Path | None = None,
) -> list[Row]:
    """Fine-tunes each start with each seed and measures it on the test split; returns a row a trial.

    Rows of other seeds that stand in `out`, of the same data, start and settings, are returned with those of `plan`, in
    order of their seeds: whoever runs seed after seed ends with the whole table.

    The epoch that is kept is the best on dev, where the data has a dev beside its test, else the last. A search chooses
    by dev too, or by a tenth of train that is held out from its trials.

    Args:
        dataset: with a test (`Dataset.with_test`).
        out: a JSON-lines file of rows: trials that stand there are not done again, others are added as they end.
        predictions: a folder for the answers of each final trial to questions on passages, in a folder of its own, by
            start and seed (`answer_files`). A trial whose answers are not there is done again for them.

    Raises:
        DataError, FineTuningError: data that leaves nothing to test, or a loss that diverged.
    """
    if not dataset.test:
        raise DataError(f"{dataset.name} leaves no example to test on; give more data or a test split")
    if predictions is not None:
        check_answerable(dataset)
    torch.set_num_threads(1)
    done = {row["key"]: row for row in read_rows(out)} if out else {}
    data = data_digest(dataset)
    rows: list[Row] = []
    for start in starts:
        desk = _Desk(dataset, start, data, out, done, progress, predictions)
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
        final = [desk.trial(recipe, seed, f"seed {seed}") for seed in plan.seeds]
        final += [row for row in done.values() if desk.is_final(row, recipe) and row["seed"] not in plan.seeds]
        rows += sorted(final, key=lambda row: int(row["seed"]))
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
        predictions: Path | None,
    ) -> None:
        self.dataset, self.start, self.out, self.done, self.progress = dataset, start, out, done, progress
        self.predictions = predictions
        self.kind: Kind = kind_of(dataset)
        self.identity = [data, start.digest()]
        self.tokenizer = Tokenizer(start.vocabulary)
        self.encoded: dict[tuple[str, int], Encoded] = {}

    def is_final(self, row: Row, recipe: Recipe) -> bool:
        """Whether a row of the file is what this start gives with this recipe and the row's own seed."""
        return row.get("phase") == "final" and row["key"] == self._key(recipe, row["seed"], searching=False)

    def _key(self, recipe: Recipe, seed: int, searching: bool) -> str:
        settings = asdict(recipe)
        if recipe.device == "cpu":  # rows from before there was another keep their keys
            del settings["device"]
        told = json.dumps([*self.identity, settings, seed, searching])
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def trial(self, recipe: Recipe, seed: int, what: str, searching: bool = False) -> Row:
        key = self._key(recipe, seed, searching)
        answers = None if searching else self._answers(key, seed)
        if key in self.done and (answers is None or (answers / PREDICTIONS).exists()):
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
            row["test"] = self._measured(model, tuned.kind, "test", recipe, answers)
            for split in self.dataset.further:
                row[split] = self._measured(model, tuned.kind, split, recipe)
        row["cpu_seconds"] = round(time.process_time() - begun, 2)
        if key in self.done:  # it was done again for its answers
            return self.done[key]
        self.done[key] = row
        if self.out is not None:
            append_row(self.out, row)
        return row

    def _answers(self, key: str, seed: int) -> Path | None:
        if self.predictions is None:
            return None
        name = re.sub(r"[^\w.-]+", "-", self.start.name)
        return self.predictions / f"{name}-seed{seed}-{key[:8]}"

    def _measured(
        self, model: torch.nn.Module, kind: Kind, split: str, recipe: Recipe, answers: Path | None = None
    ) -> dict[str, float]:
        examples = self._encoded(split, recipe.max_length)
        outputs = predict(model, examples, recipe.precision)
        if answers is not None and isinstance(kind, Spans):
            write_answers(answers, kind, outputs, examples)
        return kind.score(outputs, examples)

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
