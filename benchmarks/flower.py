"""The same bits on every engine, what a round costs on each, and what is sent where.

    python -m benchmarks.flower                      # all: about six minutes on two cores
    python -m benchmarks.flower --only bits cost     # or some of: bits cost sent
    python -m benchmarks.flower --no-deployment

*bits*: `benchmarks/flower.toml`, five rounds in `simulate`, as a Flower app in process, in Flower's
simulation on Ray, and on a SuperLink and five SuperNodes over TLS on loopback; the SHA-256 of the
final model. *cost*: LeNet-5 and 20 clients, rounds of `simulate` and of Flower in process taking
turns. *sent*: every address that any of the processes connects to, as `strace` sees it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from turncoat.brought import import_file
from turncoat.config import load
from turncoat.federation import Federation, Plain
from turncoat.runtimes.flower.engines import hush, in_process, on_ray
from turncoat.runtimes.flower.export import export
from turncoat.runtimes.simulate import Run, simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "deployment"
FILE = Path(__file__).with_suffix(".toml")
ATTACK = "alie"
PROMISED = 2.0  # in-process rounds cost at most so many times those of simulate
WARM_UP = 1

Engine = Callable[..., Run]


def bits(with_deployment: bool) -> list[str]:
    """Return the table of the engines: seconds a round, and the final model's hash."""
    audit = load(FILE)
    coalition = audit.entries[ATTACK].trial.coalition
    engines: dict[str, Engine] = {
        "simulate, 1 process": simulate,
        "simulate, 2 processes": partial(simulate, num_processes=2),
        "Flower in process": in_process,
        "Flower's simulation (Ray, 2 workers)": partial(on_ray, num_processes=2),
    }
    rows: list[tuple[str, list[float], str]] = []
    for name, play in engines.items():
        say(f"{name} ...")
        run = play(
            audit.federations["none"],
            audit.task,
            num_rounds=audit.num_rounds,
            seed=0,
            coalition=coalition,
        )
        rows.append((name, [p.seconds for p in run.log], sha256(run)))
    if with_deployment:
        say("deployment ...")
        record = deployed(FILE, ATTACK, len(audit.task.clients))
        seconds = [p["seconds"] for p in record["rounds"]]
        rows.append(("SuperLink and 5 SuperNodes, TLS", seconds, record["sha256"]))
    lines = [
        "| engine | first round, s | later rounds, median s | SHA-256 of the final model |",
        "|---|---:|---:|---|",
    ]
    for name, seconds, digest in rows:
        later = median(seconds[1:])
        lines.append(f"| {name} | {seconds[0]:.2f} | {later:.2f} | `{digest}` |")
    same = len({digest for *_, digest in rows}) == 1
    return [
        *lines,
        "",
        f"- Equal to the byte on all {len(rows)} engines: {'yes' if same else 'NO'}.",
    ]


def deployed(file: Path, attack: str, num_nodes: int, num_rounds: int = 0) -> dict[str, Any]:
    """Return what `run.json` says of a file's rounds on a deployment of this machine."""
    deploy: Any = import_file(EXAMPLE / "deploy.py")
    with tempfile.TemporaryDirectory() as folder:
        there = deploy.Deployment(Path(folder), num_nodes)
        try:
            there.up()
            export(file, Path(folder) / "app")
            record: dict[str, Any] = there.run(
                Path(folder) / "app",
                Path(folder) / "out",
                {"attack": attack, "rounds": num_rounds},
                1200.0,
            )
            return record
        finally:
            there.down()


def cost(repeats: int) -> list[str]:
    """Return what a round costs in process, against `simulate` in one process; Ray beside it."""
    federation: Federation[Any, Any] = Federation(
        train=LocalSGD(0.05, num_epochs=1, batch_size=32), channel=Plain(), aggregate=Mean()
    )
    lines = [
        "| LeNet-5, 20 clients | simulate, s | Flower in process, s | ratio "
        "| simulate, 2 processes, s | Ray, 2 workers, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    verdicts = []
    for name, task in tasks().items():
        say(f"{name} ...")
        turns: dict[str, list[float]] = {"simulate": [], "flower": []}
        state = None
        rounds = repeats + WARM_UP
        for t in range(rounds):
            for key, play in (("simulate", simulate), ("flower", in_process)):
                run = play(federation, task, num_rounds=rounds, seed=0, state=state, until=t + 1)
                turns[key].append(run.log[0].seconds)
            state = run.state
        two, ray = (
            [p.seconds for p in play(federation, task, num_rounds=rounds, seed=0).log]
            for play in (partial(simulate, num_processes=2), partial(on_ray, num_processes=2))
        )
        slow, fast = turns["flower"][WARM_UP:], turns["simulate"][WARM_UP:]
        ratio = median(s / f for s, f in zip(slow, fast, strict=True))
        lines.append(
            f"| {name} | {median(fast):.3f} | {median(slow):.3f} | {ratio:.2f} | "
            f"{median(two[WARM_UP:]):.3f} | {median(ray[WARM_UP:]):.3f} |"
        )
        met = "met" if ratio <= PROMISED else "missed"
        verdicts.append(f"- {name}: {ratio:.2f} times; {PROMISED:g} was promised: {met}.")
    return [*lines, "", *verdicts]


def tasks() -> dict[str, Task]:
    found = {"digits, 45 examples each": digits(20)}
    home = Path(os.environ.get("TURNCOAT_DATA") or ROOT.parent / "shared" / "data")
    if (home / "mnist").exists():
        from turncoat.tasks.fetched import mnist

        found["MNIST, 600 examples each"] = mnist(20, per_client=600, data=str(home))
    return found


def sent(with_deployment: bool) -> list[str]:
    """Return every address that a run of each engine connects to."""
    if shutil.which("strace") is None:
        return ["- strace is not installed: nothing was watched."]
    whole = {"in process and on Ray": "bits --no-deployment"}
    if with_deployment:
        whole["deployment, up to down"] = "deployment"
    lines = ["| run | connections beyond the machine | on loopback | by a file's name (unix) |"]
    lines.append("|---|---:|---:|---:|")
    for name, command in whole.items():  # strace slows a deployment down by much
        say(f"strace: {name} ...")
        seen = destinations([sys.executable, "-m", "benchmarks.flower", "--only", *command.split()])
        beyond = {k: n for k, n in seen.items() if k not in ("loopback", "unix")}
        told = "; ".join(f"{n} x {k}" for k, n in beyond.items()) or "none"
        lines.append(f"| {name} | {told} | {seen['loopback']} | {seen['unix']} |")
    return lines


def destinations(command: Sequence[str]) -> Counter[str]:
    """Run a command; return what it and its children connected to or sent datagrams to."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        watch = ["strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg"]
        subprocess.run([*watch, "-o", str(log), *command], check=True, cwd=ROOT, stdout=sys.stderr)
        for line in log.read_text(errors="replace").splitlines():
            family = re.search(r"sa_family=AF_(\w+)", line)
            if family is None or family[1] in ("NETLINK", "UNSPEC"):
                continue  # a socket that is connected already, or the kernel
            if family[1] in ("UNIX", "LOCAL"):
                seen["unix"] += 1
                continue
            where = re.search(r'inet_(?:addr\(|pton\(AF_INET6, )"([^"]+)"', line)
            host = where[1] if where else family[1]
            near = host in ("::1", "0.0.0.0", "::") or host.removeprefix("::ffff:").startswith(
                "127."
            )
            port = re.search(r"port=htons\((\d+)\)", line)
            call = line.split("(")[0].split()[-1]
            seen["loopback" if near else f"{call} {host}:{port[1] if port else '?'}"] += 1
    return seen


def sha256(run: Run) -> str:
    return hashlib.sha256(run.state.params.cpu().numpy().tobytes()).hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flower", description=__doc__)
    kinds = ["bits", "cost", "sent", "deployment"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds[:3])
    parser.add_argument("--repeats", type=int, default=8, help="timed rounds each")
    parser.add_argument("--no-deployment", action="store_true")
    chosen = parser.parse_args(arguments)
    hush()
    parts: dict[str, Callable[[], list[str]]] = {
        "bits": lambda: bits(not chosen.no_deployment),
        "cost": lambda: cost(chosen.repeats),
        "sent": lambda: sent(not chosen.no_deployment),
        "deployment": lambda: [
            json.dumps(deployed(EXAMPLE / "three.toml", "sign-flip", 3, 1)["rounds"])
        ],
    }
    for name in chosen.only:
        print("\n".join([f"## {name}", "", *parts[name](), ""]), flush=True)


if __name__ == "__main__":
    main()
