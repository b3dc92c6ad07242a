"""What a user would otherwise do on the device: the same MobileBERT with Hugging Face, with peft, with Flower's quickstart.

    python benchmarks/peers.py --peer hf-full --length 128 --batch 16                 # one JSON line, this process
    python benchmarks/peers.py --peer hf-full,peft-best,flower --repeats 5            # a table, a fresh process a run
    python benchmarks/peers.py --peer hf-full --model STUDENT --data DATA/snips --examples 0 --learning-rate 1e-3

Without data the examples are made up and the weights of a preset random, which time and memory do not mind. Needs
`pip install 'pocketfed[benchmarks]'`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import LABELS, BenchmarkError, chosen, interleaved, made_up, peak_rss_mb, table

ATTENTION = r".*\.attention\.(self\.(query|key|value)|output\.dense)"  # of a block: q, k, v and what follows them
WINDOW = 16  # batches whose examples are sorted by length together, as in our own trainer


@dataclass(frozen=True)
class Peer:
    """How someone trains. rank: of LoRA, 0 for all parameters. padding: to `length`, the batch's longest, or the
    longest of a batch of similar lengths. trainer: clip at 1 and a rate that falls to 0, as `transformers.Trainer` does.
    """

    rank: int = 0
    padding: str = "max_length"
    bf16: bool = False
    fused: bool = False
    dropout: bool = True
    trainer: bool = True
    flower: bool = False
    learning_rate: float = 5e-5


PEERS = {
    # Hugging Face's example script for text classification: everything, float32, padded to the limit.
    "hf-full": Peer(),
    # peft as its guide for sequence classification shows it, padded to the longest of the batch.
    "peft-lora": Peer(rank=8, padding="batch", learning_rate=1e-3),
    # The best that is still a few lines: bfloat16, batches of similar length, fused AdamW, no dropout.
    "peft-best": Peer(rank=8, padding="bucketed", bf16=True, fused=True, dropout=False, learning_rate=1e-3),
    # The same in float32: small models lose more by the casts than bfloat16 gains.
    "peft-fp32": Peer(rank=8, padding="bucketed", fused=True, dropout=False, learning_rate=1e-3),
    # Flower's Hugging Face quickstart: a ClientApp that loads all weights, trains a plain loop, returns all weights.
    "flower": Peer(padding="batch", trainer=False, flower=True),
}
COLUMNS = {
    "cpu_s_step": "CPU s a step",
    "cpu_s_round": "CPU s a round",
    "peak_rss_mb": "peak MB",
    "update_bytes": "update, bytes",
    "accuracy": "accuracy",
}


@dataclass(frozen=True)
class Encoded:
    rows: list[list[int]]
    labels: list[int]


def run_peer(
    name: str,
    *,
    model: str = "mobilebert",
    data: Path | None = None,
    batch: int = 16,
    length: int = 128,
    threads: int = 1,
    seed: int = 0,
    examples: int = 128,
    epochs: int = 3,
    learning_rate: float | None = None,
    mixed: bool = False,
    score: bool = True,
) -> dict[str, Any]:
    """One local round of a peer, in this process: peak memory means something only in a fresh one.

    Args:
        name: of PEERS. model: a preset (random weights; with data, a vocabulary trained on it) or a model folder.
        data: labelled texts as `pocketfed` reads them; None: made-up rows (`harness.made_up`, `mixed`).
        length: tokens at most. examples: what the device holds, 0 for the whole training split.
        learning_rate: None for the peer's usual. score: whether to test afterwards, where there is data.

    Returns the arguments and: steps; cpu_s_start (process CPU until the round began: imports, model, tokens); cpu_s_step
    (median of all steps but the first); cpu_s_first_step; cpu_s_round (take in weights where the peer does, train, pack
    the update); peak_rss_mb until then; trained_parameters; update_bytes; loss (mean of the last epoch); bf16 (used or
    not); test_examples and accuracy, or None.

    Raises:
        BenchmarkError: no such peer, or data it cannot train on.
    """
    if name not in PEERS:
        raise BenchmarkError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    peer = PEERS[name]
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    net, train, read_test = _prepare(model, data, length, seed, examples, mixed, peer)
    rate = peer.learning_rate if learning_rate is None else learning_rate
    bf16 = peer.bf16 and torch.cpu._is_avx512_bf16_supported()  # public: only from torch 2.9 on
    steps: list[float] = []
    losses: list[float] = []

    def fit() -> None:
        generator = np.random.Generator(np.random.PCG64(seed))
        _fit(net, train, peer, batch, length, epochs, rate, bf16, generator, steps, losses)

    if peer.flower:
        start, seconds, update_bytes = _flower_round(net, fit, len(train.rows))
    else:
        start = time.process_time()
        fit()
        update_bytes = len(_packed(net, peer))
        seconds = time.process_time() - start
    peak = peak_rss_mb()
    test = read_test() if score else None
    last = losses[-math.ceil(len(train.rows) / batch) :]
    return {
        "peer": name,
        "model": Path(model).name,
        "data": data and data.name,
        "batch": batch,
        "length": length,
        "threads": threads,
        "seed": seed,
        "examples": len(train.rows),
        "epochs": epochs,
        "learning_rate": rate,
        "mixed": mixed,
        "steps": len(steps),
        "cpu_s_start": round(start, 4),
        "cpu_s_first_step": round(steps[0], 4),
        "cpu_s_step": round(statistics.median(steps[1:] or steps), 4),
        "cpu_s_round": round(seconds, 4),
        "peak_rss_mb": round(peak, 1),
        "trained_parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "update_bytes": update_bytes,
        "loss": statistics.fmean(last),
        "bf16": bf16,
        "test_examples": len(test.rows) if test else None,
        "accuracy": _accuracy(net, test) if test else None,
    }


# ---- model and data ------------------------------------------------------------------------------------------------


def _prepare(
    model: str, data: Path | None, length: int, seed: int, examples: int, mixed: bool, peer: Peer
) -> tuple[Any, Encoded, Callable[[], Encoded | None]]:
    """The network, what the device holds, and a function that reads the test split (later: it takes memory)."""
    import torch
    import transformers

    from pocketfed.model.config import STUDENTS, MobileBertConfig, preset

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = None if model in STUDENTS or not Path(model).exists() else Path(model)
    config = MobileBertConfig.load(folder / "config.json") if folder else preset(model)
    read_test: Callable[[], Encoded | None] = lambda: None  # noqa: E731
    if data is None:
        train = Encoded(*made_up(examples, length, config.vocab_size, seed, mixed))
        count = LABELS
    else:
        from pocketfed.model.tasks import read_dataset

        dataset = read_dataset(data).with_test(seed=seed)
        if any(e.text_pair is not None for e in dataset.train):
            raise BenchmarkError(f"{data} holds pairs of texts; choose data of single texts")
        tokenizer, config = _tokenizer(folder, config, [e.text for e in dataset.train])
        index = {label: i for i, label in enumerate(dataset.labels)}
        count = len(index)

        def encode(texts: list[Any]) -> Encoded:
            usable = [e for e in texts if e.label in index]
            ids = tokenizer([e.text for e in usable], truncation=True, max_length=length)["input_ids"]
            return Encoded(ids, [index[e.label] for e in usable])

        train = encode([dataset.train[i] for i in chosen(len(dataset.train), examples, seed)])
        read_test = lambda: encode(list(dataset.test))  # noqa: E731
    if folder:
        net = transformers.MobileBertForSequenceClassification.from_pretrained(folder, num_labels=count)
    else:
        known = set(transformers.MobileBertConfig().to_dict())
        sizes = {key: value for key, value in config.to_dict().items() if key in known}
        net = transformers.MobileBertForSequenceClassification(transformers.MobileBertConfig(**sizes, num_labels=count))
    if not peer.dropout:
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return _with_lora(net, peer.rank) if peer.rank else net, train, read_test


def _tokenizer(folder: Path | None, config: Any, texts: list[str]) -> tuple[Any, Any]:
    import transformers

    if folder:
        return transformers.AutoTokenizer.from_pretrained(folder), config
    from pocketfed.model.tokenization import train_vocabulary

    vocabulary = train_vocabulary(texts, config.vocab_size)
    return transformers.BertTokenizerFast(vocab=vocabulary.ids), config.with_changes(vocab_size=len(vocabulary))


def _with_lora(net: Any, rank: int) -> Any:
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=16, target_modules=ATTENTION, modules_to_save=["classifier"]
    )
    return peft.get_peft_model(net, config)


# ---- training ------------------------------------------------------------------------------------------------------


def _batches(
    data: Encoded, batch: int, length: int, padding: str, generator: np.random.Generator | None
) -> Iterator[dict[str, Any]]:
    """All examples once as padded tensors; in random order where there is a generator."""
    import torch

    count = len(data.rows)
    order = np.arange(count) if generator is None else generator.permutation(count)
    lengths = np.array([len(row) for row in data.rows])
    window = batch * WINDOW if padding == "bucketed" else 1
    pieces = [order[i : i + window] for i in range(0, count, window)]
    order = np.concatenate([piece[lengths[piece].argsort(kind="stable")] for piece in pieces])
    parts = [order[i : i + batch] for i in range(0, count, batch)]
    for index in range(len(parts)) if generator is None else generator.permutation(len(parts)):
        part = parts[index]
        width = length if padding == "max_length" else int(lengths[part].max())
        ids = torch.zeros((len(part), width), dtype=torch.int64)  # [PAD] is 0
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, : lengths[i]] = torch.tensor(data.rows[i])
            mask[row, : lengths[i]] = 1
        yield {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([data.labels[i] for i in part])}


def _fit(
    net: Any,
    train: Encoded,
    peer: Peer,
    batch: int,
    length: int,
    epochs: int,
    rate: float,
    bf16: bool,
    generator: np.random.Generator,
    steps: list[float],
    losses: list[float],
) -> None:
    """The local epochs; adds CPU seconds and loss of each step to `steps` and `losses`."""
    import torch

    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, fused=peer.fused or None)
    total = epochs * math.ceil(len(train.rows) / batch)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / total if peer.trainer else 1.0)
    net.train()
    for _ in range(epochs):
        for feed in _batches(train, batch, length, peer.padding, generator):
            begun = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
                loss = net(**feed).loss
            loss.backward()
            if peer.trainer:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            falling.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            steps.append(time.process_time() - begun)
    net.eval()


def _packed(net: Any, peer: Peer) -> bytes:
    """What would be sent: the trained tensors as safetensors."""
    from safetensors.torch import save

    if peer.rank:
        import peft

        return bytes(save({k: v.contiguous() for k, v in peft.get_peft_model_state_dict(net).items()}))
    return bytes(save({k: v.detach().contiguous() for k, v in net.state_dict().items()}))


def _flower_round(net: Any, fit: Callable[[], None], count: int) -> tuple[float, float, int]:
    """The quickstart's client called as Flower calls it, but without a SuperNode around it and nothing on a wire.

    Returns CPU seconds of the process before the round, those of the round, and the reply's array bytes.
    """
    from pocketfed.coordinator import flwr_compat  # before flwr: it silences it

    # isort: split
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    flwr_compat.enter_run(1)
    app = ClientApp()

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        net.load_state_dict(message.content["arrays"].to_torch_state_dict())
        fit()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": count})}
        return Message(RecordDict(content), reply_to=message)

    content = RecordDict({"arrays": ArrayRecord(net.state_dict())})
    message = Message(content, dst_node_id=1, message_type="train")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    start = time.process_time()
    reply = app(message, context)
    sent = sum(len(array.data) for array in reply.content["arrays"].values())
    return start, time.process_time() - start, sent


def _accuracy(net: Any, test: Encoded) -> float:
    import torch

    right = 0
    with torch.no_grad():
        for feed in _batches(test, 64, 0, "bucketed", None):
            labels = feed.pop("labels")
            right += int((net(**feed).logits.argmax(-1) == labels).sum())
    return right / len(test.rows)


# ---- command -------------------------------------------------------------------------------------------------------


def command(name: str, arguments: argparse.Namespace, seed: int) -> list[str]:
    """The same measurement as a process of its own."""
    own = ("peer", "repeats", "seed")
    given = {k: v for k, v in vars(arguments).items() if v is not None and v is not False and k not in own}
    words = [sys.executable, os.path.abspath(__file__), "--peer", name, "--seed", str(seed)]
    for key, value in given.items():
        words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="one or several of " + ", ".join(PEERS))
    parser.add_argument("--model", default="mobilebert", help="a preset or a model folder")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=128, help="0: all")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--mixed", action="store_true", help="made-up rows of 4 to LENGTH tokens")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    names = arguments.peer.split(",")
    try:
        if len(names) == 1 and arguments.repeats == 1:
            settings = {k: v for k, v in vars(arguments).items() if k not in ("peer", "repeats")}
            print(json.dumps(run_peer(names[0], **settings)))
            return
        results = interleaved(
            {name: command(name, arguments, arguments.seed) for name in names},
            arguments.repeats,
            arguments.threads,
            lambda name, row: print(json.dumps(row), flush=True),
        )
    except BenchmarkError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    print(table(results, COLUMNS))


if __name__ == "__main__":
    main()
