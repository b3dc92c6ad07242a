"""One student under many sets of trained parameters at once: what is frozen is read once, what is trained is K wide.

The products with a frozen weight take the rows of all K together; those with a trained one are batched (`bmm`). So a step of K
devices with a few short texts each costs little more than one device's with as many texts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketfed.model.adapters import LoraLinear, layout_of
from pocketfed.model.heads import TextClassifier
from pocketfed.model.losses import task_loss
from pocketfed.model.mobilebert import NoNorm
from pocketfed.model.parameters import Vector

Array = NDArray[Any]
LAYERS = (nn.Linear, LoraLinear, NoNorm, nn.LayerNorm)  # that may hold trained parameters


class StackedLayer(nn.Module):
    """A layer for rows (K * B, ..., in) of K sets of trained parameters; the frozen ones are the layer's own.

    Args:
        layer: one of LAYERS.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.trained: dict[str, Tensor] = {}  # parameter's name -> (K, ...)

    def forward(self, x: Tensor) -> Tensor:
        count = len(next(iter(self.trained.values())))
        rows = x.reshape(count, -1, x.shape[-1])  # (K, B * ..., in)
        if isinstance(self.layer, LoraLinear):
            out = self._lora(self.layer, rows)
        elif isinstance(self.layer, nn.Linear):
            out = self._linear(self.layer, rows)
        else:
            if isinstance(self.layer, nn.LayerNorm):
                rows = F.layer_norm(rows, self.layer.normalized_shape, eps=self.layer.eps)
            out = rows * self._wide("weight") + self._wide("bias")
        return out.view(*x.shape[:-1], out.shape[-1])

    def _lora(self, layer: LoraLinear, rows: Tensor) -> Tensor:
        low = rows @ self.trained["lora_A"].transpose(1, 2)
        frozen = F.linear(rows, layer.weight, layer.bias)
        return torch.baddbmm(frozen, low, self.trained["lora_B"].transpose(1, 2), alpha=layer.scale)

    def _linear(self, layer: nn.Linear, rows: Tensor) -> Tensor:
        weight = self.trained.get("weight")
        if weight is None:
            return F.linear(rows, layer.weight) + self._wide("bias")
        if getattr(layer, "bias", None) is None:
            return rows @ weight.transpose(1, 2)
        return torch.baddbmm(self._wide("bias"), rows, weight.transpose(1, 2))

    def _wide(self, name: str) -> Tensor:
        """(K, 1, n), or (n,) where it is frozen."""
        held = self.trained.get(name)
        return getattr(self.layer, name) if held is None else held.unsqueeze(1)


class StackedStudent:
    """Losses and gradients of K thetas.

    Args:
        model: with its trainable set selected, and the frozen weights in it. It becomes part of this: do not use it further.

    Raises:
        ValueError: it trains what has no batched form (embeddings, products of 8-bit activations).
    """

    def __init__(self, model: TextClassifier) -> None:
        self._model = model
        self._layout = layout_of(model)
        self._places: list[tuple[StackedLayer, str]] = []
        layers: dict[str, StackedLayer] = {}
        for parameter in self._layout:
            path, _, name = parameter.name.rpartition(".")
            if path not in layers:
                layers[path] = _replace(model, path)
            self._places.append((layers[path], name))

    @staticmethod
    def takes(model: TextClassifier) -> bool:
        """Whether every trained parameter lies in one of LAYERS."""
        owners = {p.name.rpartition(".")[0] for p in layout_of(model)}
        return all(type(model.get_submodule(path)) in LAYERS for path in owners)

    def gradient(
        self,
        theta: Vector,
        hidden: Array | None,
        ids: Array,
        mask: Array,
        labels: Array,
        weights: Array,
        smoothing: float,
    ) -> tuple[Array, Array, Vector]:
        """Of each theta on its own batch: mean loss (K,), right answers (K,) and the loss's gradient (K, P).

        Args:
            theta: (K, P). hidden: (K, B, ...), what the prefix made of the texts; None: there is no prefix.
            ids, mask: (K, B, T). labels: (K, B, ...). weights: (K, B), 0 for what only fills a batch.
        """
        count, size = mask.shape[:2]
        parts = torch.from_numpy(theta).split([p.size for p in self._layout], 1)
        leaves = [part.reshape(count, *p.shape).requires_grad_() for part, p in zip(parts, self._layout, strict=True)]
        for (layer, name), leaf in zip(self._places, leaves, strict=True):
            layer.trained[name] = leaf
        masks = torch.from_numpy(mask)
        flat = masks.flatten(0, 1)  # (K * B, T)
        texts = torch.from_numpy(ids).flatten(0, 1)
        read = self._model.prefix(texts, flat) if hidden is None else torch.from_numpy(hidden).flatten(0, 1)
        logits = self._model.suffix(read, flat).unflatten(0, (count, size))
        given = (logits, masks, torch.from_numpy(labels), torch.from_numpy(weights), torch.full((count,), smoothing))
        losses, correct, _ = torch.vmap(partial(task_loss, self._model.task))(*given)
        gradients = torch.autograd.grad(losses.sum(), leaves)
        together = torch.cat([g.reshape(count, -1) for g in gradients], 1)
        return losses.detach().numpy(), correct.numpy(), together.numpy()


def _replace(model: TextClassifier, path: str) -> StackedLayer:
    layer = model.get_submodule(path)
    if type(layer) not in LAYERS:
        raise ValueError(f"{path} is a {type(layer).__name__}, which is not trained for many devices at once")
    parent, _, name = path.rpartition(".")
    owner, stacked = model.get_submodule(parent), StackedLayer(layer.requires_grad_(False))
    if isinstance(owner, nn.ModuleList):
        owner[int(name)] = stacked
    else:
        setattr(owner, name, stacked)
    return stacked
