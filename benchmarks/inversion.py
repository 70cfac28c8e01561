"""How fast an iteration of gradient inversion is, and how far it gets, beside others.

``breaching`` is the peer, where it is installed (``pip install --no-deps breaching==0.1.2``: its
attacks alone are loaded, without the torchvision that the rest of it wants); ``invertinggradients``
is on no package index. The plain loop is what both do at heart, and the floor: one pass, two
derivatives, one step. All start at the same pixels and take turns; seconds are of the processor, in
one thread, so that other work on the machine matters less. The first iterations are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from statistics import median
from types import ModuleType
from typing import Any

import torch
from skimage.data import astronaut
from torch import Tensor, nn

from turncoat.attacks.inversion.engine import Clue, Optimiser, Recipe, invert_all
from turncoat.attacks.inversion.labels import Counts
from turncoat.attacks.inversion.objectives import Cosine
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.attacks.inversion.priors import TotalVariation
from turncoat.metrics.images import psnr
from turncoat.randomness import Randomness
from turncoat.task import Model
from turncoat.tasks.models import Built, LeNet5

FLOOR, EAGER, COMPILED = "plain loop", "Turncoat", "Turncoat, compiled"
TOGETHER, PEER = "Turncoat, all together", "breaching 0.1.2"
BREACHING = "breaching==0.1.2"
WEIGHT = 1e-4  # of the total variation
SKIPPED = 3  # iterations of each call that nobody times


def lenet() -> nn.Module:
    return Built(LeNet5("tanh"), (3, 32, 32), 10)()


def convnet64() -> nn.Module:
    """The paper's ConvNet of width 64, without its batch normalisation: 2.9 million parameters."""
    layers: list[nn.Module] = []
    widths = (3, 64, 128, 128, 256, 256, 256, 256, 256, 256)
    for number, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        if number in (5, 8):
            layers.append(nn.MaxPool2d(3))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 9, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"LeNet": lenet, "ConvNet64": convnet64}


@dataclass(frozen=True)
class Work:
    """Single images to rebuild from their gradients, and where every contender begins."""

    clues: tuple[Clue, ...]
    images: tuple[Tensor, ...]
    labels: tuple[int, ...]
    starts: tuple[Tensor, ...]

    @classmethod
    def of(cls, build: Callable[[], nn.Module], num_images: int) -> Work:
        """Return crops of a photograph that comes with scikit-image, as images of ten classes."""
        read: Any = astronaut
        photo = torch.tensor(read()).permute(2, 0, 1).float() / 255
        crops = photo.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
        crops = crops[torch.randperm(len(crops), generator=Randomness(0).at("crops"))]
        model, rng = Model(build), Randomness(0).at("start")
        before = model.initial(Randomness(0).at("begin"))
        images = tuple(crops[i : i + 1] for i in range(num_images))
        labels = tuple(i % 10 for i in range(num_images))
        population = (crops[num_images:], torch.arange(len(crops) - num_images) % 10)
        deltas = [
            -model.gradient(before, (x, torch.tensor([y])))
            for x, y in zip(images, labels, strict=True)
        ]
        clues = tuple(Clue(model, before, d, 1, population) for d in deltas)
        starts = tuple(torch.rand((1, 3, 32, 32), generator=rng) for _ in images)
        return cls(clues, images, labels, starts)


@dataclass
class Clock:
    """The processor's seconds of each iteration: from one look at the net to the next."""

    seconds: list[float] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.ticks.append(time.process_time())

    def stop(self, share: int = 1) -> None:
        """Take down what the ticks say, for one of ``share`` guesses that moved at once."""
        pairs = zip(self.ticks[SKIPPED:], self.ticks[SKIPPED + 1 :], strict=False)
        self.seconds += [(b - a) / share for a, b in pairs]
        self.ticks.clear()


@dataclass(frozen=True)
class Timed:
    """An optimiser whose iterations are taken down."""

    inner: Optimiser
    clock: Clock

    def __call__(
        self,
        variables: Sequence[Tensor],
        slope: Callable[[], Tensor],
        *,
        clamp: Callable[[], None],
        patience: int | None,
    ) -> None:
        def ticked() -> Tensor:
            self.clock.tick()
            return slope()

        self.inner(variables, ticked, clamp=clamp, patience=patience)


@dataclass
class InTurn:
    """A start that is handed out one after another."""

    left: list[Tensor]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return self.left.pop(0)


def ours(
    work: Work, which: Sequence[int], num_steps: int, clock: Clock, **how: Any
) -> list[Tensor]:
    recipe = Recipe(
        objective=Cosine(),
        priors=(TotalVariation(WEIGHT),),
        optimiser=Timed(SignedAdam(num_steps), clock),
        start=InTurn([work.starts[i] for i in which]),
        labels=Counts(),
        **how,
    )
    clues = [work.clues[i] for i in which]
    found = invert_all(clues, recipe, rng=Randomness(0).at("attack"))
    clock.stop(len(which) if recipe.together else 1)
    return [f.inputs for f in found]


def plain(work: Work, which: Sequence[int], num_steps: int, clock: Clock) -> list[Tensor]:
    """Rebuild images as the paper's code does, without anything of ours."""
    found = []
    for i in which:
        clue = work.clues[i]
        net = clue.model.build()
        for p, value in zip(
            net.parameters(), clue.model.layout.split(clue.before).values(), strict=True
        ):
            p.data = value.clone()
        weights, target = list(net.parameters()), clue.gradient
        labels, guess = torch.tensor([work.labels[i]]), work.starts[i].clone().requires_grad_()
        adam = torch.optim.Adam([guess], lr=0.1)
        cuts = [num_steps * eighths // 8 for eighths in (3, 5, 7)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(adam, cuts)
        for _ in range(num_steps):
            clock.tick()
            loss = nn.functional.cross_entropy(net(guess), labels)
            slopes = torch.autograd.grad(loss, weights, create_graph=True)
            dot = torch.stack([(s * t).sum() for s, t in zip(slopes, target, strict=True)]).sum()
            mine = torch.stack([s.square().sum() for s in slopes]).sum().sqrt()
            seen = torch.stack([t.square().sum() for t in target]).sum().sqrt()
            wobble = guess.diff(dim=-1).abs().mean() + guess.diff(dim=-2).abs().mean()
            cost = 1 - dot / (mine * seen) + WEIGHT * wobble
            guess.grad = torch.autograd.grad(cost, guess)[0].sign_()
            adam.step()
            schedule.step()
            guess.data.clamp_(0, 1)
        clock.stop()
        found.append(guess.detach())
    return found


class Options(dict[str, Any]):
    """What breaching reads its settings from."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@cache
def of_breaching() -> ModuleType:
    """Return breaching's attack by optimisation, without the rest, which imports torchvision."""
    spec = importlib.util.find_spec("breaching")
    if spec is None:
        raise ImportError(f"pip install --no-deps {BREACHING}")
    (root,) = spec.submodule_search_locations or [""]
    for name in ("", ".attacks", ".cases", ".cases.models"):
        bare = ModuleType(f"breaching{name}")
        bare.__path__ = [root + name.replace(".", "/")]
        sys.modules.setdefault(f"breaching{name}", bare)
    with warnings.catch_warnings(action="ignore"):
        return importlib.import_module("breaching.attacks.optimization_based_attack")


def breaching(work: Work, which: Sequence[int], num_steps: int, clock: Clock) -> list[Tensor]:
    settings = Options(
        type="invertinggradients",
        attack_type="optimization",
        label_strategy=None,
        init="rand",
        normalize_gradients=False,
        objective=Options(type="cosine-similarity", scale=1.0, task_regularization=0.0),
        restarts=Options(num_trials=1, scoring="cosine-similarity"),
        optim=Options(
            optimizer="adam",
            signed="hard",
            step_size=0.1,
            boxed=True,
            max_iterations=num_steps,
            step_size_decay="step-lr",
            langevin_noise=0.0,
            warmup=0,
            grad_clip=None,
            callback=10**9,
        ),
        augmentations=None,
        differentiable_augmentations=False,
        regularization=Options(total_variation=Options(scale=WEIGHT, inner_exp=1, outer_exp=1)),
        impl=Options(dtype="float", mixed_precision=False, JIT=None),
    )
    found = []
    for i in which:
        clue = work.clues[i]
        net = clue.model.build()
        state = list(clue.model.layout.split(clue.before).values())
        about = Options(shape=(3, 32, 32), modality="vision")
        said = Options(
            labels=torch.tensor([work.labels[i]]), num_data_points=1, local_hyperparams=None
        )
        payload = [{"metadata": about, "parameters": state, "buffers": []}]
        shared = [{"gradients": list(clue.gradient), "buffers": None, "metadata": said}]
        net.register_forward_pre_hook(lambda *_: clock.tick())  # a function: it copies the net
        attacker = of_breaching().OptimizationBasedAttacker(net, nn.CrossEntropyLoss(), settings)
        with warnings.catch_warnings(action="ignore"):
            answer, _ = attacker.reconstruct(payload, shared, {}, initial_data=work.starts[i])
        clock.ticks.pop()  # its last look at the net only judges what was found
        clock.stop()
        found.append(answer["data"].clamp(0, 1))
    return found


CONTENDERS: dict[str, Callable[..., list[Tensor]]] = {
    FLOOR: plain,
    EAGER: ours,
    TOGETHER: lambda *given: ours(*given, together=True),
    COMPILED: lambda *given: ours(*given, compile=True),
    PEER: breaching,
}


@dataclass(frozen=True)
class Result:
    """Seconds of an iteration, one of each turn, and what was found."""

    seconds: tuple[float, ...]
    cosine: Tensor
    likeness: Tensor


def race(
    work: Work, names: Sequence[str], *, num_turns: int, num_timed: int, num_steps: int
) -> dict[str, Result]:
    """Let contenders take turns of a few iterations, then rebuild all images."""
    clocks: dict[str, list[float]] = {n: [] for n in names}
    all_images = range(len(work.images))
    for turn in range(num_turns):
        for name in names:
            which = all_images if name == TOGETHER else [turn % len(work.images)]
            clock = Clock()
            CONTENDERS[name](work, which, num_timed, clock)
            clocks[name].append(median(clock.seconds))
    found = {}
    for name in names:
        images = CONTENDERS[name](work, all_images, num_steps, Clock())
        found[name] = Result(
            tuple(clocks[name]),
            torch.tensor([_cosine(work, i, x) for i, x in enumerate(images)]),
            torch.cat([psnr(a, b) for a, b in zip(images, work.images, strict=True)]),
        )
    return found


def _cosine(work: Work, which: int, image: Tensor) -> float:
    clue = work.clues[which]
    mine = clue.model.gradient(clue.before, (image, torch.tensor([work.labels[which]])))
    return 1 - float(torch.cosine_similarity(mine, -clue.delta, dim=0))


def table(net: str, found: dict[str, Result], num_steps: int) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    floor = found[FLOOR]
    yield (
        f"| {net} | ms an iteration | times the plain loop | 1 - cosine after {num_steps} "
        "| PSNR, dB |"
    )
    yield "|---|---|---|---|---|"
    for name, one in found.items():
        ratios = [a / b for a, b in zip(one.seconds, floor.seconds, strict=True)]
        yield (
            f"| {name} | {1e3 * median(one.seconds):.2f} | {median(ratios):.2f} | "
            f"{float(one.cosine.mean()):.5f} | {float(one.likeness.mean()):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["LeNet"])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--timed", type=int, default=15, help="iterations of a turn")
    parser.add_argument("--steps", type=int, default=200, help="iterations to judge by")
    parser.add_argument("--compile", action="store_true", help="takes a minute or more first")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = [FLOOR, EAGER, TOGETHER, *([COMPILED] if given.compile else [])]
    try:
        of_breaching()
        names.append(PEER)
    except ImportError as error:
        print(f"without breaching: {error}")
    for net in given.nets:
        work = Work.of(NETS[net], given.images)
        found = race(
            work, names, num_turns=given.turns, num_timed=given.timed, num_steps=given.steps
        )
        print(*table(net, found, given.steps), sep="\n", flush=True)


if __name__ == "__main__":
    main()
