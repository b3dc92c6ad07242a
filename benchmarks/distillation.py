"""Speed of distillation: our stages against the same losses on Hugging Face's modules, in one run.

    python benchmarks/distillation.py --geometry micro --repeats 7
    python benchmarks/distillation.py --geometry mobilebert --batch 4 --repeats 5

Both sides see the same batches and do one step of the same kind: forward passes of student and teacher, loss, backward
pass, clip, AdamW. Hugging Face's teacher is its MobileBERT with the query and key products of the right size put in, since its
own cannot be built for an inverted bottleneck. Steps alternate A B A B; times are CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from pocketfed.model.config import STUDENTS, TEACHERS, MobileBertConfig
from pocketfed.model.objectives import (
    feature_map_loss,
    masked_language_loss,
    next_sentence_loss,
    pretraining_distillation_loss,
)
from pocketfed.model.pretraining import Batches, MaskedBatch
from pocketfed.model.schedules import Schedule
from pocketfed.model.stages import MaskedWords, Predictions, Stage, Transfer, make_optimizer
from pocketfed.model.teacher import PreTrainingModel
from pocketfed.model.token_store import Shard, TokenCorpus
from pocketfed.model.tokenization import SPECIAL_TOKENS, Vocabulary

OWN = ("pooling", "head_norm", "mask_style", "isolate_padding")


def corpus_of(vocabulary: int, length: int, chunks: int, seed: int = 0) -> tuple[TokenCorpus, Vocabulary]:
    """Random tokens, two sentences a chunk: time does not depend on what they say."""
    rng = np.random.default_rng(seed)
    words = Vocabulary((*SPECIAL_TOKENS, *(f"w{i}" for i in range(vocabulary - len(SPECIAL_TOKENS)))))
    half = (length - 3) // 2
    tokens = rng.integers(len(SPECIAL_TOKENS), vocabulary, 2 * half * chunks)
    shard = Shard(tokens, np.arange(0, len(tokens) + 1, half))
    ranges = np.arange(0, 2 * chunks, 2)
    return TokenCorpus((shard,), np.stack([0 * ranges, ranges, ranges + 2, ranges], axis=1), length), words


class Peer:
    """The same stages on Hugging Face's modules."""

    def __init__(self, student: MobileBertConfig, teacher: MobileBertConfig) -> None:
        self.student, self.teacher = (self._build(c) for c in (student, teacher))
        self.teacher.eval()

    @staticmethod
    def _build(config: MobileBertConfig) -> nn.Module:
        values = {k: v for k, v in config.to_dict().items() if k not in OWN}
        theirs = transformers.MobileBertConfig(**values, attn_implementation="eager")
        model = transformers.MobileBertForPreTraining(theirs)
        for block in model.mobilebert.encoder.layer:
            for name in ("query", "key"):
                wanted = config.query_key_size
                if getattr(block.attention.self, name).in_features != wanted:
                    setattr(block.attention.self, name, nn.Linear(wanted, config.intra_bottleneck_size))
        return model

    def _run(self, model: nn.Module, batch: MaskedBatch) -> Any:
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
            output_hidden_states=True,
            output_attentions=True,
        )

    def loss(self, kind: str, batch: MaskedBatch) -> Tensor:
        if kind == "teacher":
            out = self._run(self.teacher, batch)
            words = out.prediction_logits[batch.chosen]
            return masked_language_loss(words, batch.targets) + next_sentence_loss(
                out.seq_relationship_logits, batch.next_sentence
            )
        with torch.no_grad():
            theirs = self._run(self.teacher, batch)
        ours = self._run(self.student, batch)
        if kind == "transfer":
            layer = len(ours.attentions) // 2
            maps = -(theirs.attentions[layer] * ours.attentions[layer].clamp_min(1e-9).log()).sum(-1).mean(1)
            mask = batch.attention_mask.float()
            attention = (maps * mask).sum() / mask.sum()
            return feature_map_loss(ours.hidden_states[layer + 1], theirs.hidden_states[layer + 1], mask) + attention
        words, target = ours.prediction_logits[batch.chosen], theirs.prediction_logits[batch.chosen]
        return pretraining_distillation_loss(words, target, batch.targets) + next_sentence_loss(
            ours.seq_relationship_logits, batch.next_sentence
        )


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> float:
    """CPU seconds of one step."""
    begun = time.process_time()
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    return time.process_time() - begun


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--geometry", choices=sorted(STUDENTS), default="micro")
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--length", type=int, default=64)
    arguments.add_argument("--vocabulary", type=int, default=8192)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = STUDENTS[options.geometry].with_changes(vocab_size=options.vocabulary, attention_probs_dropout_prob=0.0)
    teacher = TEACHERS[options.geometry].with_changes(vocab_size=options.vocabulary, attention_probs_dropout_prob=0.0)
    corpus, words = corpus_of(options.vocabulary, options.length, 4 * options.batch)
    batch = Batches(corpus, words, options.batch, 0).batch(0)
    schedule = Schedule(1, 2 * student.num_hidden_layers, 1, options.batch, 1e-3, 1e-3, 1e-3, optimizer="adamw")
    ours, theirs = PreTrainingModel(student), PreTrainingModel(teacher)
    stages: dict[str, tuple[Stage, int]] = {
        "teacher": (MaskedWords(theirs, "teacher", 1, 1, 1e-3, 0.1), 0),
        # The phase of the layer in the middle: the mean of all phases' depth, but for half a layer.
        "transfer": (Transfer(ours, theirs, schedule), 2 * (student.num_hidden_layers // 2)),
        "distillation": (Predictions(ours, theirs, schedule, 1), 0),
    }
    peer = Peer(student, teacher)
    report = {}
    for kind, (stage, at) in stages.items():
        model = peer.teacher if kind == "teacher" else peer.student
        mine = make_optimizer("adamw", stage.groups())
        other = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def own(stage: Stage = stage, at: int = at) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                return stage.loss(batch, at)

        def hugging(kind: str = kind) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                return peer.loss(kind, batch)

        times: dict[str, list[float]] = {"ours": [], "hugging face": []}
        for repeat in range(options.repeats + 1):
            for name, seconds in (
                ("ours", step_of(stage.trained, mine, own)),
                ("hugging face", step_of(model, other, hugging)),
            ):
                if repeat:  # the first step warms up
                    times[name].append(seconds)
        ratios = [b / a for a, b in zip(times["ours"], times["hugging face"], strict=True)]
        tokens = int(batch.attention_mask.sum())
        report[kind] = {
            "tokens": tokens,
            "ours_tokens_per_cpu_s": tokens / statistics.median(times["ours"]),
            "hugging_face_tokens_per_cpu_s": tokens / statistics.median(times["hugging face"]),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    if options.json:
        print(json.dumps(report))
        return
    for kind, row in report.items():
        low, high = row["ratio_range"]
        print(
            f"{kind:13} {row['ours_tokens_per_cpu_s']:8,.0f} tokens a CPU second, Hugging Face "
            f"{row['hugging_face_tokens_per_cpu_s']:8,.0f}: {row['ratio']:.2f} x [{low:.2f}, {high:.2f}]"
        )


if __name__ == "__main__":
    main()
