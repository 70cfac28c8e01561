"""The more devices, the harder the inversion? It depends on what the server sees.

``python -m papers.devices --figure`` draws docs/devices.png, and writes the table beside it, from
the ledger's figures.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log2
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from papers.ledger import HERE, Expectation, Experiment
from turncoat.attacks.inversion.gradient_inversion import AggregateInversion, GradientInversion
from turncoat.attacks.inversion.malicious import RobbingTheFed
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.attacks.inversion.priors import TotalVariation
from turncoat.federation import Federation, Plain
from turncoat.games.reconstruction import Reconstruct, Records
from turncoat.messages import Update
from turncoat.metrics.images import match, psnr
from turncoat.metrics.intervals import of_mean
from turncoat.randomness import Randomness
from turncoat.record import write_text
from turncoat.report.palette import LIGHT, MARKERS
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.local import FedSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import LeNet5
from turncoat.trial import Measurement, Reconstruction
from turncoat.views import AggregateView, ServerView

DOCS = HERE.parent / "docs"
INDIVIDUAL = "individual updates"
LEARNT = "individual updates, later"
SUM = "secure sum"
MALICIOUS = "secure sum, malicious server"
MEAN = "mean public image"
RANDOM = "random public images"
_NAME = "more-devices"
_PSNR, _IDENTIFIED = "PSNR (dB)", "identified (%)"
_FROM, _TO = ", interval from", ", interval to"


@dataclass(frozen=True)
class MoreDevices:
    """The same victims in federations of n devices, for several n; each device holds one image.

    The victims are divided among as many federations as it takes. All begin with the same net and
    take one step; ``learnt`` rounds later the server looks at single updates once more. What is
    guessed of a sum is paired one to one with the images of its federation, so that the squared
    error is least, and so are the baselines; who has no guess gets the mean public image. The
    line-up of a record is the public images of its class.

    Attributes:
        attack: On single updates, and on the sum, of which it guesses all n images together.
    """

    make: Callable[..., Task]
    train: FedSGD
    attack: GradientInversion
    malicious: RobbingTheFed
    num_devices: tuple[int, ...]
    num_victims: int
    learnt: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(self.num_victims, per_client=1, seed=seed, **self.options)
        found: dict[str, float | str] = {}
        values: dict[str, list[Tensor]] = {}
        sent: list[Tensor] = []
        for n in self.num_devices:
            rows, updates = self.guessed(task, n, seed)
            sent.append(updates)
            for row, guesses in rows.items():
                likeness, identified = self._marks(guesses, task, seed)
                values.setdefault(row, []).append(likeness)
                low, high = of_mean(likeness)
                found[f"{_PSNR}: {row} | {n}"] = float(likeness.mean())
                found[f"{_PSNR}{_FROM}: {row} | {n}"] = low
                found[f"{_PSNR}{_TO}: {row} | {n}"] = high
                found[f"{_IDENTIFIED}: {row} | {n}"] = 100 * identified.value
                found[f"{_IDENTIFIED}{_FROM}: {row} | {n}"] = 100 * identified.low
                found[f"{_IDENTIFIED}{_TO}: {row} | {n}"] = 100 * identified.high
                found[f"{_IDENTIFIED}: chance | {n}"] = 100 * identified.baseline
        for row in (INDIVIDUAL, LEARNT, SUM, MALICIOUS):
            slopes = self._slopes(torch.stack(values[row]))
            low, high = of_mean(slopes)
            found[f"dB for each doubling: {row} | mean"] = float(slopes.mean())
            found[f"dB for each doubling: {row} | from"] = low
            found[f"dB for each doubling: {row} | to"] = high
        changes = [float((updates - sent[0]).abs().max()) for updates in sent]
        found["largest_change_of_an_update_with_the_devices"] = max(changes)
        gain = values[MALICIOUS][-1] - values[MEAN][-1]
        found["malicious_gain_over_mean_image_at_most_devices_db"] = float(gain.mean())
        found["malicious_gain_over_mean_image_at_most_devices_db_low"] = of_mean(gain)[0]
        return found | {"data": task.source}

    def guessed(self, task: Task, n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return what each reading makes of each victim, and what each sent at first.

        Shapes: ``(victims, *image)`` and ``(victims, num_params)``.
        """
        everyone, sent = Randomness(seed), list[Tensor]()
        public, parts = task.population[0], dict[str, list[Tensor]]()
        mean = public.mean(dim=0, keepdim=True)
        for place in range(0, self.num_victims, n):
            some = replace(task, clients=task.clients[place : place + n])
            originals = torch.cat([inputs for inputs, _ in some.clients])
            rng, members = everyone.at("attack", n, place), tuple(range(n))
            offers: Any = {"victims": members, "population": task.population}
            watch = [Watch(ServerView[Update], frozenset({0, self.learnt}))]
            federation = _federation(self.train, Plain())
            run = simulate(federation, some, num_rounds=self.learnt + 1, seed=seed, watch=watch)
            views = run.seen(ServerView[Update])
            sent += [message.delta for message in views[0].messages]
            for row, view in zip((INDIVIDUAL, LEARNT), views, strict=True):
                alone = self.attack(view, rng=rng, **offers)
                parts.setdefault(row, []).append(torch.cat([g.inputs for g in alone]))
            parts_of_recipe = {k: v for k, v in vars(self.attack).items() if k != "num_images"}
            whole = AggregateInversion(**parts_of_recipe, num_images=n)
            (joint, *_) = whole(self._sum(some, seed), rng=rng, **offers)
            (robbed, *_) = self.malicious(self._sum(some, seed, self.malicious.server), **offers)
            drawn = public[torch.randint(len(public), (n,), generator=rng)]
            for row, images in (
                (SUM, joint.inputs),
                (MALICIOUS, robbed.inputs),
                (MEAN, mean),
                (RANDOM, drawn),
            ):
                parts.setdefault(row, []).append(_paired(images, originals, mean))
        return {row: torch.cat(images) for row, images in parts.items()}, torch.stack(sent)

    def _sum(self, task: Task, seed: int, server: Any = None) -> AggregateView[Update]:
        """Return the first round of a federation whose server sees the sum alone."""
        federation = _federation(self.train, SecureAggregation())
        watch = [Watch(AggregateView[Update])]
        run = simulate(federation, task, num_rounds=1, seed=seed, server=server, watch=watch)
        view: AggregateView[Update] = run.seen(AggregateView[Update])[0]
        return view

    def _marks(self, images: Tensor, task: Task, seed: int) -> tuple[Tensor, Measurement]:
        """Return the PSNR of each victim in dB, and the share that is identified."""
        guesses = [
            Reconstruction(image[None], labels)
            for image, (_, labels) in zip(images, task.clients, strict=True)
        ]
        truth = Records(tuple(task.clients), task.population)
        marked = Reconstruct().mark(guesses, truth, rng=Randomness(seed).at("mark"))
        identified = next(m for m in marked.others if m.name == "identified")
        return psnr(images, torch.cat([x for x, _ in task.clients])), identified

    def _slopes(self, values: Tensor) -> Tensor:
        """Return each victim's least-squares slope over ``log2 n``. Shape: ``(victims,)``."""
        doublings = torch.tensor([log2(n) for n in self.num_devices], dtype=values.dtype)
        centred = doublings - doublings.mean()
        return centred @ values / centred.square().sum()


def _federation(train: FedSGD, channel: Any) -> Federation[Any, Any]:
    return Federation(train=train, channel=channel, aggregate=Mean())


def _paired(images: Tensor, originals: Tensor, otherwise: Tensor) -> Tensor:
    """Return the image that each original is paired with, one to one."""
    rows, columns = match(images, originals)
    found = otherwise.repeat(len(originals), 1, 1, 1)
    found[columns] = images[rows]
    return found


DEVICES = (
    Experiment(
        _NAME,
        "The more devices, the harder the inversion: true of the sum, not of single updates, and "
        "not enough against a server that lies.",
        MoreDevices(
            digits,
            FedSGD(lr=0.1),
            GradientInversion(
                optimiser=SignedAdam(400),
                priors=(TotalVariation(1e-3),),
                num_images=1,
                together=True,
            ),
            RobbingTheFed(),
            num_devices=(1, 2, 4, 8, 16, 32),
            num_victims=32,
            learnt=20,
            options={"public_size": 400, "test_size": 400, "model": LeNet5("relu")},
        ),
        "Digits of 8x8 pixels, LeNet-5 with ReLU; 32 victims who hold one image each, in 32 "
        "federations of one device, 16 of two, ... one of 32: the data of a device are fixed, "
        "their total grows. One step of FedSGD at 0.1. Single updates: cosine, TV 1e-3, 400 "
        "signed Adam steps, in the first round and in one 20 rounds later. The sum under secure "
        "aggregation: the same attack on all n images together. The malicious server: an imprint "
        "of 120 bins, read from the sum. Labels are read off the gradient. Of a sum, guesses are "
        "paired one to one with the n images. One seed; intervals are over the 32 victims (of a "
        "share, Clopper and Pearson's), and do not know that those of one sum share its fate.",
        "Claim 2 of a talk by Usynin; no figure is published. Directions were fixed before the "
        "first run: down for the sum, level for single updates, above the mean image for the "
        "server that lies. What a device sends in the first round must not depend on the others at "
        "all, bit by bit. Bounds are this project's own.",
        (
            Expectation(f"dB for each doubling: {SUM} | to", at_most=0),
            Expectation("largest_change_of_an_update_with_the_devices", at_most=0),
            Expectation(f"dB for each doubling: {INDIVIDUAL} | from", at_most=0),
            Expectation(f"dB for each doubling: {INDIVIDUAL} | to", at_least=0),
            Expectation("malicious_gain_over_mean_image_at_most_devices_db_low", above=0),
        ),
        num_seeds=1,
    ),
)

_SHOWN = {INDIVIDUAL: 1, LEARNT: 7, SUM: 2, MALICIOUS: 3}  # and their hues
_BLIND = {_PSNR: (MEAN, RANDOM), _IDENTIFIED: ("chance", RANDOM)}


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draw PSNR and identification against the number of devices."""
    canvas = Figure(figsize=(8.2, 3.9), layout="constrained")
    for axes, title in zip(canvas.subplots(1, 2), (_PSNR, _IDENTIFIED), strict=True):
        _curves(axes, title, figures)
    lines = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(*lines, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    canvas.savefig(path, dpi=110, metadata={"Software": None})


def _curves(axes: Axes, title: str, figures: Mapping[str, Any]) -> None:
    for i, (row, hue) in enumerate(_SHOWN.items()):
        devices, values = _row(figures, title, row)
        low, high = (_row(figures, title + end, row)[1] for end in (_FROM, _TO))
        places = [n * 2 ** (0.06 * (i - 1.5)) for n in devices]  # bars stand side by side
        ends = [
            [v - a for v, a in zip(values, low, strict=True)],
            [b - v for v, b in zip(values, high, strict=True)],
        ]
        look: Any = {"color": LIGHT.series[hue], "marker": MARKERS[i], "markersize": 4.5}
        axes.errorbar(places, values, ends, label=row, capsize=2, linewidth=1.4, **look)
    for row, dashes in zip(_BLIND[title], (":", "--"), strict=True):
        devices, values = _row(figures, title, row)
        axes.plot(devices, values, dashes, color=LIGHT.muted, linewidth=1.2, label=row)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(map(float, devices))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(devices, list(map(str, devices)))
    axes.set_xlabel("devices")
    axes.set_ylabel(title)
    axes.grid(color=LIGHT.line, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _row(figures: Mapping[str, Any], title: str, row: str) -> tuple[list[int], list[float]]:
    """Return the devices and the values of one row of a grid."""
    head = f"{title}: {row} | "
    found = {
        int(n.removeprefix(head)): f["value"] for n, f in figures.items() if n.startswith(head)
    }
    return list(found), list(found.values())


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    devices = _row(figures, _PSNR, INDIVIDUAL)[0]
    lines = ["| | " + " | ".join(map(str, devices)) + " |", "|---|" + "---:|" * len(devices)]
    for title in (_PSNR, _IDENTIFIED):
        for row in (*_SHOWN, *_BLIND[title]):
            low, high = (_row(figures, title + end, row)[1] for end in (_FROM, _TO))
            cells = [f"{v:.1f}" for v in _row(figures, title, row)[1]]
            if row in _SHOWN:
                ends = zip(cells, low, high, strict=True)
                cells = [f"{v} ({a:.1f} to {b:.1f})" for v, a, b in ends]
            lines.append(f"| {row}, {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Draw the figure and write the table, from the ledger that has the experiment."""
    parser = argparse.ArgumentParser(prog="python -m papers.devices")
    parser.add_argument("--figure", action="store_true", required=True, help="draw and write")
    parser.add_argument("--ledger", type=Path, default=HERE / "inversion.json")
    asked = parser.parse_args(arguments)
    known = json.loads(asked.ledger.read_text("utf-8"))["experiments"]
    figures = next((e["figures"] for e in known if e["name"] == _NAME), None)
    if not figures:
        parser.error(f"{asked.ledger.name} has no figures of {_NAME!r}: run the ledger first")
    draw(figures, DOCS / "devices.png")
    page = DOCS / "inversion.md"
    written = re.sub(
        r"(<!-- devices -->\n).*?(\n<!-- end -->)",
        lambda found: found[1] + table(figures) + found[2],
        page.read_text("utf-8"),
        flags=re.DOTALL,
    )
    write_text(page, written)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
