"""How fast an iteration of gradient inversion is, and how far it gets, beside others.

``breaching`` is the peer, where it is installed (``pip install --no-deps breaching==0.1.2``: its
attacks alone are loaded, without the torchvision that the rest of it wants); ``invertinggradients``
is on no package index. The plain loop is what both do at heart, and stands in where there is no
peer: one pass, two derivatives, one step. All start at the same pixels and take turns; seconds are
of the processor, in one thread, so that other work on the machine matters less. The first
iterations are left out, and so is the minute that compiling takes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from itertools import pairwise
from statistics import fmean, median
from types import ModuleType
from typing import Any

import torch
from skimage.data import astronaut
from torch import Tensor, nn

from benchmarks.federation import INVERSION, load, machine, write_part
from turncoat.attacks.inversion.engine import Clue, Optimiser, Recipe, invert_all
from turncoat.attacks.inversion.labels import Counts
from turncoat.attacks.inversion.objectives import Cosine
from turncoat.attacks.inversion.optimisers import Decay, SignedAdam
from turncoat.attacks.inversion.priors import TotalVariation
from turncoat.metrics.images import psnr
from turncoat.metrics.intervals import of_mean
from turncoat.randomness import Randomness
from turncoat.task import Model
from turncoat.tasks.models import Built, LeNet5

FLOOR, EAGER, COMPILED = "plain loop", "Turncoat", "Turncoat, compiled"
TOGETHER, PEER = "Turncoat, all together", "breaching 0.1.2"
TUNED = "Turncoat, cosine decay"
BREACHING = "breaching==0.1.2"
WEIGHT = 1e-4  # of the total variation, as the paper's code has it
TUNED_WEIGHT = 1e-5  # the best of 1e-6 to 3e-3 on other crops; docs/inversion.md advises it
MOST = {EAGER: 1.0, COMPILED: 1 / 1.6}  # promised, times the peer's seconds of an iteration
MOST_TO_REACH = 0.5  # promised, times the peer's seconds to its final PSNR
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
    """The processor's seconds of each iteration: from one look at the net to the next.

    Attributes:
        path: What the guess was at each tick, if it is told.
    """

    seconds: list[float] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)
    path: list[Tensor] = field(default_factory=list)
    whole: float = 0.0  # seconds of all iterations since the last stop

    def tick(self) -> None:
        self.ticks.append(time.process_time())

    def stop(self, share: int = 1) -> None:
        """Take down what the ticks say, for one of ``share`` guesses that moved at once."""
        if len(self.ticks) > 1:
            span = self.ticks[-1] - self.ticks[0]
            self.whole = span * len(self.ticks) / (len(self.ticks) - 1)
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
            self.clock.path.append(variables[0].detach().clone())
            return slope()

        self.inner(variables, ticked, clamp=clamp, patience=patience)


@dataclass
class InTurn:
    """A start that is handed out one after another."""

    left: list[Tensor]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return self.left.pop(0)


def ours(
    work: Work,
    which: Sequence[int],
    num_steps: int,
    clock: Clock,
    *,
    decay: Decay = "cuts",
    weight: float = WEIGHT,
    **how: Any,
) -> list[Tensor]:
    recipe = Recipe(
        objective=Cosine(),
        priors=(TotalVariation(weight),),
        optimiser=Timed(SignedAdam(num_steps, decay=decay), clock),
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
    TUNED: lambda *given: ours(*given, decay="cosine", weight=TUNED_WEIGHT),
    PEER: breaching,
}


def race(
    work: Work, names: Sequence[str], num_turns: int, num_timed: int
) -> dict[str, tuple[float, ...]]:
    """Let contenders take turns of a few iterations; return the seconds of one, by turn."""
    seconds: dict[str, list[float]] = {n: [] for n in names}
    for turn in range(num_turns):
        for name in names:
            which = range(len(work.images)) if name == TOGETHER else [turn % len(work.images)]
            clock = Clock()
            CONTENDERS[name](work, which, num_timed, clock)
            seconds[name].append(median(clock.seconds))
    return {name: tuple(s) for name, s in seconds.items()}


@dataclass(frozen=True)
class Rebuilt:
    """One image by one contender.

    Attributes:
        seconds: Of all iterations.
        reached: Seconds until it was as like the original as the peer's image is in the end;
            infinity if it never was.
    """

    cosine: float
    likeness: float
    seconds: float
    reached: float


def rebuilt(net: str, num_images: int, which: int, num_steps: int) -> dict[str, Rebuilt]:
    """Let the peer rebuild an image, then us: by the same recipe, and by one that suits better."""
    torch.set_num_threads(1)
    work, bar, found = Work.of(NETS[net], num_images), 0.0, {}
    for name in (peer(), EAGER, TUNED):
        clock = Clock()
        (image,) = CONTENDERS[name](work, [which], num_steps, clock)
        clue, truth = work.clues[which], work.images[which]
        mine = clue.model.gradient(clue.before, (image, torch.tensor([work.labels[which]])))
        cosine = 1 - float(torch.cosine_similarity(mine, -clue.delta, dim=0))
        likeness = float(psnr(image, truth))
        bar = bar or likeness
        hit = [k for k, x in enumerate([*clock.path[1:], image]) if float(psnr(x, truth)) >= bar]
        reached = clock.whole * (hit[0] + 1) / num_steps if hit else float("inf")
        found[name] = Rebuilt(cosine, likeness, clock.whole, reached)
    return found


def peer() -> str:
    """Return the peer's name, or the plain loop's where it is not installed."""
    try:
        of_breaching()
    except ImportError:
        return FLOOR
    return PEER


def table(net: str, seconds: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Yield the seconds of an iteration as lines of a Markdown table."""
    yield f"| {net}, an iteration | ms | times the plain loop | times {peer()} |"
    yield "|---|---:|---:|---:|"
    for name in seconds:
        ratios = [f"{_ratio(seconds, name, of):.2f}" for of in (FLOOR, peer())]
        yield f"| {name} | {1e3 * median(seconds[name]):.2f} | {' | '.join(ratios)} |"
    yield ""
    for name, most in MOST.items():
        if name in seconds:
            ratio = _ratio(seconds, name, peer())
            yield (
                f"- {name}: {ratio:.2f} times {peer()}; at most {most:.3f} is promised: "
                f"{'met' if ratio <= most else 'missed'}."
            )


def _ratio(seconds: Mapping[str, Sequence[float]], name: str, of: str) -> float:
    return median(a / b for a, b in zip(seconds[name], seconds[of], strict=True))


def quality(net: str, found: Sequence[Mapping[str, Rebuilt]], num_steps: int) -> Iterator[str]:
    """Yield what was rebuilt as lines of a Markdown table, in pairs with the peer's."""
    theirs = [f[peer()] for f in found]
    yield (
        f"| {net}, {num_steps} iterations, {len(found)} images | 1 - cosine | less {peer()}'s "
        f"| PSNR, dB | less {peer()}'s | seconds to {peer()}'s PSNR, times its own |"
    )
    yield "|---|---:|---:|---:|---:|---:|"
    for name in found[0]:
        mine = [f[name] for f in found]
        costs = torch.tensor([a.cosine - b.cosine for a, b in zip(mine, theirs, strict=True)])
        gains = torch.tensor([a.likeness - b.likeness for a, b in zip(mine, theirs, strict=True)])
        if name == peer():
            cells = ["-", "-", "1.00"]
        else:
            cells = [_mean(costs, 6), _mean(gains, 2), f"{_to_reach(mine, theirs):.2f}"]
        cosine, likeness = fmean(m.cosine for m in mine), fmean(m.likeness for m in mine)
        yield f"| {name} | {cosine:.6f} | {cells[0]} | {likeness:.2f} | {cells[1]} | {cells[2]} |"
    yield ""
    ratio = _to_reach([f[TUNED] for f in found], theirs)
    yield (
        f"- {TUNED}: {ratio:.2f} times {peer()}'s seconds to its final PSNR, the median over "
        f"images; at most {MOST_TO_REACH:.2f} is promised: "
        f"{'met' if ratio <= MOST_TO_REACH else 'missed'}."
    )


def _to_reach(mine: Sequence[Rebuilt], theirs: Sequence[Rebuilt]) -> float:
    return median(a.reached / b.seconds for a, b in zip(mine, theirs, strict=True))


def _mean(differences: Tensor, digits: int) -> str:
    low, high = of_mean(differences)
    return f"{float(differences.mean()):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


PREFACE = f"""{INVERSION}

How fast an iteration of gradient inversion is, and how far it gets. `python -m
benchmarks.inversion` prints these tables; `--write` puts them here.

Crops of one photograph, 32 x 32, one image a gradient, untrained nets; ConvNet64 has 2.9 million
parameters. All contenders begin at the same pixels. *Turncoat* follows the very recipe of the peer
(cosine, total variation of 1e-4, signed Adam, cuts of the step); *cosine decay* takes the step down
along a cosine and weighs the total variation 1e-5. Brackets are 95 % intervals of a paired
difference over images. Seconds to a PSNR are of eager iterations; compiling is left out.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inversion", description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["ConvNet64"])
    parser.add_argument("--images", type=int, default=6, help="at least two")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--timed", type=int, default=10, help="iterations of a turn")
    parser.add_argument("--steps", type=int, default=100, help="iterations to judge by")
    parser.add_argument("--jobs", type=int, default=2, help="processes that rebuild images")
    parser.add_argument("--no-compile", action="store_true", help="saves a minute or more")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = [f"- Machine: {machine()}.", f"- Load (1, 5, 15 minutes) before: {load()}."]
    if os.getloadavg()[0] > 0.5:
        lines.append("- The machine was busy with other work: times say little, ratios more.")
    if peer() == FLOOR:
        lines.append(f"- Without {PEER}, which is not installed: the plain loop stands in.")
    names = [FLOOR, EAGER, TOGETHER, *([] if given.no_compile else [COMPILED])]
    names += [PEER] if peer() == PEER else []
    for net in given.nets:
        work = Work.of(NETS[net], given.images)
        if len(given.nets) > 1 or net != "ConvNet64":
            contenders = names
        else:
            contenders = [n for n in names if n != TOGETHER]  # which gains nothing, and takes long
        lines += ["", *table(net, race(work, contenders, given.turns, given.timed)), ""]
        crew = ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn"))
        with crew:
            tasks = [
                crew.submit(rebuilt, net, given.images, i, given.steps) for i in range(given.images)
            ]
            lines += quality(net, [t.result() for t in tasks], given.steps)
    print(*lines, sep="\n", flush=True)
    if given.write:
        said = " ".join(["python -m benchmarks.inversion", *(arguments or sys.argv[1:])])
        head = f"## {date.today().isoformat()}: `{said}`"
        write_part(INVERSION, "\n".join([PREFACE, head, "", *lines]))


if __name__ == "__main__":
    main()
