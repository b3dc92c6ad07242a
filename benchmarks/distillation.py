"""Speed of distillation: our stages against the same losses on Hugging Face's modules, as they come and with care, in one run.

    python benchmarks/distillation.py --geometry micro --repeats 7
    python benchmarks/distillation.py --geometry mobilebert --batch 4 --repeats 5

All sides see the same batch and do one step of the same kind: forward passes of student and teacher, loss, backward pass,
clip, AdamW. Hugging Face's teacher is its MobileBERT with the query and key products of the right size put in, since its own
cannot be built for an inverted bottleneck. Steps alternate A B C A B C; times are CPU seconds of this process; a ratio is how
many times as long the other side takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

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


class Plain:
    """The same stages on Hugging Face's modules as they come: every token gets logits, whatever the loss then takes of them."""

    name, fused = "as they come", False

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

    def _outputs(self, model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Logits of the hidden words, and of whether sentences belong together."""
        out = model(**_inputs(batch))
        return out.prediction_logits[batch.chosen], out.seq_relationship_logits

    def _features(self, model: nn.Module, batch: MaskedBatch, layer: int) -> tuple[Tensor, Tensor]:
        """What block `layer` (from 0) gives, and its attention map."""
        out = model(**_inputs(batch), output_hidden_states=True, output_attentions=True)
        return out.hidden_states[layer + 1], out.attentions[layer]

    def loss(self, kind: str, batch: MaskedBatch) -> Tensor:
        if kind == "teacher":
            words, related = self._outputs(self.teacher, batch)
            return masked_language_loss(words, batch.targets) + next_sentence_loss(related, batch.next_sentence)
        if kind == "transfer":
            layer, mask = self.student.config.num_hidden_layers // 2, batch.attention_mask.float()
            with torch.no_grad():
                taught, given = self._features(self.teacher, batch, layer)
            learnt, own = self._features(self.student, batch, layer)
            maps = -(given * own.clamp_min(1e-9).log()).sum(-1).mean(1)
            return feature_map_loss(learnt, taught, mask) + (maps * mask).sum() / mask.sum()
        with torch.no_grad():
            target, _ = self._outputs(self.teacher, batch)
        words, related = self._outputs(self.student, batch)
        loss = pretraining_distillation_loss(words, target, batch.targets)
        return loss + next_sentence_loss(related, batch.next_sentence)


class Careful(Plain):
    """As whoever knows these modules well would use them: heads on hidden words alone, no head and no higher block in
    transfer, a fused optimizer.
    """

    name, fused = "with care", True

    def _outputs(self, model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        out = model.mobilebert(**_inputs(batch))
        return model.cls.predictions(out.last_hidden_state[batch.chosen]), model.cls.seq_relationship(out.pooler_output)

    def _features(self, model: nn.Module, batch: MaskedBatch, layer: int) -> tuple[Tensor, Tensor]:
        encoder = model.mobilebert.encoder
        every = encoder.layer
        try:
            encoder.layer = every[: layer + 1]
            out = model.mobilebert(**_inputs(batch), output_hidden_states=True, output_attentions=True)
        finally:
            encoder.layer = every
        return out.hidden_states[layer + 1], out.attentions[layer]


def _inputs(batch: MaskedBatch) -> dict[str, Tensor]:
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "token_type_ids": batch.token_type_ids,
    }


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
    peers = [Plain(student, teacher), Careful(student, teacher)]
    report = {}
    for kind, (stage, at) in stages.items():
        sides: dict[str, tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]] = {}

        def own(stage: Stage = stage, at: int = at) -> Tensor:
            return stage.loss(batch, at)

        sides["ours"] = stage.trained, make_optimizer("adamw", stage.groups()), own
        for peer in peers:
            model = peer.teacher if kind == "teacher" else peer.student
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=peer.fused)
            sides[peer.name] = model, optimizer, partial(peer.loss, kind, batch)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(options.repeats + 1):
            for name, (model, optimizer, loss) in sides.items():
                with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                    seconds = step_of(model, optimizer, loss)
                if repeat:  # the first step warms up
                    times[name].append(seconds)
        tokens = int(batch.attention_mask.sum())
        report[kind] = {"ours_tokens_per_cpu_s": tokens / statistics.median(times["ours"])}
        for peer in peers:
            ratios = [b / a for a, b in zip(times["ours"], times[peer.name], strict=True)]
            report[kind][peer.name] = statistics.median(ratios), min(ratios), max(ratios)
    if options.json:
        print(json.dumps(report))
        return
    for kind, row in report.items():
        told = "; ".join(f"{p.name} {row[p.name][0]:.2f} x [{row[p.name][1]:.2f}, {row[p.name][2]:.2f}]" for p in peers)
        print(f"{kind:13} {row['ours_tokens_per_cpu_s']:8,.0f} tokens a CPU second; Hugging Face's modules {told}")


if __name__ == "__main__":
    main()
