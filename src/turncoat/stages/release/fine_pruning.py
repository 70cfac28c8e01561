"""A model is mended before it is handed out: what clean data never use is cut away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Generator, Tensor, nn

from turncoat.activations import read_by
from turncoat.messages import Update
from turncoat.stage import Release, Train, call
from turncoat.stages.release.mending import share_right, trusted
from turncoat.stages.release.remaking import hand_out
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model
from turncoat.validate import fraction

V = TypeVar("V")

_TUNING = LocalSGD(0.02, num_epochs=40, batch_size=16, momentum=0.9, weight_decay=0.01)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class FinePruning(Generic[V]):
    """Prune channels that are dormant on clean data, fine-tune, release as ``inner`` does [1]_.

    The channels of the last convolution, or the units of the last hidden layer where there is no
    convolution, go in the order of their mean activation on the public data, weakest first, as
    long as the accuracy there falls by ``max_drop`` at most. A backdoor that lives in such channels
    goes with them; one that an attacker has put into busy ones is left to fine-tuning.

    Differs from the paper: the public data rank, judge and tune, all of them; activations are
    counted by size, as a ``"tanh"`` may be negative; the numbers of ``tuning`` are ours.

    Args:
        max_drop: In points of 1, on the public data.
        tuning: How to train on the public data; None for pruning alone. A pruned channel stays
            dead unless a normalisation revives it.

    .. [1] Liu, Dolan-Gavitt and Garg, RAID 2018, section 3. https://arxiv.org/abs/1805.12185
    """

    inner: Release[V]
    max_drop: float = 0.04
    tuning: Train[Update] | None = _TUNING

    def __post_init__(self) -> None:
        fraction(self, max_drop=self.max_drop)

    def __call__(self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None) -> V:
        return hand_out(self, model, params, rng=rng, public=public)

    def remade(
        self, model: Model, params: Tensor, *, rng: Generator, public: Batch | None
    ) -> Tensor:
        """Return the parameters of the mended model. Shape: ``(num_params,)``."""
        clean = trusted(self, public)
        mended = self.pruned(model, params, clean)
        if self.tuning is not None:
            mended = mended + call(self.tuning, model, mended, clean, rng=rng).delta
        return mended

    def pruned(self, model: Model, params: Tensor, clean: Batch) -> Tensor:
        """Return the model without its dormant channels. Shape: ``(num_params,)``."""
        channels = Channels.of(model)
        bound = share_right(model, params, clean) - self.max_drop
        order = channels.activity(model, params, clean[0]).argsort(stable=True)
        kept = params
        for channel in order.tolist():
            fewer = channels.without(model, kept, channel)
            if share_right(model, fewer, clean) < bound:
                break
            kept = fewer
        return kept


@dataclass(frozen=True)
class Channels:
    """Where the channels of a model's last hidden layer are written, and read."""

    writer: str
    reader: str
    num: int

    @classmethod
    def of(cls, model: Model) -> Channels:
        """Return those of the last convolution, or of the last hidden layer if there is none."""
        kinds = (*_CONVOLUTIONS, nn.Linear)
        layers = [(n, m) for n, m in model.module.named_modules() if isinstance(m, kinds)]
        convolved = [i for i, (_, m) in enumerate(layers) if isinstance(m, _CONVOLUTIONS)]
        last = convolved[-1] if convolved else len(layers) - 2
        if not 0 <= last < len(layers) - 1:
            raise ValueError(
                f"{type(model.module).__name__} has no hidden layer that a linear one reads: there "
                "are no channels to prune; choose another model, or another release"
            )
        writer, reader = layers[last][0], layers[last + 1][0]
        shapes = {slot.name: slot.shape for slot in model.layout.slots}
        num, width = shapes[f"{writer}.weight"][0], shapes[f"{reader}.weight"][1]
        if width % num:
            raise ValueError(
                f"{type(model.module).__name__}: {reader!r} reads {width} numbers, no multiple of "
                f"the {num} channels of {writer!r}: they cannot be told apart"
            )
        return cls(writer, reader, num)

    def activity(self, model: Model, params: Tensor, inputs: Tensor) -> Tensor:
        """Return how active each channel is on the mean. Shape: ``(num,)``."""
        seen = read_by(self.reader, model, params, inputs)
        return seen.reshape(len(seen), self.num, -1).abs().mean(dim=(0, 2))

    def without(self, model: Model, params: Tensor, channel: int) -> Tensor:
        """Return the model that neither writes nor reads a channel. Shape: ``(num_params,)``."""
        fewer = params.detach().clone()
        named = model.layout.split(fewer)  # views
        read = named[f"{self.reader}.weight"]
        read.view(len(read), self.num, -1)[:, channel] = 0
        for part in ("weight", "bias"):
            if f"{self.writer}.{part}" in named:
                named[f"{self.writer}.{part}"][channel] = 0
        return fewer
