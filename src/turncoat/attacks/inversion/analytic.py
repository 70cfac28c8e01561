"""Inversion by algebra: what a linear layer that reads the input gives away, without a search."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from turncoat.activations import read_by
from turncoat.attacks.inversion.roles import refuse_unusable
from turncoat.messages import Update
from turncoat.params import Slot
from turncoat.task import Batch, Model
from turncoat.trial import Reconstruction
from turncoat.validate import at_least, fraction
from turncoat.views import AggregateView, ServerView

MAX_IMAGES = 64  # of one victim, where the attack is not told how many
_ALIKE = 1e-3  # how far the points of two rows lie apart, for an input, if they are of one record
_ROUNDING = 1e-6  # of the largest entry: below is rounding
_SINGLE = 2.0**-25  # of an entry: what float32 may round off
_NO_GAP = 1e-2  # the next singular value after a batch's, of its last: there was noise
_VANISHES = 1e-2  # the cosine of a row and a direction that is 0 but for rounding, before a fit
_SAME = 1 - 1e-6  # the cosine of two directions that are one but for rounding
_APART = 1e-3  # the least singular value of directions that are independent
_DEVIATIONS = 8.0  # of what rounding makes of 0: what is further off is not 0
_FLOOR = 1e-9  # of the length of a row: nearer to 0 is no better
_ALONE = 0.9  # the leverage of a row without which another direction would vanish as well
_DETERMINED = 1e-2  # the second least singular value of rows with one kernel, of the largest
_NUM_FITS = 5
_TOO_ROUGH = 1e-3  # of the length of a row: one of which more is rounding says nothing
_NUM_SWEEPS = 10
_MATCHES = 1e-3  # the distance of two gradients that are one but for rounding, of their length
_DRAWS_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """Divide the gradient of a linear layer's weights by that of its bias: the input [1]_.

    For one record ``dW_i = db_i x`` in each row i, so ``x = dW_i / db_i``, exactly. Of several, a
    row gives a mixture; one whose unit a single record woke gives that record, and so does every
    other such row of it. So the points that most rows agree on come first [2]_.

    Where no single update is seen it reads the aggregate as one: right in a cohort of one.

    What it cannot do: the layer must have a bias and read the input itself. An update is rounded as
    the weights are (float32), so small steps cost digits. Several local steps mix.

    Args:
        num_images: Images to guess for each victim; None for as many examples as it claims, at most
            64, and for one where only the aggregate is seen.

    .. [1] Geiping et al., NeurIPS 2020, proposition 3.1. https://arxiv.org/abs/2003.14053
    .. [2] Boenisch et al., EuroS&P 2023, section 4. https://arxiv.org/abs/2112.02918
    """

    num_images: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, num_images=self.num_images)

    def __call__(
        self,
        view: ServerView[Update] | AggregateView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
    ) -> tuple[Reconstruction, ...]:
        def invert(before: Tensor, delta: Tensor, claimed: int) -> Reconstruction:
            layer = Layer.on_the_input(view.model, before, population[0], "LinearLayer")
            images = _agreed(*layer.of(-delta), self.num_images or claimed)
            return layer.reconstruction(view.model, before, images, -delta, population[0])

        return for_each(view, victims, invert)


@dataclass(frozen=True, kw_only=True)
class SPEAR:
    """Take a whole batch out of the gradient of a wide ReLU layer, exactly [1]_.

    With b records ``dL/dW = D X``, of rank b: ``X`` (b, inputs) are the records, ``D`` (width, b)
    their gradients at the layer's units, 0 at each unit that a record leaves asleep: half of them.
    The singular vectors give ``D = L Q`` but for an unknown ``Q`` (b, b). Each column q of ``Q``
    makes ``L q`` sparse; so it is the kernel of some b - 1 rows of ``L``, and a random draw of rows
    hits that of a record once in ``2 ** (b - 1)``. Kernels that vanish at more rows than chance
    has them are kept, scaled so that ``D 1 = dL/dbias``, and judged by whether ``X`` wakes the
    units that ``D`` says it woke. It ends once the batch found has the very gradient that was seen.

    All in float64. Where it finds fewer directions than records, it answers as ``LinearLayer``
    does. Where no single update is seen it reads the aggregate as one.

    What it cannot do: the first layer must be linear, with a bias, a ReLU behind it, and several
    times as wide as the batch is long; the records must be linearly independent, so no more than
    inputs. The draws due grow as ``2 ** b / b``: about 12 records with the default. Noise breaks
    rank and sparsity. Local steps break neither while few units change their mind.

    Differs from the paper: how far a 0 may be off is told by the singular values beyond b, which
    are rounding; a kernel is fitted again to all rows where it vanishes; it is kept only if they
    determine it, for one that mixes two records vanishes where both sleep, and so do all others
    that mix them; the greedy choice swaps one direction at a time.

    Args:
        num_images: Size of the batch; None for as many examples as the victim claims, at most 64.
        num_draws: Kernels to try at most.
        sparsity: Share of the units at which a record must sleep for its kernel to be kept.

    .. [1] Dimitrov et al., NeurIPS 2024, algorithm 1. https://arxiv.org/abs/2403.03945
    """

    num_images: int | None = None
    num_draws: int = 100_000
    sparsity: float = 0.2

    def __post_init__(self) -> None:
        at_least(1, self, num_images=self.num_images, num_draws=self.num_draws)
        fraction(self, sparsity=self.sparsity)

    def __call__(
        self,
        view: ServerView[Update] | AggregateView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        def invert(before: Tensor, delta: Tensor, claimed: int) -> Reconstruction:
            layer = Layer.on_the_input(view.model, before, population[0], "SPEAR")
            layer.refuse_without_relu(view.model, before, population, "SPEAR")
            gradient, num_images = layer.of(-delta), self.num_images or claimed

            def made(images: Tensor) -> Reconstruction:
                return layer.reconstruction(view.model, before, images, -delta, population[0])

            def matches(images: Tensor) -> bool:
                found = made(images)
                slope = view.model.gradient(before, (found.inputs, found.labels))
                return _apart(slope, -delta) < _MATCHES

            images = self._batch(*gradient, layer.of(before), num_images, matches, rng)
            return made(_agreed(*gradient, num_images) if images is None else images)

        return for_each(view, victims, invert)

    def _batch(
        self,
        weights: Tensor,
        biases: Tensor,
        held: tuple[Tensor, Tensor],
        num_images: int,
        matches: Callable[[Tensor], bool],
        rng: Generator,
    ) -> Tensor | None:
        """Return the flat records, or None. Shape: ``(num_images, inputs)``."""
        factors = _Factors.of(weights, biases, num_images)
        if factors is None:
            return None
        rows, kernels = factors.rows, factors.left.new_empty(0, num_images)
        needed = max(num_images + 1, round(self.sparsity * len(rows)))
        best: Tensor | None = None
        score = 0.0
        for begun in range(0, self.num_draws, _DRAWS_AT_ONCE):
            size = min(_DRAWS_AT_ONCE, self.num_draws - begun)
            known = len(kernels)
            drawn = _drawn(rows, size, needed, kernels, rng)
            for direction in factors.settled(drawn, needed) if num_images > 1 else drawn:
                if not bool(((kernels @ direction).abs() > _SAME).any()):
                    kernels = torch.cat([kernels, direction[None]])
            if len(kernels) == known:
                continue
            order = factors.vanishes(kernels).sum(dim=1).argsort(descending=True, stable=True)
            kernels = kernels[order[: 8 * num_images]]
            basis, now = factors.chosen(kernels, held)
            if basis is not None and now > score:
                best, score = factors.records(basis), now
                if matches(best):
                    break
        return best


@dataclass(frozen=True)
class Layer:
    """A linear layer that reads the input, and where it lies in the vector.

    Attributes:
        weight, bias: Shapes: ``(width, inputs)`` and ``(width,)``.
    """

    name: str
    weight: Slot
    bias: Slot

    @classmethod
    def on_the_input(cls, model: Model, params: Tensor, inputs: Tensor, asker: str) -> Layer:
        """Return the model's first linear layer, or say why it is not one to read inputs off."""
        found = next(
            ((n, m) for n, m in model.module.named_modules() if isinstance(m, nn.Linear)), None
        )
        cure = "choose an mlp, or a malicious server that sends an imprint"
        if found is None:
            raise ValueError(
                f"{asker} needs a linear layer that reads the input; "
                f"{type(model.module).__name__} has no linear layer: {cure}"
            )
        name, module = found
        read = read_by(name, model, params, inputs[:2])
        if read.shape != inputs[:2].flatten(1).shape or not torch.equal(
            read, inputs[:2].flatten(1)
        ):
            first = next(m for m in model.module.modules() if next(m.children(), None) is None)
            raise ValueError(
                f"{asker} needs a linear layer that reads the input; here layer {name!r} reads "
                f"what others made of it, {type(first).__name__} first: {cure}"
            )
        slots = {s.name: s for s in model.layout.slots}
        if module.bias is None or not slots[f"{name}.bias"].trainable:
            raise ValueError(f"{asker} divides by the gradient of a bias; layer {name!r} has none")
        return cls(name, slots[f"{name}.weight"], slots[f"{name}.bias"])

    def of(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's share of a vector, weights and bias, in float64."""
        weight = vector[self.weight.start : self.weight.stop].reshape(self.weight.shape)
        return weight.double(), vector[self.bias.start : self.bias.stop].double()

    def refuse_without_relu(
        self, model: Model, params: Tensor, population: Batch, asker: str
    ) -> None:
        """Refuse a layer whose sleeping units learn."""
        weight, bias = self.of(params)
        inputs, labels = population[0][:1], population[1][:1]
        asleep = (inputs.flatten(1).double() @ weight.T + bias)[0] < 0
        slope = self.of(model.gradient(params, (inputs, labels)))[1]
        if not bool(asleep.any()) or bool(slope[asleep].any()):
            raise ValueError(
                f"{asker} needs a ReLU behind layer {self.name!r}, whose units sleep for some "
                "records and then learn nothing; here they learn all the same: choose a model "
                "with activation 'relu'"
            )

    def reconstruction(
        self, model: Model, params: Tensor, images: Tensor, gradient: Tensor, like: Tensor
    ) -> Reconstruction:
        """Return flat images in the form of inputs, with the labels that the gradient betrays.

        One record's is the class whose last bias alone is pushed up. Of several, each has the label
        whose gradient at the layer's units points as its own does.
        """
        inputs = images.to(like).reshape(-1, *like.shape[1:])
        last = max((s for s in model.layout.slots if s.trainable), key=lambda s: s.start)
        if len(images) == 1 and len(last.shape) == 1:
            label = gradient[last.start : last.stop].argmin()[None]
            return Reconstruction(inputs, label)
        weights = self.of(gradient)[0].T
        each = torch.linalg.lstsq(images.T.cpu(), weights.cpu(), driver="gelsd").solution
        return Reconstruction(inputs, self._labels(model, params, inputs, each.to(like.device)))

    def _labels(self, model: Model, params: Tensor, inputs: Tensor, each: Tensor) -> Tensor:
        """Return the labels whose gradients at the units point as those of the records do.

        Args:
            each: Shape: ``(records, width)``.
        """
        seen: list[Tensor] = []
        module = model.module.get_submodule(self.name)
        hook = module.register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            outputs = model.logits(params.detach().requires_grad_(), inputs)
        finally:
            hook.remove()
        alike = []
        for label in range(outputs.shape[1]):
            said = torch.full((len(inputs),), label, device=inputs.device)
            loss = model.criterion(outputs, said)
            (slope,) = torch.autograd.grad(loss, seen[0], retain_graph=True)
            alike.append(torch.cosine_similarity(slope.double().flatten(1), each, dim=1))
        return torch.stack(alike).argmax(dim=0)


def for_each(
    view: ServerView[Update] | AggregateView[Update],
    victims: tuple[int, ...],
    invert: Callable[[Tensor, Tensor, int], Reconstruction],
) -> tuple[Reconstruction, ...]:
    """Invert each victim's update, or the aggregate once for all of them.

    Args:
        invert: Of the state that was sent, the change, and how many examples are behind it.
    """
    if isinstance(view, AggregateView):
        refuse_unusable("the aggregate", view.model, before=view.before, after=view.after)
        return (invert(view.before, view.after - view.before, 1),) * len(victims)
    found = []
    for victim in victims:
        if victim not in view.senders:
            raise ValueError(
                f"client {victim} sent nothing in round {view.round}: choose a victim among "
                f"{', '.join(map(str, view.senders))}"
            )
        place = view.senders.index(victim)
        message = view.messages[place]
        refuse_unusable(f"client {victim}", view.model, sent=view.sent[place], delta=message.delta)
        claimed = min(MAX_IMAGES, max(1, round(message.weight)))
        found.append(invert(view.sent[place], message.delta, claimed))
    return tuple(found)


def _agreed(weights: Tensor, biases: Tensor, num_images: int) -> Tensor:
    """Return the points that most rows agree on; the mixture of all rows for want of more.

    Shape: ``(num_images, inputs)``.
    """
    rows = biases.abs().argsort(descending=True, stable=True)[:2_000]
    rows = rows[biases[rows].abs() > _ROUNDING * biases.abs().max()]
    if not len(rows):
        return weights.new_zeros(num_images, weights.shape[1])
    weights, biases = weights[rows], biases[rows]
    mixture = (biases @ weights / biases.square().sum())[None]
    points = weights / biases[:, None]
    near = torch.cdist(points, points) < _ALIKE * weights.shape[1] ** 0.5
    found: list[Tensor] = []
    while len(found) < num_images:
        group = near[near.sum(dim=1).argmax()]
        if int(group.sum()) < 2:
            break
        found.append(biases[group] @ weights[group] / biases[group].square().sum())
        near = near & ~group & ~group[:, None]
    return torch.cat([*(f[None] for f in found), mixture.repeat(num_images - len(found), 1)])


def _drawn(rows: Tensor, size: int, needed: int, known: Tensor, rng: Generator) -> Tensor:
    """Return directions that vanish at ``needed`` rows, from random draws of b - 1, but known ones.

    Shape: ``(found, b)``.
    """
    num_images = rows.shape[1]
    if num_images == 1:
        return rows.new_ones(1, 1)
    if len(rows) < num_images:
        return rows[:0]
    drawn = torch.rand(size, len(rows), generator=rng).topk(num_images - 1, dim=1).indices
    kernels: Tensor = torch.linalg.svd(rows[drawn.to(rows.device)]).Vh[:, -1]
    new = ((kernels @ rows.T).abs() < _VANISHES).sum(dim=1) >= needed
    return kernels[new & ~((kernels @ known.T).abs() > _SAME).any(dim=1)]


def _fitted(kernels: Tensor, rows: Tensor, needed: int) -> Tensor:
    """Return the directions nearby that vanish at ``needed`` rows: least squares that forget more.

    Shape: ``(directions, b)``.
    """
    pairs = (rows[:, :, None] * rows[:, None, :]).flatten(1)
    for _ in range(_NUM_FITS):
        off = (kernels @ rows.T).square()
        weights = 1 / (off + off.kthvalue(needed, dim=1, keepdim=True).values.clamp(min=_FLOOR**2))
        moments = (weights @ pairs).reshape(-1, rows.shape[1], rows.shape[1])
        kernels = torch.linalg.eigh(moments).eigenvectors[:, :, 0]
    return kernels


def _determine(rows: Tensor) -> bool:
    """Return whether rows leave one direction where all vanish, and would without any of them."""
    upper, values, _ = torch.linalg.svd(rows, full_matrices=False)
    leverage = upper[:, :-1].square().sum(dim=1).max()
    return bool(values[-2] > _DETERMINED * values[0]) and bool(leverage < _ALONE)


def _apart(found: Tensor, seen: Tensor) -> float:
    """Return how far two vectors are apart whose scales are not known, of their length."""
    found, seen = found.double(), seen.double()
    share = found.dot(seen) / found.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float((share * found - seen).norm() / seen.norm())


@dataclass(frozen=True)
class _Factors:
    """``dL/dW = left right``, of rank b, and the gradient of the bias.

    Attributes:
        left: Shape: ``(width, b)``.
        right: Shape: ``(b, inputs)``.
        rounding: By how much rounding moves an entry of each column of ``left``. Shape: ``(b,)``.
    """

    left: Tensor
    right: Tensor
    biases: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, weights: Tensor, biases: Tensor, num_images: int) -> _Factors | None:
        """Return the factors; None if the rank is less, or noise hides it."""
        upper = torch.linalg.qr(weights.T, mode="r").R.T
        left, values, _ = torch.linalg.svd(upper, full_matrices=False)
        kept, rest = values[:num_images], values[num_images:]
        if len(kept) < num_images or kept[-1] <= _ROUNDING * kept[0]:
            return None
        if len(rest) and rest[0] > _NO_GAP * kept[-1]:
            return None
        height, width = weights.shape
        beyond = (height - num_images) * (width - num_images)
        single = _SINGLE * weights.square().mean().sqrt()
        spread = torch.maximum((rest.square().sum() / max(1, beyond)).sqrt(), single)
        root = kept.sqrt()
        right = left[:, :num_images].T @ weights / root[:, None]
        return cls(left[:, :num_images] * root, right, biases, spread / root)

    @cached_property
    def alive(self) -> Tensor:
        """Which units any record woke, by more than rounding. Shape: ``(width,)``, bool."""
        awake: Tensor = self.left.norm(dim=1) * _TOO_ROUGH > self.rounding.norm()
        return awake

    @cached_property
    def rows(self) -> Tensor:
        """The rows of ``left`` of such units, each of length 1."""
        rows: Tensor = self.left[self.alive]
        return torch.nn.functional.normalize(rows, dim=1)

    @cached_property
    def even(self) -> Tensor:
        """The same rows, such that rounding moves each entry by 1."""
        even: Tensor = self.left[self.alive] / self.rounding
        return even

    def vanishes(self, directions: Tensor) -> Tensor:
        """Return at which rows directions vanish but for rounding. Shape: ``(..., rows)``."""
        even = torch.nn.functional.normalize(directions * self.rounding, dim=-1)
        small: Tensor = (even @ self.even.T).abs() <= _DEVIATIONS
        return small

    def settled(self, kernels: Tensor, needed: int) -> Iterator[Tensor]:
        """Yield the directions nearby that ``needed`` rows or more determine: where they vanish."""
        for kernel in _fitted(kernels, self.rows, needed):
            zero = self.vanishes(kernel)
            for _ in range(_NUM_FITS if int(zero.sum()) >= needed else 0):
                even = torch.linalg.svd(self.even[zero], full_matrices=False).Vh[-1]
                kernel = torch.nn.functional.normalize(even / self.rounding, dim=0)
                before, zero = zero, self.vanishes(kernel)
                if torch.equal(zero, before):
                    break
            if int(zero.sum()) >= needed and _determine(self.rows[zero]):
                yield kernel

    def chosen(self, kernels: Tensor, held: tuple[Tensor, Tensor]) -> tuple[Tensor | None, float]:
        """Return b of the directions, and how well they explain which units woke: greedily."""
        num_images, basis = self.left.shape[1], kernels[:0]
        for kernel in kernels:
            grown = torch.cat([basis, kernel[None]])
            if float(torch.linalg.svdvals(grown)[-1]) > _APART:
                basis = grown
            if len(basis) == num_images:
                break
        if len(basis) < num_images:
            return None, 0.0
        score = self.score(basis, held)
        for _ in range(_NUM_SWEEPS):
            before = score
            for spare in kernels:
                for place in range(num_images) if score < 1 else ():
                    swapped = torch.cat([basis[:place], spare[None], basis[place + 1 :]])
                    if (now := self.score(swapped, held)) > score:
                        basis, score = swapped, now
            if score == before:
                break
        return basis, score

    def records(self, basis: Tensor) -> Tensor:
        """Return ``X = Q^-1 R``, with ``Q`` scaled so that ``L Q 1`` is the bias's gradient."""
        scale = torch.linalg.pinv(self.left @ basis.T) @ self.biases
        found: Tensor = torch.linalg.solve(basis.T, self.right)
        return found / torch.where(scale.abs() > 0, scale, torch.ones_like(scale))[:, None]

    def score(self, basis: Tensor, held: tuple[Tensor, Tensor]) -> float:
        """Return how often a record wakes a unit just where its gradient says so.

        0 for directions that are not independent.
        """
        if float(torch.linalg.svdvals(basis)[-1]) <= _APART:
            return 0.0
        weight, bias = held
        woken = (self.records(basis) @ weight.T + bias)[:, self.alive] > 0
        return float((woken == ~self.vanishes(basis)).double().mean())
