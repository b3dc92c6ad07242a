"""Losses, rates, gradients and speed of a distillation as TensorBoard events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pocketfed.model.config import ConfigError
from pocketfed.model.distillation import Tick


@contextmanager
def training_log(folder: Path | None) -> Iterator[Callable[[Tick], None] | None]:
    """Writes each step's loss, learning rate, gradient norm and speed as TensorBoard events.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("TensorBoard is not installed; run `pip install 'pocketfed[tensorboard]'`") from None
    writer = SummaryWriter(str(folder))

    def log(tick: Tick) -> None:
        for name, value in (("loss", tick.loss), ("rate", tick.rate), ("gradient_norm", tick.gradient_norm)):
            writer.add_scalar(f"{name}/{tick.stage}", value, tick.step)
        writer.add_scalar("tokens_per_second", tick.tokens_per_s, tick.tokens)

    try:
        yield log
    finally:
        writer.close()
