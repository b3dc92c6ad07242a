"""Chunks of a corpus made into batches with hidden tokens and sentence pairs (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketfed.model.corpus import CorpusError
from pocketfed.model.teacher import FeatureTeacher, PreTrainingModel
from pocketfed.model.token_store import SPECIAL, Ints, TokenCorpus, Tokens
from pocketfed.model.tokenization import PREFIX, Vocabulary

MASK_SHARE = 0.15
NO_PAIR = -1  # next_sentence of a text without a second segment: it does not count
POOL = 32  # batches whose chunks are sorted by length together


@dataclass(frozen=True)
class MaskedBatch:
    """B texts of at most T tokens, M of them hidden.

    input_ids, attention_mask, token_type_ids: (B, T) int64. chosen: (B, T) bool, the M positions to predict.
    targets: (M,) int64. next_sentence: (B,) int64, 0 where the second segment follows the first, 1 where it is from
    elsewhere, NO_PAIR where there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    chosen: Tensor
    targets: Tensor
    next_sentence: Tensor

    def to(self, device: torch.device) -> MaskedBatch:
        return MaskedBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def whole(self) -> MaskedBatch:
        """The same texts with nothing hidden."""
        return replace(self, input_ids=self.input_ids.masked_scatter(self.chosen, self.targets))

    def rows(self, rows: slice) -> MaskedBatch:
        """Some of the texts."""
        here = torch.zeros(len(self.input_ids), dtype=torch.bool)
        here[rows] = True
        return MaskedBatch(
            self.input_ids[rows],
            self.attention_mask[rows],
            self.token_type_ids[rows],
            self.chosen[rows],
            self.targets[here[self.chosen.nonzero()[:, 0]]],
            self.next_sentence[rows],
        )

    def split(self, parts: int) -> list[MaskedBatch]:
        """At most so many batches of consecutive texts, of equal number but for the last."""
        if parts == 1:
            return [self]
        size = -(-len(self.input_ids) // parts)
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.input_ids), size)]

    @property
    def counts(self) -> dict[str, int]:
        """What losses are means over."""
        return {
            "hidden": len(self.targets),
            "pairs": int((self.next_sentence != NO_PAIR).sum()),
            "tokens": int(self.attention_mask.sum()),
            "texts": len(self.input_ids),
        }

    def shares_of(self, whole: MaskedBatch) -> dict[str, float]:
        """How much of a whole batch this part of it holds; 1 of what neither has."""
        held = whole.counts
        return {what: 1.0 if count == held[what] else count / held[what] for what, count in self.counts.items()}


@dataclass(frozen=True, eq=False)
class Batches:
    """Batch number n of a stage is a pure function of the seed and n, so training can go on from any step.

    Args:
        pairs: make sentence pairs where a chunk has two sentences. whole_words: hide words, not pieces.
        most_hidden: tokens of a text; 0 for no limit.
        least: texts that every batch must have; what is left over at the end of an epoch joins another batch if it is fewer.
    """

    corpus: TokenCorpus
    vocabulary: Vocabulary
    batch_size: int
    seed: int
    pairs: bool = True
    whole_words: bool = False
    most_hidden: int = 0
    least: int = 1
    _lengths: Ints = field(init=False, repr=False)
    _orders: dict[tuple[int, int], list[Ints]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lengths", self.corpus.lengths)

    @property
    def an_epoch(self) -> int:
        whole, left = divmod(len(self.corpus), self.batch_size)
        return whole + (left >= self.least or (left > 0 and not whole))

    def batch(self, number: int, stage: int = 0) -> MaskedBatch:
        """`stage` keeps stages from seeing the same masks in the same order."""
        epoch, place = divmod(number, self.an_epoch)
        order = self._order(stage, epoch)
        rng = np.random.default_rng([self.seed, stage, number, 1])
        return make_batch(self.corpus, order[place], self, rng)

    def _order(self, stage: int, epoch: int) -> list[Ints]:
        """Of the last two epochs asked for it is kept."""
        if (stage, epoch) not in self._orders:
            rng = np.random.default_rng([self.seed, stage, epoch, 0])
            self._orders[stage, epoch] = epoch_order(self._lengths, self.batch_size, rng, self.least)
            for oldest in list(self._orders)[:-2]:
                del self._orders[oldest]
        return self._orders[stage, epoch]


def epoch_order(lengths: Ints, batch_size: int, rng: np.random.Generator, least: int = 1) -> list[Ints]:
    """Each chunk once, in batches of similar length and random order: little padding, and no order to learn from.

    Fewer than `least` left over at the end join the batch before.
    """
    order = rng.permutation(len(lengths))
    batches: list[Ints] = []
    for start in range(0, len(order), batch_size * POOL):
        pool = order[start : start + batch_size * POOL]
        pool = pool[lengths[pool].argsort(kind="stable")]
        batches.extend(pool[i : i + batch_size] for i in range(0, len(pool), batch_size))
    if len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return [batches[i] for i in rng.permutation(len(batches))]


def make_batch(corpus: TokenCorpus, indices: Ints, how: Batches, rng: np.random.Generator) -> MaskedBatch:
    vocabulary = how.vocabulary
    rows = [_pair(corpus, int(chunk), how.pairs, rng) for chunk in indices]
    longest = max(len(a) + len(b) + (3 if len(b) else 2) for a, b, _ in rows)
    ids = np.full((len(rows), longest), vocabulary.pad_id, np.int64)
    mask, types = np.zeros_like(ids), np.zeros_like(ids)
    for row, (a, b, _) in enumerate(rows):
        first = len(a) + 2
        ids[row, 0], ids[row, 1 : first - 1], ids[row, first - 1] = vocabulary.cls_id, a, vocabulary.sep_id
        end = first
        if len(b):
            end = first + len(b) + 1
            ids[row, first : end - 1], ids[row, end - 1] = b, vocabulary.sep_id
            types[row, first:end] = 1
        mask[row, :end] = 1
    hidden, chosen = mask_tokens(ids, mask, vocabulary, rng, how.whole_words, how.most_hidden)
    labels = np.array([label for _, _, label in rows], np.int64)
    arrays = (hidden, mask, types, chosen, ids[chosen], labels)
    return MaskedBatch(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays))


def _pair(corpus: TokenCorpus, chunk: int, pairs: bool, rng: np.random.Generator) -> tuple[Tokens, Tokens, int]:
    """A chunk's text, as two segments where it can be: the second is the rest, or half the time another document's."""
    sentences = corpus.sentences(chunk)
    if not pairs or len(sentences) < 2:
        return np.concatenate(sentences), np.empty(0, np.int64), NO_PAIR
    cut = int(rng.integers(1, len(sentences)))
    first, rest = np.concatenate(sentences[:cut]), np.concatenate(sentences[cut:])
    other = int(rng.integers(len(corpus)))
    elsewhere = rng.random() < 0.5 and corpus.chunks[other, 3] != corpus.chunks[chunk, 3]
    if not elsewhere:
        return first, rest, 0
    # Whole sentences, about as many tokens as what they replace, or the length would tell.
    found = corpus.sentences(other)
    enough = int(np.searchsorted(np.cumsum([len(s) for s in found]), len(rest))) + 1
    return first, np.concatenate(found[:enough])[: corpus.max_length - SPECIAL - len(first)], 1


def mask_tokens(
    ids: Ints,
    mask: Ints,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    whole_words: bool = False,
    most_hidden: int = 0,
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Hide 15 % of each row's ordinary tokens, at least one: 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        whole_words: the pieces of a word are hidden together, each with a fate of its own; of the last word perhaps more
            than the share.
        most_hidden: of a row, unless 0; a last word that is more has only some of its pieces hidden.

    Returns the new ids and which positions were chosen, both (B, T).
    """
    special, ordinary, continues = _kinds(vocabulary)
    candidates = (mask == 1) & ~special[ids]
    available = candidates.sum(1)
    wanted = np.minimum(available, np.maximum(1, np.rint(MASK_SHARE * available)))
    wanted = np.minimum(wanted, most_hidden) if most_hidden else wanted
    draw = rng.random(ids.shape)
    if whole_words:  # all pieces of a word have its first one's draw, so they are chosen one after the other
        heads = ~(continues[ids] & candidates)
        heads[:, 0] = True
        first = np.maximum.accumulate(np.where(heads, np.arange(ids.shape[1]), 0), axis=1)
        draw = np.take_along_axis(draw, first, axis=1)
    draw = np.where(candidates, draw, 2.0)
    rank = draw.argsort(1, kind="stable").argsort(1, kind="stable")
    chosen = rank < wanted[:, None]
    if whole_words:
        last = np.where(chosen, draw, -1.0).max(1, keepdims=True)
        whole = candidates & (draw <= last)
        chosen = np.where(whole.sum(1, keepdims=True) > most_hidden, chosen, whole) if most_hidden else whole
    fate = rng.random(ids.shape)
    replaced = rng.choice(ordinary, ids.shape) if len(ordinary) else ids
    hidden = np.where(fate < 0.8, vocabulary.mask_id, np.where(fate < 0.9, replaced, ids))
    return np.where(chosen, hidden, ids), chosen


@functools.lru_cache(maxsize=8)
def _kinds(vocabulary: Vocabulary) -> tuple[npt.NDArray[np.bool_], Ints, npt.NDArray[np.bool_]]:
    """Of each id whether it is special and whether it continues a word; and all ordinary ids."""
    special = np.zeros(len(vocabulary), np.bool_)
    special[[vocabulary.pad_id, vocabulary.unk_id, vocabulary.cls_id, vocabulary.sep_id, vocabulary.mask_id]] = True
    continues = np.array([token.startswith(PREFIX) for token in vocabulary.tokens])
    return special, np.flatnonzero(~special), continues


@dataclass(frozen=True)
class MaskedScore:
    """Cross-entropy in nats a hidden token, the share of them guessed right, and of pairs told apart (None: no pairs)."""

    loss: float
    accuracy: float
    tokens: int
    next_sentence: float | None = None


@dataclass(frozen=True)
class FeatureScore:
    """How near a student is to a teacher that predicts nothing, on whole texts.

    cosine: of their sentence vectors, mean over texts. explained: share of the variance of the teacher's last features
    (LayerNorm without gain, as transfer compares them) that the student's have.
    """

    cosine: float
    explained: float
    texts: int


@torch.no_grad()
def score_features(student: PreTrainingModel, teacher: FeatureTeacher, batches: Batches) -> FeatureScore:
    """Student beside teacher on all texts, nothing hidden.

    Raises:
        CorpusError: no text.
    """
    training, device = student.training, next(student.parameters()).device
    student.eval()
    cosines, missed, varied, tokens = 0.0, 0.0, 0.0, 0
    total = torch.zeros(teacher.config.hidden_size, dtype=torch.float64, device=device)
    order = batches.corpus.lengths.argsort(kind="stable")
    rng = np.random.default_rng(batches.seed)
    for start in range(0, len(order), 64):
        batch = make_batch(batches.corpus, order[start : start + 64], batches, rng).whole().to(device)
        inputs, mask = (batch.input_ids, batch.attention_mask, batch.token_type_ids), batch.attention_mask
        ours, theirs = student.mobilebert(*inputs).last, teacher.mobilebert(*inputs).last
        vectors = student.mobilebert.pool_tokens(ours, mask), teacher.mobilebert.pool_tokens(theirs, mask)
        cosines += float(F.cosine_similarity(*vectors, dim=-1).sum())
        s, t = (F.layer_norm(x[mask == 1], x.shape[-1:]).double() for x in (ours, theirs))
        missed += float((s - t).square().sum())
        varied += float(t.square().sum())
        total += t.sum(0)
        tokens += len(t)
    student.train(training)
    if not tokens:
        raise CorpusError("no text is held out to compare student and teacher on; give a larger corpus")
    return FeatureScore(
        cosines / len(order), 1.0 - missed / (varied - float(total.square().sum()) / tokens), len(order)
    )


@torch.no_grad()
def score_masked(model: PreTrainingModel, batches: Batches) -> MaskedScore:
    """How well a model guesses hidden tokens of all chunks; the same seed hides the same ones, so that models compare.

    Raises:
        CorpusError: no token that could be hidden.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    loss, right, total, pairs, told = 0.0, 0, 0, 0, 0
    order = batches.corpus.lengths.argsort(kind="stable")
    rng = np.random.default_rng(batches.seed)
    for start in range(0, len(order), 64):
        batch = make_batch(batches.corpus, order[start : start + 64], batches, rng).to(device)
        logits, related = model(batch.input_ids, batch.attention_mask, batch.chosen, batch.token_type_ids)
        loss += float(F.cross_entropy(logits.float(), batch.targets, reduction="sum"))
        right += int((logits.argmax(-1) == batch.targets).sum())
        total += len(batch.targets)
        paired = batch.next_sentence != NO_PAIR
        pairs += int(paired.sum())
        told += int((related.argmax(-1) == batch.next_sentence)[paired].sum())
    model.train(training)
    if not total:
        raise CorpusError("the held-out text holds no token of the vocabulary; give a corpus the vocabulary covers")
    return MaskedScore(loss / total, right / total, total, told / pairs if pairs else None)
