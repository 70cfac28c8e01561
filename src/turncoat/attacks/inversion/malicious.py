"""A malicious server: it sends weights that make updates speak, and reads what they say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn

from turncoat.activations import read_by
from turncoat.attacks.inversion.analytic import LinearLayer, for_each
from turncoat.attacks.inversion.roles import refuse_unusable
from turncoat.messages import Envelope, Update
from turncoat.stage import Broadcast, call
from turncoat.task import Batch, Model
from turncoat.trial import Attack, Reconstruction
from turncoat.validate import at_least, positive
from turncoat.views import AggregateView, ServerView

_SCALE = 0.01  # of what the bins read: small weights round less
_AFFINE = 1e-3  # how far the way to the bins may bend, relative to what arrives
_CHUNK = 1_000
_FULL = 0.2  # of the least that one record can be in a bin: below, a bin is empty
_NUM_TRIED = 30  # bins of which one, at least, holds one record
_PLAIN = (nn.Flatten, nn.Identity, nn.ReLU)
_ALONE = LinearLayer(num_images=1)


@dataclass(frozen=True, kw_only=True)
class Imprint:
    """Send a linear layer whose units are bins: a record wakes all up to its own [1]_.

    Unit i computes ``relu(h(x) - c_i)`` for one measure ``h`` and rising ``c_i``, and all send the
    same slope back. So the gradients of two neighbours differ by the records between their
    cut-offs alone, and the quotient of weights and bias is that record, if it is one. What sums
    updates sums bins: secure aggregation does not help. The architecture stays as it is.

    The layer is the first linear one, and must have a ReLU behind it; only linear layers and ReLUs
    may follow. Convolutions before it get random kernels and biases that keep their ReLUs awake,
    so that an image reaches the layer through a linear map [2]_ that can be undone, as far as there
    are no fewer features than pixels.

    Differs from the papers: the bins are a layer that is there, not an added one. ``h`` is the
    first principal component of public records, the cut-offs their quantiles; bins send back
    slopes of alternating sign, and classes slopes of different size, which tell the label. Random
    kernels in place of identities.

    Args:
        num_bins: How many units are bins; None for all.
        gain: Slope that a bin sends back. The larger, the less is lost to rounding.
        seed: Of the kernels.

    .. [1] Fowl et al., ICLR 2022, section 3. https://arxiv.org/abs/2110.13057
    .. [2] Zhao et al., S&P 2024, section 4. https://arxiv.org/abs/2303.12233
    """

    num_bins: int | None = None
    gain: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(2, self, num_bins=self.num_bins)
        positive(self, gain=self.gain)
        at_least(0, self, seed=self.seed)

    def __call__(self, params: Tensor, *, model: Model, public: Batch | None) -> Tensor:
        if public is None:
            raise ValueError(
                "Imprint places its bins by public records, and this task has none: give the task "
                "a public_size"
            )
        passage = Passage.of(model, "Imprint")
        sent = params.clone()
        named = model.layout.split(sent)  # views: what is written there is sent
        self._carry(passage, named)
        inputs = public[0]
        seen = read_by(passage.layer, model, sent, inputs)
        _refuse_bent(passage, model, sent, inputs, seen)
        self._bin(passage, named, seen)
        self._lead_on(passage, named)
        logits = torch.cat([model.logits(sent, some) for some in torch.split(inputs, _CHUNK)])
        named[f"{passage.after[-1]}.bias"].sub_(logits.detach().mean(dim=0))
        _refuse_deaf(passage, model, sent, (inputs[:1], public[1][:1]))
        return sent

    def _carry(self, passage: Passage, named: dict[str, Tensor]) -> None:
        """Give the convolutions kernels that mix and biases that keep all from 0 to 1."""
        rng = torch.Generator().manual_seed(self.seed)
        for name in passage.carriers:
            weight, bias = named[f"{name}.weight"], named.get(f"{name}.bias")
            kernels = torch.empty(weight.shape)
            nn.init.orthogonal_(kernels, generator=rng)
            if bias is None:
                kernels.abs_()
            kernels /= kernels.abs().flatten(1).sum(dim=1).reshape(-1, 1, 1, 1)
            weight.copy_(kernels)
            if bias is not None:
                bias.copy_(kernels.clamp(max=0).abs().flatten(1).sum(dim=1) + 1e-3)

    def _bin(self, passage: Passage, named: dict[str, Tensor], seen: Tensor) -> None:
        weight, bias = named[f"{passage.layer}.weight"], named[f"{passage.layer}.bias"]
        num_bins = min(self.num_bins or len(bias), len(bias))
        centred = seen.double() - seen.double().mean(dim=0)
        measure = torch.linalg.svd(centred, full_matrices=False).Vh[0]
        measure = measure * measure[measure.abs().argmax()].sign()
        measured = seen.double() @ measure
        spread = float(measured.std().clamp(min=1e-12))
        places = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)[1:-1].to(measured.device)
        cuts = torch.cat([measured.min()[None] - 5 * spread, measured.quantile(places)])
        weight.zero_()[:num_bins] = (measure * (_SCALE / spread)).to(weight)
        bias.fill_(-1.0)[:num_bins] = (cuts * (-_SCALE / spread)).to(bias)

    def _lead_on(self, passage: Passage, named: dict[str, Tensor]) -> None:
        """Let every bin send the same slope back, of alternating sign, and of the class's size."""
        *between, last = passage.after
        signs = 1 - 2 * (torch.arange(named[f"{passage.layer}.bias"].numel()) % 2)
        row = self.gain * signs
        for name in between:
            weight, bias = named[f"{name}.weight"], named[f"{name}.bias"]
            weight.zero_()[0] = row.to(weight)
            bias.zero_()[0] = float(name == between[0])
            row = torch.eye(1, len(weight))[0]
        weight, bias = named[f"{last}.weight"], named[f"{last}.bias"]
        weight.copy_(slopes(len(weight))[:, None] * row)
        bias.zero_()


@dataclass(frozen=True, kw_only=True)
class ModelInconsistency:
    """Send one client what ``inner`` sends, and all others a layer that never wakes [1]_.

    Their gradients of that layer, and of all before it, are 0: the sum that secure aggregation
    opens is the victim's own, as far as these go.

    Args:
        victim: Whose update is to stand alone.
        inner: What the victim gets.

    .. [1] Pasquini et al., CCS 2022, section 4. https://arxiv.org/abs/2111.07380
    """

    victim: int
    inner: Broadcast = Imprint()
    withholds = frozenset({"rng"})  # what is drawn could not be known again

    def __post_init__(self) -> None:
        at_least(0, self, victim=self.victim)

    def __call__(
        self,
        params: Tensor,
        *,
        model: Model,
        public: Batch | None,
        envelope: Envelope,
    ) -> Tensor:
        if envelope.sender == self.victim:
            sent: Tensor = call(self.inner, params, model=model, public=public, envelope=envelope)
            return sent
        layer = Passage.of(model, "ModelInconsistency").layer
        silent = params.clone()
        named = model.layout.split(silent)
        named[f"{layer}.weight"].zero_()
        named[f"{layer}.bias"].fill_(-1.0)
        return silent


@dataclass(frozen=True, kw_only=True)
class RobbingTheFed:
    """Read records out of the bins of an ``Imprint``, in an update or in a sum of many [1]_.

    Reads single updates where they are seen. Under secure aggregation it reads the aggregate: all
    records of the cohort, as many as have a bin to themselves, and every victim gets them all;
    with ``ModelInconsistency``, the victim's own. It knows what its server sent.

    What it cannot do: two records in one bin come out mixed. More than one local step moves the
    bins. Rules that are no weighted mean mix bins up.

    Args:
        server: The broadcast that goes with it.
        max_images: Records to return at most, those first whose bins are the fullest.

    .. [1] Fowl et al., ICLR 2022, section 3. https://arxiv.org/abs/2110.13057
    """

    server: Broadcast = Imprint()
    max_images: int = 256

    def __post_init__(self) -> None:
        at_least(1, self, max_images=self.max_images)

    def __call__(
        self,
        view: ServerView[Update] | AggregateView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
    ) -> tuple[Reconstruction, ...]:
        def invert(sent: Tensor, delta: Tensor, _: int) -> Reconstruction:
            passage = Passage.of(view.model, "RobbingTheFed")
            bins = _Bins.of(passage, view.model, sent, -delta)
            return bins.reconstruction(population[0], self.max_images)

        return _read(view, self.server, victims, population, invert)


@dataclass(frozen=True, kw_only=True)
class ClassFishing:
    """Send a last layer through which only records of one class learn anything [1]_.

    It knows no class but the target, and is sure that no record is of it. So the others' slope at
    the features is 0, and that of a record of the class is as large as if it were alone. For any
    model that ends with a linear layer with a bias.

    Differs from the paper: how sure it is, is set by public records; there is no second lure, by a
    feature, for several records of the class.

    Args:
        target: The class, by number.
        margin: By how much the target's logit falls short of the others' for any public record.

    .. [1] Wen et al., ICML 2022, section 3.1. https://arxiv.org/abs/2202.00580
    """

    target: int
    margin: float = 10.0

    def __post_init__(self) -> None:
        at_least(0, self, target=self.target)
        positive(self, margin=self.margin)

    def __call__(self, params: Tensor, *, model: Model, public: Batch | None) -> Tensor:
        if public is None:
            raise ValueError(
                "ClassFishing sets its margin by public records, and this task has none: give the "
                "task a public_size"
            )
        name = _last_linear(model, self.target, "ClassFishing")
        sent = params.clone()
        named = model.layout.split(sent)
        weight, bias = named[f"{name}.weight"], named[f"{name}.bias"]
        own = weight[self.target].clone()
        if not bool(own.any()):
            own.fill_(1.0)  # a layer that begins at 0 would send nothing back
        weight.zero_()[self.target] = own
        bias.zero_()
        logits = torch.cat([model.logits(sent, some) for some in torch.split(public[0], _CHUNK)])
        bias[self.target] = -logits[:, self.target].max() - self.margin
        return sent


@dataclass(frozen=True, kw_only=True)
class Fishing:
    """Invert the one record of a class that ``ClassFishing`` lets speak, whatever the batch [1]_.

    The record's gradient stands alone in all layers but the last, and in its class's row of that;
    what other records left in the other rows is replaced by what this one would have. ``reads``
    then gets an update of one record. Reads single updates where they are seen, or else the
    aggregate: the one record of the class in all the cohort.

    What it cannot do: several records of the class come out mixed, and where there is none there
    is nothing. More than one local step lets the last layer recover.

    Args:
        server: The broadcast that goes with it.
        reads: What inverts an update of one record.

    .. [1] Wen et al., ICML 2022. https://arxiv.org/abs/2202.00580
    """

    server: ClassFishing
    reads: Attack[ServerView[Update], tuple[Reconstruction, ...]] = _ALONE

    def __call__(
        self,
        view: ServerView[Update] | AggregateView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        name = _last_linear(view.model, self.server.target, "Fishing")

        def invert(sent: Tensor, delta: Tensor, num_examples: int) -> Reconstruction:
            alone = delta * num_examples  # of a mean over all, the share of one
            named = view.model.layout.split(alone)
            for tensor in (named[f"{name}.weight"], named[f"{name}.bias"]):
                own = tensor[self.server.target].clone()
                tensor.copy_((-own / (len(tensor) - 1)).expand_as(tensor))
                tensor[self.server.target] = own
            single = ServerView(view.round, view.model, (0,), (Update(alone, 1.0),), sent=(sent,))
            offers = {"victims": (0,), "population": population, "rng": rng}
            found: Reconstruction = call(self.reads, single, **offers)[0]
            return replace(found, labels=torch.full_like(found.labels, self.server.target))

        return _read(view, self.server, victims, population, invert)


def slopes(num_classes: int) -> Tensor:
    """Return a slope for each class, all of them away from the mean. Shape: ``(num_classes,)``.

    >>> slopes(4).tolist()
    [-0.375, -0.125, 0.125, 0.375]
    """
    steps = torch.arange(num_classes).float()
    if num_classes % 2:
        steps[num_classes // 2 :] += 1  # the class in the middle would send nothing back
    return (steps - steps.mean()) / num_classes


@dataclass(frozen=True)
class Passage:
    """The layers of a model by name: the way to the bins, the bins, and the way on.

    Attributes:
        carriers: Convolutions before the bins.
        layer: The linear layer that becomes the bins.
        after: Linear layers behind it, the last of which gives the logits.
    """

    carriers: tuple[str, ...]
    layer: str
    after: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, asker: str) -> Passage:
        """Return the passage through a model, or say what bars it."""
        leaves = _leaves(model)
        lines = [i for i, (_, m) in enumerate(leaves) if isinstance(m, nn.Linear)]
        cure = "choose an mlp or lenet5 with activation 'relu': weights are all that a server sends"
        if len(lines) < 2 or not isinstance(leaves[lines[0] + 1][1], nn.ReLU):
            raise ValueError(
                f"{asker} needs a linear layer with a ReLU behind it, and another after: "
                f"{type(model.module).__name__} of {', '.join(_kinds(leaves))} has none; {cure}"
            )
        before, after = leaves[: lines[0]], leaves[lines[0] + 1 :]
        for name, module in leaves:
            line = isinstance(module, nn.Linear)
            carries = isinstance(module, nn.Conv2d) and (name, module) in before
            weighs = any(True for _ in module.parameters())
            drops = getattr(module, "p", 0) and "Dropout" in type(module).__name__
            barred = (weighs and not (line or carries)) or drops
            barred |= (name, module) in after and not (line or isinstance(module, _PLAIN))
            if barred or (line and module.bias is None):
                raise ValueError(
                    f"{asker} finds its way barred: layer {name!r} is {module}; behind the bins "
                    f"only linear layers with a bias and ReLUs may stand; {cure}"
                )
        for i, j in pairwise(lines):
            if leaves[i][1].out_features != leaves[j][1].in_features:
                raise ValueError(
                    f"{asker} finds its way barred: layer {leaves[j][0]!r} reads more than layer "
                    f"{leaves[i][0]!r} gives; behind the bins there must be one way only; {cure}"
                )
        linear = [leaves[i][0] for i in lines]
        carriers = tuple(n for n, m in before if isinstance(m, nn.Conv2d))
        return cls(carriers, linear[0], tuple(linear[1:]))


@dataclass(frozen=True)
class _Bins:
    """What fell into each bin: sums over its records of slope times input, and of slopes.

    Attributes:
        sums, slopes: In float64. Shapes: ``(bins, features)`` and ``(bins,)``.
        last: Gradient of the last bias, in float64. Shape: ``(classes,)``.
        answers: What a slope of 1 in a bin adds to the logits. Shape: ``(classes,)``.
    """

    passage: Passage
    model: Model
    sent: Tensor
    sums: Tensor
    slopes: Tensor
    last: Tensor
    answers: Tensor

    @classmethod
    def of(cls, passage: Passage, model: Model, sent: Tensor, gradient: Tensor) -> _Bins:
        named, held = model.layout.split(gradient), model.layout.split(sent)
        on = [held[f"{name}.weight"].double() for name in passage.after]
        answers = reduce(lambda total, weight: weight @ total, on)
        loud = answers[answers.abs().sum(dim=1).argmax()]
        signs = loud.sign() * (1 if loud[0] >= 0 else -1)
        weights = named[f"{passage.layer}.weight"].double() * signs[:, None]
        biases = named[f"{passage.layer}.bias"].double() * signs
        zero = torch.zeros_like(weights[:1])
        return cls(
            passage,
            model,
            sent,
            weights - torch.cat([weights[1:], zero]),
            biases - torch.cat([biases[1:], zero[0, :1]]),
            named[f"{passage.after[-1]}.bias"].double(),
            answers[:, 0],
        )

    def reconstruction(self, inputs: Tensor, max_images: int) -> Reconstruction:
        """Return the records of all bins that hold any, in the form of public inputs.

        Where none does, as where a client was sent a dead layer, the mean public record.
        """
        loudness = self.slopes.abs()
        if not bool(loudness.any()):
            label = self.last.argmin()[None]
            return Reconstruction(inputs.mean(dim=0, keepdim=True), label)
        least = slopes(len(self.last)).abs()
        floor = _FULL * float(least.min() / least.max()) * loudness.max()
        full = loudness.argsort(descending=True, stable=True)[: int((loudness > floor).sum())]
        full = full[:max_images]
        features = self.sums[full] / self.slopes[full, None]
        images = self._undone(features, inputs).clamp(*_range(inputs))
        return Reconstruction(images, self._labels(images, self.slopes[full]))

    def _undone(self, features: Tensor, inputs: Tensor) -> Tensor:
        """Return inputs that arrive as the features: of all that do, the likeliest.

        Linear least squares under the public records' mean and covariance.
        """
        if not self.passage.carriers:
            return features.to(inputs).reshape(-1, *inputs.shape[1:])
        units = torch.eye(inputs[0].numel()).to(inputs).reshape(-1, *inputs.shape[1:])
        zero = torch.zeros_like(inputs[:1])
        origin = read_by(self.passage.layer, self.model, self.sent, zero).double()
        way = read_by(self.passage.layer, self.model, self.sent, units).double() - origin
        flat = inputs.flatten(1).double()
        mean = flat.mean(dim=0)
        spread = flat.T.cov() + 1e-3 * flat.var(dim=0).mean() * torch.eye(len(way)).to(flat)
        through = spread @ way  # covariance of inputs and features
        around = way.T @ through
        around += 1e-9 * around.diagonal().mean() * torch.eye(len(around)).to(flat)
        seen = features - origin - mean @ way
        found: Tensor = mean + torch.linalg.solve(around, seen.T).T @ through.T
        return found.to(inputs).reshape(-1, *inputs.shape[1:])

    def _labels(self, images: Tensor, slopes: Tensor) -> Tensor:
        """Return the labels that explain best how loud each bin is, and the last bias's gradient.

        A record of label y sends ``step * (answers . p - answers_y)`` back, where its outputs p can
        be computed; ``step`` is the one unknown.
        """
        outputs = self.model.logits(self.sent, images).detach().double().softmax(dim=1)
        due = outputs @ self.answers
        levels = due[:, None] - self.answers  # (records, classes)
        some = slice(None, None, -(-len(slopes) // _NUM_TRIED))  # the loudest hold several records
        steps = (slopes[some, None] / levels[some]).flatten()
        steps = steps[(steps > 0) & steps.isfinite()]
        best, cost = levels.abs().argmin(dim=1), float("inf")
        for step in sorted(set(steps.tolist())):
            off = (slopes[:, None] / step - levels).abs() / levels.abs().max()
            said = off.argmin(dim=1)
            pushed = (outputs - torch.eye(len(self.last)).to(outputs)[said]).sum(dim=0)
            now = float(off.min(dim=1).values.clamp(max=0.1).sum())
            now += float((self.last / step - pushed).abs().mean())
            if now < cost:
                best, cost = said, now
        return best


def _read(
    view: ServerView[Update] | AggregateView[Update],
    server: Broadcast,
    victims: tuple[int, ...],
    population: Batch,
    invert: Any,
) -> tuple[Reconstruction, ...]:
    """Invert each victim's update; where none is seen, the step of the sum, from what was sent.

    The server knows what it sent, though the view has only the honest state.
    """
    if isinstance(view, ServerView):
        return for_each(view, victims, invert)
    refuse_unusable("the aggregate", view.model, before=view.before, after=view.after)
    to = getattr(server, "victim", victims[0])
    sent = call(
        server,
        view.before,
        model=view.model,
        public=population,
        envelope=Envelope(to, victims, view.round),
    )
    return (invert(sent, view.after - view.before, 1),) * len(victims)


def _leaves(model: Model) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.module.named_modules() if not list(m.children())]


def _last_linear(model: Model, target: int, asker: str) -> str:
    name, last = _leaves(model)[-1]
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise ValueError(
            f"{asker} needs a model that ends with a linear layer with a bias; the last here is "
            f"{last}: choose an mlp, lenet5, convnet or resnet"
        )
    if target >= last.out_features:
        raise ValueError(
            f"{asker}: target is {target}, but the classes are 0 to {last.out_features - 1}"
        )
    return name


def _kinds(leaves: list[tuple[str, Any]]) -> list[str]:
    return list(dict.fromkeys(type(m).__name__ for _, m in leaves))


def _range(inputs: Tensor) -> tuple[float, float]:
    """Return between what inputs lie: pixels in [0, 1], others anywhere."""
    pixels = inputs.ndim == 4 and float(inputs.min()) >= 0 and float(inputs.max()) <= 1
    return (0.0, 1.0) if pixels else (-float("inf"), float("inf"))


def _refuse_bent(
    passage: Passage, model: Model, sent: Tensor, inputs: Tensor, seen: Tensor
) -> None:
    """Refuse a way to the bins that is not affine: what is in the middle must arrive there."""
    half = len(inputs) // 2
    middle = (inputs[:half] + inputs[half : 2 * half]) / 2
    due = (seen[:half] + seen[half : 2 * half]) / 2
    arrived = read_by(passage.layer, model, sent, middle)
    if float((arrived - due).abs().max()) > _AFFINE * float((seen - seen.mean(dim=0)).abs().max()):
        raise ValueError(
            f"Imprint needs a way to layer {passage.layer!r} that is linear once ReLUs are kept "
            "awake; here it bends, as max-pooling, sigmoid and tanh do: choose an mlp or lenet5 "
            "with activation 'relu'"
        )


def _refuse_deaf(passage: Passage, model: Model, sent: Tensor, data: Batch) -> None:
    """Refuse a model in which the bins do not wake and learn as the passage says."""
    named, held = model.layout.split(model.gradient(sent, data)), model.layout.split(sent)
    seen = read_by(passage.layer, model, sent, data[0])
    weight, bias = held[f"{passage.layer}.weight"], held[f"{passage.layer}.bias"]
    woken = (seen @ weight.T + bias)[0] > 0
    if not torch.equal(named[f"{passage.layer}.bias"] != 0, woken):
        raise ValueError(
            f"Imprint finds that the units of layer {passage.layer!r} do not learn where they "
            f"wake: {type(model.module).__name__} does not run its layers in their order; choose "
            "an mlp or lenet5"
        )
