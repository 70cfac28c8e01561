"""What an epsilon costs, by the number of clients, and what it leaves to an attacker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from math import inf
from typing import Any

import torch
from torch import Tensor

from turncoat.attacks.membership.lira import LiRA, confidence
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.federation import Federation, Plain
from turncoat.metrics.auditing import one_run_epsilon
from turncoat.metrics.ranking import ROC, tpr_interval
from turncoat.metrics.tradeoff import tpr_limit
from turncoat.privacy import Private, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.train.dpsgd import DPSGD, noise_for
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Task
from turncoat.views import ModelView, Shadows

_FPR = 0.01


def said(epsilon: float) -> str:
    """Return an epsilon as figures name it."""
    return "ε = ∞" if epsilon == inf else f"ε = {epsilon:g}"


@dataclass(frozen=True)
class ClientCurves:
    """Client-level DP-FedAvg for several numbers of clients, who share as many records in all.

    All clients take part in all rounds, and take as many steps on as many records, however many
    they are: the sum grows with the clients, its noise does not. At ε = ∞ updates are shortened,
    and there is no noise. The noise is the least whose whole training, composed by the package
    itself, keeps ε.

    Attributes:
        compared: At which epsilons the numbers of clients are compared, seed by seed.
    """

    make: Callable[..., Task]
    train: LocalSGD
    num_clients: tuple[int, ...]
    epsilons: tuple[float, ...]
    delta: float
    max_norm: float
    num_rounds: int
    compared: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        rates: dict[tuple[int, float], Tensor] = {}
        for n in self.num_clients:
            task = self.make(n, seed=seed, **self.options)
            for epsilon in self.epsilons:
                rule, spent = self._rule(n, epsilon)
                federation = Federation(train=self.train, channel=Plain(), aggregate=rule)
                run = simulate(federation, task, num_rounds=self.num_rounds, seed=seed)
                view = ModelView(task.model, run.state.params)
                rates[n, epsilon] = _by_class(view, task.test)
                row = f"{n} clients | {said(epsilon)}"
                found[f"accuracy, percent: {row}"] = 100 * _accuracy(view, task.test)
                found[f"noise, in lengths of an update: {row}"] = rule.noise_multiplier
                if epsilon < inf:
                    found[f"ε composed: {row}"] = spent
        for n in self.num_clients:
            free = rates[n, inf]
            for epsilon in self.epsilons[:-1]:
                lost, row = 100 * (free - rates[n, epsilon]), f"{n} clients | {said(epsilon)}"
                found[f"points lost, mean over classes: {row}"] = float(lost.mean())
                found[f"points lost, class that loses most: {row}"] = float(lost.max())
                found[f"accuracy of the worst class, percent: {row}"] = 100 * float(
                    rates[n, epsilon].min()
                )
        for epsilon in self.compared:
            for few, many in zip(self.num_clients, self.num_clients[1:], strict=False):
                gain = 100 * float((rates[many, epsilon] - rates[few, epsilon]).mean())
                found[f"points gained from {few} to {many} clients, {said(epsilon)}"] = gain
            title = f"points that the worst class loses beyond the mean, {said(epsilon)}"
            for n in self.num_clients:
                lost = 100 * (rates[n, inf] - rates[n, epsilon])
                found[f"{title}, {n} clients"] = float(lost.max() - lost.mean())
        return found | {"data": task.source}

    def _rule(self, n: int, epsilon: float) -> tuple[DPFedAvg, float]:
        sigma = 0.0
        if epsilon < inf:
            sigma = noise_for(epsilon, self.delta, 1.0, self.num_rounds)
        rule = DPFedAvg(max_norm=self.max_norm, noise_multiplier=sigma, expected_cohort=float(n))
        if not sigma:
            return rule, inf
        federation = Federation(train=self.train, channel=Plain(), aggregate=rule)
        (held,) = guarantees(
            federation, num_records=1, num_rounds=self.num_rounds, delta=self.delta
        )
        if not isinstance(held, Private):
            raise RuntimeError(f"the federation proves no ε: {held}")
        return rule, held.epsilon


@dataclass(frozen=True)
class RecordCurves:
    """DP-SGD on one pool of records: what ε costs, and what attacks and audits reach beside it.

    Pairs of models are trained in the same way, one on a random half of ``num_candidates`` records,
    the other on the rest; each has a start, batches and noise of its own. Each is the target in its
    turn: the half that it was not trained on are the non-members and the test set, and LiRA has
    the ``attack.num_shadows`` models of all other pairs. Whoever had the other of the target's own
    pair would be told by it who the members are. Rates are means over the targets; their limits
    are those of as many members as one target has, for targets share records and shadows.

    The audit is another training, of the first one's members and of ``num_canaries`` more records
    with a wrong label, of which each takes part by a fair coin. It guesses the ``num_guesses``
    highest confidences to be in, and as many lowest to be out: how many was fixed beforehand. It
    draws at a lower rate than ε was fitted to, as it has more records: it spends no more than is
    claimed.

    Attributes:
        train: The private training, but for its noise and its number of steps.
        free: What trains at ε = ∞, where no gradient is shortened.
        num_epochs: Of the private training, in expectation.
    """

    make: Callable[..., Task]
    train: DPSGD
    free: LocalSGD
    num_epochs: int
    attack: LiRA
    num_candidates: int
    num_canaries: int
    num_guesses: int
    epsilons: tuple[float, ...]
    delta: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(1, seed=seed, public_size=0, **self.options)
        drawn = Randomness(seed)
        inputs, labels = (
            torch.cat([mine, rest]) for mine, rest in zip(task.clients[0], task.test, strict=True)
        )
        order = torch.randperm(len(labels), generator=drawn.at("candidates"))
        order = order[: self.num_candidates + self.num_canaries]
        if len(order) < self.num_candidates + self.num_canaries:
            raise ValueError(f"{task.name} has {len(order)} records; take fewer candidates")
        pool = inputs[order], labels[order]
        found: dict[str, float | str] = {}
        slack, spare = inf, inf
        for place, epsilon in enumerate(self.epsilons):
            run = _Run(self, task, pool, drawn, place, self._fitted(epsilon))
            figures = run.attacked() | run.audited()
            found |= {f"{title} | {said(epsilon)}": v for title, v in figures.items()}
            if isinstance(run.stage, DPSGD):
                limit = tpr_limit(run.stage.event(self.num_candidates // 2), _FPR)
                found[f"{_TPR}: limit by f-DP | {said(epsilon)}"] = 100 * limit
                slack = min(slack, 100 * limit - figures[_LOW])
                spare = min(spare, epsilon - figures[_AUDIT])
        for epsilon in self.epsilons[:-1]:
            title = f"{_ACCURACY}: test"
            lost = found[f"{title} | {said(inf)}"], found[f"{title} | {said(epsilon)}"]
            found[f"points lost, {said(epsilon)}"] = float(lost[0]) - float(lost[1])
        return found | {
            "least_points_from_the_lower_limit_of_the_tpr_to_the_bound": slack,
            "least_of_claimed_minus_audited_epsilon": spare,
            "points_of_tpr_that_ε_of_1_takes_from_lira": float(found[f"{_LIRA} | {said(inf)}"])
            - float(found[f"{_LIRA} | {said(1.0)}"]),
            "data": task.source,
        }

    def _fitted(self, epsilon: float) -> DPSGD | LocalSGD:
        if epsilon == inf:
            return self.free
        size = self.num_candidates // 2
        rate = self.train.expected_batch / size
        num_steps = round(self.num_epochs / rate)
        sigma = _noise_for(epsilon, self.delta, rate, num_steps)
        return replace(self.train, noise_multiplier=sigma, num_steps=num_steps, num_epochs=None)


_noise_for = cache(noise_for)  # it is the same for all seeds

_TPR, _ACCURACY, _EPSILON = "TPR at 1 % FPR, percent", "accuracy, percent", "ε"
_LIRA = f"{_TPR}: LiRA"
_LOW = f"{_TPR}: LiRA, lower limit"
_AUDIT = f"{_EPSILON}: audit, lower limit"


@dataclass(frozen=True)
class _Run:
    """All trainings at one epsilon. Draws are those of every other epsilon: it alone differs."""

    recipe: RecordCurves
    task: Task
    pool: Batch
    drawn: Randomness
    place: int
    stage: DPSGD | LocalSGD

    @property
    def num_models(self) -> int:
        """As many as shadows are asked for, and the target's pair."""
        return 2 * (self.recipe.attack.num_shadows // 2 + 1)

    def trained(self, data: Batch, number: int) -> ModelView:
        start = self.task.model.initial(self.drawn.at("begin", number))
        rng = self.drawn.at("train", self.place, number)
        update = self.stage(self.task.model, start, data, rng=rng)
        return ModelView(self.task.model, start + update.delta)

    def half(self, number: int) -> Tensor:
        """Return which candidates model ``number`` is trained on. Shape: ``(candidates,)``."""
        num = self.recipe.num_candidates
        inside = torch.zeros(num, dtype=torch.bool)
        order = torch.randperm(num, generator=self.drawn.at("half", number // 2))
        inside[order[: num // 2] if number % 2 == 0 else order[num // 2 :]] = True
        return inside

    def attacked(self) -> dict[str, float]:
        recipe, every = self.recipe, range(self.num_models)
        candidates = _some(self.pool, slice(recipe.num_candidates))
        masks = [self.half(number) for number in every]
        models = [self.trained(_some(candidates, masks[number]), number) for number in every]
        found = Counter[str]()
        for target in every:
            others = [i for i in every if i // 2 != target // 2]
            shadows = Shadows(
                tuple(models[i] for i in others), torch.stack([masks[i] for i in others])
            )
            found.update(
                _figures(recipe.attack, models[target], masks[target], shadows, candidates)
            )
        means = {title: total / self.num_models for title, total in found.items()}
        low, high = tpr_interval(means[_LIRA] / 100, int(masks[0].sum()))
        return means | {_LOW: 100 * low, f"{_TPR}: LiRA, upper limit": 100 * high}

    def audited(self) -> dict[str, float]:
        recipe = self.recipe
        canaries = self._mislabelled(_some(self.pool, slice(recipe.num_candidates, None)))
        rng = self.drawn.at("coins")
        inside = torch.rand(recipe.num_canaries, generator=rng) < 0.5
        others = _some(_some(self.pool, slice(recipe.num_candidates)), self.half(0))
        mine = _some(canaries, inside)
        data = torch.cat([others[0], mine[0]]), torch.cat([others[1], mine[1]])
        view = self.trained(data, self.num_models)
        ranked = inside[confidence(view, canaries).argsort(descending=True, stable=True)]
        k = recipe.num_guesses
        right = int(ranked[:k].sum()) + int((~ranked[-k:]).sum())
        bound = one_run_epsilon(recipe.num_canaries, 2 * k, right, delta=recipe.delta)
        return {_AUDIT: bound, "right guesses of the audit, percent: all": 100 * right / (2 * k)}

    def _mislabelled(self, data: Batch) -> Batch:
        inputs, labels = data
        num_classes = len(self.task.classes)
        rng = self.drawn.at("labels")
        return inputs, (labels + torch.randint(1, num_classes, labels.shape, generator=rng)) % (
            num_classes
        )


def _figures(
    attack: LiRA, target: ModelView, inside: Tensor, shadows: Shadows, candidates: Batch
) -> dict[str, float]:
    """Return what a target knows, and what attacks reach against it, in percent."""
    found = {
        f"{_ACCURACY}: test": _accuracy(target, _some(candidates, ~inside)),
        f"{_ACCURACY}: training": _accuracy(target, _some(candidates, inside)),
    }
    guesses = {
        _LIRA: attack(target, candidates=candidates, shadows=shadows),
        f"{_TPR}: loss threshold": LossThreshold()(target, candidates=candidates),
    }
    for title, guess in guesses.items():
        roc = ROC.of(guess.scores[inside], guess.scores[~inside])
        found[title] = roc.tpr_at(_FPR)
    return {title: 100 * value for title, value in found.items()}


def _some(data: Batch, which: Any) -> Batch:
    return data[0][which], data[1][which]


def _accuracy(view: ModelView, data: Batch) -> float:
    return float((view.scores(data[0]).argmax(dim=1) == data[1]).double().mean())


def _by_class(view: ModelView, data: Batch) -> Tensor:
    """Return the accuracy on each class of a test set. Shape: ``(classes,)``."""
    right = (view.scores(data[0]).argmax(dim=1) == data[1]).double()
    return torch.stack([right[data[1] == c].mean() for c in range(int(data[1].max()) + 1)])
