"""What a private epoch costs, and how many shadow models a minute are trained, beside others.

Contenders have a process of one thread each, are alive at once, and take turns, as in
``benchmarks.federation``. The first turn is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.contenders import BATCH_SIZE, LR, NET, Contender, Turn, Work, train
from benchmarks.federation import (
    NEVER_PLAYED,
    PAGE,
    PRIVATE,
    ROOT,
    WARM_UP,
    Round,
    cheaper,
    examples,
    gain,
    load,
    machine,
    race,
    write_part,
)
from turncoat.attacks.membership.lira import LiRA
from turncoat.audit import Audit, Entry, Event, run_audit
from turncoat.federation import Federation, Plain
from turncoat.games.membership import Membership
from turncoat.randomness import Randomness
from turncoat.runtimes.seat import one_thread
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Model, Shards, Task
from turncoat.trial import Trial
from turncoat.views import Seat

BATCH = 256  # examples of a private step, in expectation
MAX_NORM, NOISE = 1.0, 1.0
OPEN, OURS, BY_HAND, GHOST = "not private", "Turncoat", "vmap(grad) loop", "Opacus, ghost"
MOST_OF_GHOST, MOST_OF_OPEN = 1.0, 2.0  # promised, and tried for

LOOP, BARE = "plain loop", "two bare loops, two processes"
ONE, TWO = "Turncoat, 1 process", "Turncoat, 2 processes"
METER = "Privacy Meter's loop, as described"
LEAST_OF_BARE = 1 / 1.05  # promised


@dataclass(frozen=True)
class OpenEpoch:
    """An epoch of plain SGD."""

    def __call__(self, work: Work, turn: Turn) -> None:
        one_thread()
        (inputs, labels), module = work.data(), NET()
        optimiser = torch.optim.SGD(module.parameters(), lr=LR)
        for _ in range(work.num_rounds):
            turn()
            for chosen in torch.split(torch.randperm(len(labels)), BATCH):
                optimiser.zero_grad()
                torch.autograd.backward(cross_entropy(module(inputs[chosen]), labels[chosen]))
                optimiser.step()


@dataclass(frozen=True)
class OurEpoch:
    """An epoch of ``DPSGD``, with what a client's round has around it: its checks, its draws."""

    def __call__(self, work: Work, turn: Turn) -> None:
        one_thread()
        data, model = work.data(), Model(NET)
        rule = DPSGD(LR, MAX_NORM, BATCH, noise_multiplier=NOISE, num_epochs=1)
        start = model.initial(Randomness(0).at("start"))
        for number in range(work.num_rounds):
            turn()
            rule(model, start, data, rng=Randomness(number).at("train"))


@dataclass(frozen=True)
class OpacusEpoch:
    """What Opacus' tutorial does, but for its loader: batches are drawn from tensors."""

    mode: Literal["hooks", "ew", "functorch", "ghost"]

    def __call__(self, work: Work, turn: Turn) -> None:
        from opacus import PrivacyEngine

        one_thread()
        (inputs, labels), module = work.data(), NET()
        optimiser: Any = torch.optim.SGD(module.parameters(), lr=LR)
        private: tuple[Any, ...] = PrivacyEngine().make_private(
            module=module,
            optimizer=optimiser,
            criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(TensorDataset(inputs, labels), batch_size=BATCH),
            noise_multiplier=NOISE,
            max_grad_norm=MAX_NORM,
            grad_sample_mode=self.mode,
        )
        wrapped, optimiser = private[:2]
        criterion = private[2] if self.mode == "ghost" else nn.CrossEntropyLoss()
        for _ in range(work.num_rounds):
            turn()
            for chosen in drawn(len(labels)):
                optimiser.zero_grad()
                criterion(wrapped(inputs[chosen]), labels[chosen]).backward()
                optimiser.step()


@dataclass(frozen=True)
class EpochByHand:
    """All gradients of a batch at once by ``torch.func``, as its tutorial has it."""

    def __call__(self, work: Work, turn: Turn) -> None:
        one_thread()
        (inputs, labels), module = work.data(), NET()
        params = {name: p.detach().clone() for name, p in module.named_parameters()}

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(module, params, (x[None],)), y[None])

        apart = vmap(grad(loss), in_dims=(None, 0, 0))
        for _ in range(work.num_rounds):
            turn()
            for chosen in drawn(len(labels)):
                rows = apart(params, inputs[chosen], labels[chosen])
                lengths = torch.stack([r.flatten(1).norm(dim=1) for r in rows.values()]).norm(dim=0)
                factors = (MAX_NORM / lengths).clamp(max=1)
                for name, p in params.items():
                    total = torch.tensordot(factors, rows[name], 1)
                    total += NOISE * MAX_NORM * torch.randn_like(p)
                    p -= LR / BATCH * total


def drawn(num: int) -> Iterator[Tensor]:
    """Yield who is in each step of an epoch, by Poisson sampling."""
    num_steps = ceil(num / BATCH)
    for _ in range(num_steps):
        yield (torch.rand(num) < 1 / num_steps).nonzero().flatten()


EPOCHS: dict[str, Sequence[Contender]] = {
    OPEN: [OpenEpoch()],
    OURS: [OurEpoch()],
    GHOST: [OpacusEpoch("ghost")],
    "Opacus, hooks": [OpacusEpoch("hooks")],
    "Opacus, ew": [OpacusEpoch("ew")],
    "Opacus, functorch": [OpacusEpoch("functorch")],
    BY_HAND: [EpochByHand()],
}


@dataclass(frozen=True)
class Shadows:
    """One target and its shadows: each model learns half of all records, ``num_epochs`` times."""

    num_models: int
    num_epochs: int


@dataclass(frozen=True)
class ShadowLoop:
    """PyTorch and nothing else: one of ``of`` processes trains its part of the models."""

    shadows: Shadows
    part: int = 0
    of: int = 1

    def __call__(self, work: Work, turn: Turn) -> None:
        one_thread()
        inputs, labels = work.data()
        for _ in range(work.num_rounds):
            turn()
            for _ in range(self.part, self.shadows.num_models, self.of):
                module, half = NET(), torch.randperm(len(labels))[: len(labels) // 2]
                mine = inputs[half], labels[half]
                for _ in range(self.shadows.num_epochs):
                    train(module, *mine)


@dataclass(frozen=True)
class MeterLoop:
    """What Privacy Meter's ``train_models`` is read to do [1]_: a model after another, by loaders.

    After each epoch it looks at the records that the model did not learn; in the end at all, and
    puts the model to disk.

    .. [1] https://github.com/privacytrustlab/ml_privacy_meter, models/utils.py, trainers.
    """

    shadows: Shadows

    def __call__(self, work: Work, turn: Turn) -> None:
        one_thread()
        records = TensorDataset(*work.data())
        for _ in range(work.num_rounds):
            turn()
            with tempfile.TemporaryDirectory() as folder:
                for number in range(self.shadows.num_models):
                    order = torch.randperm(len(records)).tolist()
                    halves = order[: len(order) // 2], order[len(order) // 2 :]
                    inside, outside = (Subset(records, half) for half in halves)
                    module = self._trained(inside, outside)
                    torch.save(module.state_dict(), Path(folder) / f"{number}.pt")

    def _trained(self, inside: Subset[Any], outside: Subset[Any]) -> nn.Module:
        module = NET()
        optimiser = torch.optim.SGD(module.parameters(), lr=LR)
        learning = DataLoader(inside, batch_size=BATCH_SIZE, shuffle=True)
        others = DataLoader(outside, batch_size=BATCH_SIZE)
        for _ in range(self.shadows.num_epochs):
            module.train()
            hits = total = 0.0
            for inputs, labels in learning:
                optimiser.zero_grad()
                outputs = module(inputs)
                loss = cross_entropy(outputs, labels)
                torch.autograd.backward(loss)
                optimiser.step()
                total += loss.item()
                hits += (outputs.argmax(dim=1) == labels).sum().item()
            _looked_at(module, others)
        _looked_at(module, others)
        _looked_at(module, learning)
        return module


@torch.no_grad()
def _looked_at(module: nn.Module, loader: DataLoader[Any]) -> tuple[float, float]:
    module.eval()
    total = hits = 0.0
    for inputs, labels in loader:
        outputs = module(inputs)
        total += cross_entropy(outputs, labels).item()
        hits += (outputs.argmax(dim=1) == labels).sum().item()
    return total, hits


class _AllTrained(Exception):
    """The last model is there; the attack itself is not timed."""


@dataclass(frozen=True)
class ShadowEngine:
    """An audit by LiRA from its plan to its last model, everything put to disk as ever."""

    shadows: Shadows
    num_processes: int

    def __call__(self, work: Work, turn: Turn) -> None:
        inputs, labels = work.data()
        half = len(labels) // 2
        task = Task(
            name="mnist",
            model=Model(NET),
            clients=Shards(inputs[:half], labels[:half], (0, half)),
            test=(inputs[half:], labels[half:]),
        )
        train = LocalSGD(LR, num_epochs=self.shadows.num_epochs, batch_size=BATCH_SIZE)
        trial = Trial(LiRA(num_shadows=self.shadows.num_models - 1), Membership(2 * half))
        audit = Audit(
            title="shadows",
            task=task,
            federations={"none": Federation(train=train, channel=Plain(), aggregate=Mean())},
            entries={"lira": Entry(trial, (Seat.USER,))},
            num_rounds=1,
            seeds=(0,),
        )
        for _ in range(work.num_rounds):
            turn()
            self._train(audit)

    def _train(self, audit: Audit) -> None:
        num_trained = 0

        def count(event: Event) -> None:
            nonlocal num_trained
            num_trained += event.what in ("training", "shadow")
            if event.what == "failed":
                raise RuntimeError(event.text)
            if num_trained == self.shadows.num_models:
                raise _AllTrained

        with tempfile.TemporaryDirectory() as folder:
            try:
                run_audit(audit, Path(folder), num_jobs=self.num_processes, on_event=count)
            except _AllTrained:
                return
        raise RuntimeError(f"{num_trained} of {self.shadows.num_models} models were trained")


def shadow_trainers(shadows: Shadows) -> dict[str, Sequence[Contender]]:
    return {
        LOOP: [ShadowLoop(shadows)],
        BARE: [ShadowLoop(shadows, 0, 2), ShadowLoop(shadows, 1, 2)],
        ONE: [ShadowEngine(shadows, 1)],
        TWO: [ShadowEngine(shadows, 2)],
        METER: [MeterLoop(shadows)],
    }


def epoch_table(num_examples: int, rounds: Mapping[str, Sequence[Round]]) -> list[str]:
    lines = [
        f"### An epoch of {num_examples:,} examples, {BATCH} in a step",
        "",
        "| | seconds | fastest - slowest | core-seconds | times not private | by core-seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, played in rounds.items():
        seconds = [r.seconds for r in played]
        lines.append(
            f"| {name} | {median(seconds):.2f} | {min(seconds):.2f} - {max(seconds):.2f} | "
            f"{median(r.core_seconds for r in played):.2f} | {gain(rounds, OPEN, name):.2f} | "
            f"{cheaper(rounds, OPEN, name):.2f} |"
        )
    lines.append("")
    for of, most, word in ((GHOST, MOST_OF_GHOST, "promised"), (OPEN, MOST_OF_OPEN, "tried for")):
        taken = gain(rounds, of, OURS)
        lines.append(
            f"- {OURS}: {taken:.2f} times {of}; at most {most:.2f} is {word}: "
            f"{'met' if taken <= most else 'missed'}. By core-seconds it is "
            f"{cheaper(rounds, of, OURS):.2f}."
        )
    return [*lines, ""]


def shadow_table(
    shadows: Shadows, num_records: int, rounds: Mapping[str, Sequence[Round]]
) -> list[str]:
    lines = [
        f"### {shadows.num_models} models of {num_records:,} records, {shadows.num_epochs} epochs",
        "",
        "| | models a minute | seconds | fastest - slowest | core-seconds | "
        "against the plain loop |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, played in rounds.items():
        seconds = [r.seconds for r in played]
        lines.append(
            f"| {name} | {60 * shadows.num_models / median(seconds):,.0f} | "
            f"{median(seconds):.2f} | {min(seconds):.2f} - {max(seconds):.2f} | "
            f"{median(r.core_seconds for r in played):.2f} | {gain(rounds, name, LOOP):.2f} |"
        )
    reached = gain(rounds, TWO, BARE)
    lines += [
        "",
        f"- {TWO}, against {BARE}: {reached:.2f} times as fast; {LEAST_OF_BARE:.2f} is promised: "
        f"{'met' if reached >= LEAST_OF_BARE else 'missed'}. By core-seconds it is "
        f"{cheaper(rounds, TWO, BARE):.2f}.",
    ]
    for name in (BARE, METER):
        lines.append(f"- {name}, against the {LOOP}: {gain(rounds, name, LOOP):.2f} times as fast.")
    return [*lines, ""]


def measure(num_examples: int, shadows: Shadows, num_records: int, repeats: int) -> list[str]:
    """Return the tables as lines of Markdown."""
    before, busy = load(), os.getloadavg()[0] > 0.5
    num_rounds = repeats + WARM_UP + NEVER_PLAYED
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        said = examples(folder)
        held = folder / "examples.safetensors"
        print(f"{len(EPOCHS)} kinds of epochs, {repeats} each ...", file=sys.stderr)
        work = Work(held, 1, num_examples, num_rounds)
        tables = epoch_table(num_examples, race(EPOCHS, work, folder))
        print(f"{shadows.num_models} models, {repeats} times each ...", file=sys.stderr)
        work = Work(held, 2, num_records, num_rounds)
        rounds = race(shadow_trainers(shadows), work, folder)
        tables += shadow_table(shadows, num_records, rounds)
    size = sum(p.numel() for p in NET().parameters())
    facts = [
        f"- Machine: {machine()}, opacus {version('opacus')}.",
        f"- Data: {said}; model: LeNet-5, {size:,} parameters.",
        f"- Turns of each contender: {repeats}, after {WARM_UP} to warm up; medians.",
        f"- Load (1, 5, 15 minutes) before: {before}; after: {load()}.",
    ]
    if busy:
        facts.append("- The machine was busy with other work: seconds say little, ratios more.")
    return [*facts, "", *tables]


PREFACE = f"""{PRIVATE}

What DP-SGD costs beside the same epoch without it, and how fast shadow models are trained. `python
-m benchmarks.private` prints these tables; `--write` puts them here.

Every contender has a process of one thread (the last two processes have two), and takes its turn.
Ratios are medians of the ratios within a turn; core-seconds change least on a busy machine.

- *Turncoat* is `DPSGD` as a client's round has it: checks, draws and noise of its own generator.
- *Opacus* is `make_private` with its module, optimiser and criterion; batches are drawn from
  tensors, without its loader, which would only slow it down.
- *vmap(grad) loop*: `torch.func` by hand.

Shadow models are those of an audit by LiRA, from its plan to its last model, all of them put to
disk; the attack itself is left out.

- *plain loop*: an `nn.Module` and `torch.optim.SGD`, model after model; *two bare loops*: half of
  the models each, the floor under any two processes.
- *Privacy Meter's loop, as described*: PyPI has 1.0.1 of 2023 and not the repository of 2025, so
  its `train_models` is written anew from what it is read to do: loaders, a look at the other
  records after each epoch, a file for each model. It is no measurement of their code.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.private", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns each")
    parser.add_argument("--examples", type=int, default=60_000, help="of an epoch, at most 60,000")
    parser.add_argument("--models", type=int, default=32, help="a target and its shadows")
    parser.add_argument("--records", type=int, default=1_000, help="that each model learns")
    parser.add_argument("--epochs", type=int, default=10, help="of each model")
    parser.add_argument("--quick", action="store_true", help="5,120 examples, 8 models, 3 turns")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    chosen = parser.parse_args(arguments)
    for name, least in (("repeats", 1), ("examples", 1), ("models", 3), ("records", 2)):
        if getattr(chosen, name) < least:
            parser.error(f"--{name} must be at least {least}; it is {getattr(chosen, name)}")
    if chosen.quick:
        chosen.examples, chosen.models, chosen.repeats = 5_120, 8, 3
    lines = measure(
        chosen.examples, Shadows(chosen.models, chosen.epochs), chosen.records, chosen.repeats
    )
    print("\n".join(lines))
    if chosen.write:
        command = " ".join(["python -m benchmarks.private", *(arguments or sys.argv[1:])])
        head = f"## {date.today().isoformat()}: `{command}`"
        write_part(PRIVATE, "\n".join([PREFACE, head, "", *lines]))


if __name__ == "__main__":
    main()
