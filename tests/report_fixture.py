"""Folders as an audit leaves them, with made-up figures: for the report's tests and its design."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from safetensors.numpy import save_file
from sklearn.datasets import load_digits


class Defence(NamedTuple):
    lets_through: float
    accuracy: float
    title: str


class Attack(NamedTuple):
    family: str
    seats: list[str]
    needs: str
    metric: str
    baseline: float
    worst: float
    strength: float
    says: str


DEFENCES = {
    "none": Defence(1.0, 0.972, "the federation as it is"),
    "dp-8": Defence(0.10, 0.914, "DP-SGD, ε = 8"),
    "clipping": Defence(0.82, 0.969, "updates clipped"),
    "masks": Defence(0.95, 0.972, "secure aggregation"),
    "median": Defence(0.45, 0.958, "coordinate-wise median"),
    "krum": Defence(0.35, 0.941, "Multi-Krum"),
    "norm-bound": Defence(0.22, 0.967, "updates no longer than 2 medians"),
}
REBUILDS = "{who} rebuilds images to a PSNR of {value} {interval}; the mean image has {baseline}."
TELLS = "{who} tells members from others: AUC {value} {interval}, where guessing has {baseline}."
BREAKS = "{who} brings the accuracy down to {value} {interval} from {baseline}."
PLANTS = "{who} has {value} {interval} of triggered images taken for its class, not {baseline}."
MODEL, JOIN, COALITION = "ModelView or QueryView", "to take part", ["coalition"]
ATTACKS = {
    "inverting-gradients": Attack(
        "inversion", ["server"], "ServerView[Update]", "psnr", 11.2, 40.0, 0.5, REBUILDS
    ),
    "loss-threshold": Attack("membership", ["client", "user"], MODEL, "auc", 0.5, 1.0, 0.14, TELLS),
    "lira": Attack("membership", ["user"], MODEL, "auc", 0.5, 1.0, 0.34, TELLS),
    "label-flip": Attack("poisoning", COALITION, JOIN, "accuracy", 0.97, 0.0, 0.03, BREAKS),
    "sign-flip": Attack("poisoning", COALITION, JOIN, "accuracy", 0.97, 0.0, 0.6, BREAKS),
    "alie": Attack("poisoning", COALITION, JOIN, "accuracy", 0.97, 0.0, 0.2, BREAKS),
    "model-replacement": Attack(
        "backdoor", COALITION, JOIN, "attack_success_rate", 0.012, 1.0, 0.96, PLANTS
    ),
    "trace": Attack("sidechannel", ["neighbour"], "TraceView", "auc", 0.5, 1.0, 0.0, TELLS),
}


def write_audit(
    folder: Path,
    *,
    num_seeds: int = 3,
    num_clients: int = 10,
    num_rounds: int = 20,
    defences: tuple[str, ...] = tuple(DEFENCES),
    attacks: tuple[str, ...] = tuple(ATTACKS),
    images: bool = True,
) -> Path:
    """Fill ``folder`` with an audit of digits: figures are invented, pictures are real."""
    rng, seeds = np.random.default_rng(0), range(num_seeds)
    (folder / "cells").mkdir(parents=True)
    pictures = (load_digits().images[:, None] / 16).astype(np.float32) if images else None
    write_json(folder / "plan.json", _plan(num_clients, num_rounds, num_seeds, defences, attacks))
    cells = [
        _cell(folder, defence, attack, seat, seed, pictures, rng)
        for defence in defences
        for attack in attacks
        for seat in ATTACKS[attack].seats
        for seed in seeds
    ]
    write_rows(folder / "cells.jsonl", cells)
    active = [None, *(a for a in attacks if ATTACKS[a].needs == JOIN)]
    trainings = [
        _training(d, a, seed, num_rounds, num_clients, rng)
        for d in defences
        for a in active
        for seed in seeds
    ]
    write_rows(folder / "trainings.jsonl", trainings)
    (folder / "config.toml").write_text('title = "Digits"  # 10 % <of> it\n', encoding="utf-8")
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _plan(
    num_clients: int,
    num_rounds: int,
    num_seeds: int,
    defences: tuple[str, ...],
    attacks: tuple[str, ...],
) -> dict[str, Any]:
    shares = np.random.default_rng(1).dirichlet([1.0] * 10, num_clients)
    counts = (shares * 143).round().astype(int).tolist()
    return {
        "schema_version": 1,
        "turncoat": "0.1.0",
        "title": "Digits among ten clinics",
        "rounds": num_rounds,
        "seeds": list(range(num_seeds)),
        "config_sha256": "9f2c" * 16,
        "task": {
            "name": "digits",
            "source": "UCI optical digits, scikit-learn's copy; CC BY 4.0",
            "classes": [str(i) for i in range(10)],
            "client_names": [f"client {i}" for i in range(num_clients)],
            "num_params": 5142,
            "image_shape": [1, 8, 8],
            "sizes": [sum(row) for row in counts],
            "label_counts": counts,
            "num_test": 360,
            "metric": "accuracy",
        },
        "coalition": {"text": f"clients 0 and 1 of {num_clients}", "members": [0, 1]},
        "defences": [_defence(name) for name in defences],
        "attacks": [
            {
                "name": name,
                "family": ATTACKS[name].family,
                "text": f"{name.title().replace('-', '')}()",
                "game": "Game()",
                "says": ATTACKS[name].says,
                "seats": ATTACKS[name].seats,
                "needs": ATTACKS[name].needs,
            }
            for name in attacks
        ],
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "machine": {"cores": 2, "system": "Linux"},
        "command": "turncoat audit digits.toml --out audits/digits",
        "delta": 1e-5,
    }


def _defence(name: str) -> dict[str, Any]:
    masks = name == "masks"
    epsilon = {
        "kind": "private",
        "unit": "record",
        "epsilon": 8.0,
        "delta": 1e-5,
        "against": ["client", "server", "user"],
        "text": "ε = 8 at δ = 1e-05 for each record",
    }
    return {
        "name": name,
        "title": DEFENCES[name].title,
        "stages": {"train": "LocalSGD(lr=0.1)", "channel": "Plain()", "aggregate": "Mean()"},
        "changed": [] if name == "none" else ["channel" if masks else "train"],
        "guarantees": [epsilon] if name == "dp-8" else [],
        "sees": {
            "server": ["ServerView[Masked]" if masks else "ServerView[Update]", "ModelView"],
            "client": ["ClientView[Update]", "AggregateView[Update]", "ModelView"],
            "coalition": ["CoalitionView[Update]"],
            "user": ["ModelView"],
            "neighbour": [],
        },
        "simulated": ["SecureAggregation: the pads' algebra, no key agreement"] * masks,
    }


def _cell(
    folder: Path, defence: str, attack: str, seat: str, seed: int, pictures: Any, rng: Generator
) -> dict[str, Any]:
    about = ATTACKS[attack]
    key = f"{defence}-{attack}-{seat}-{seed}".encode().hex()
    empty = ("metric", "unit", "value", "baseline", "low", "high", "worst", "success")
    row: dict[str, Any] = {
        "schema_version": 1,
        "key": key,
        "defence": defence,
        "attack": attack,
        "family": about.family,
        "seat": seat,
        "seed": seed,
        "status": "scored",
        **dict.fromkeys((*empty, "beats_baseline", "reason", "error", "exhibits")),
        "seconds": float(rng.uniform(1, 9)),
    }
    if attack == "trace" or (defence == "masks" and attack == "inverting-gradients"):
        sees = "ServerView[Masked], ModelView" if seat == "server" else "nothing"
        reason = f"{attack} needs {about.needs}; the {seat} sees {sees}"
        return row | {"status": "blocked", "reason": reason}
    if defence == "krum" and attack == "alie":
        error = "Krum(num_byzantine=3) needs at least 9 updates (2f + 3); the cohort has 8"
        return row | {"status": "failed", "error": error}
    success = about.strength * DEFENCES[defence].lets_through * (1 + 0.08 * rng.normal())
    success = min(1.0, max(0.0, success))
    baseline = DEFENCES[defence].accuracy if about.family == "poisoning" else about.baseline
    value = baseline + success * (about.worst - baseline)
    half = 0.6 if about.metric == "psnr" else 0.02
    row |= {
        "metric": about.metric,
        "unit": "dB" if about.metric == "psnr" else "",
        "value": value,
        "baseline": baseline,
        "low": value - half,
        "high": value + half,
        "worst": about.worst,
        "success": success,
        "beats_baseline": abs(value - baseline) > half,
    }
    if about.family == "membership":
        tpr = 0.01 + success / 3
        row |= {"tpr_at_1pct_fpr": tpr, "tpr_at_1pct_fpr_baseline": 0.01}
        row |= {"tpr_at_1pct_fpr_low": tpr / 2, "tpr_at_1pct_fpr_high": 2 * tpr}
    if shown := _exhibits(about.family, success, seed, pictures, rng):
        row["exhibits"] = f"cells/{key}.safetensors"
        tensors = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in shown.items()}
        save_file(tensors, folder / row["exhibits"])
    return row


def _exhibits(
    family: str, success: float, seed: int, pictures: Any, rng: Generator
) -> dict[str, Any]:
    if family == "membership":
        members, others = rng.normal(2.5 * success, 1 + success, 400), rng.normal(0, 1, 400)
        cuts = np.sort(np.concatenate([members, others, [np.inf]]))[::-1, None]
        return {"roc_fpr": (others >= cuts).mean(1), "roc_tpr": (members >= cuts).mean(1)}
    if family == "inversion" and pictures is not None:
        originals = pictures[8 * seed : 8 * seed + 8]
        noise = rng.normal(0, 0.12 + 0.5 * abs(0.5 - success), originals.shape)
        guessed = np.clip(originals * min(1, 1.6 * success) + noise, 0, 1)
        labels = load_digits().target[8 * seed : 8 * seed + 8]
        mean = pictures.mean(0, keepdims=True)
        likeness = -10 * np.log10(((guessed - originals) ** 2).mean(axis=(1, 2, 3)))
        return {
            "originals": originals,
            "reconstructions": guessed,
            "mean_image": mean,
            "labels": labels,
            "psnr": likeness,
            "identified": (likeness > 10).astype(np.uint8),
            "decoys": pictures[100 : 100 + len(originals)],
            "prior_only": np.full_like(originals, 0.5),
        }
    if family == "backdoor" and pictures is not None:
        stamped = pictures[:6].copy()
        stamped[:, :, -2:, -2:] = 1.0
        return {"triggered": stamped}
    return {}


def _training(
    defence: str, attack: str | None, seed: int, num_rounds: int, num_clients: int, rng: Generator
) -> dict[str, Any]:
    lost = ATTACKS[attack].strength * DEFENCES[defence].lets_through if attack else 0.0
    top = DEFENCES[defence].accuracy * (1 - lost * (0.1 if attack == "model-replacement" else 1))
    curve = top - (top - 0.1) * np.exp(-np.arange(1, num_rounds + 1) / 4)
    odd = defence == "clipping" and seed == 1 and attack is None
    seconds = rng.uniform(0.9, 1.1, num_rounds) * (0.21 if defence == "dp-8" else 0.08)
    return {
        "schema_version": 1,
        "defence": defence,
        "attack": attack,
        "seed": seed,
        "metric": "accuracy",
        "history": np.clip(curve + rng.normal(0, 0.006, num_rounds), 0, 1).tolist(),
        "seconds_per_round": seconds.tolist(),
        "bytes_up": 20568,
        "bytes_down": 20568,
        "cohort": [num_clients] * num_rounds,
        "incidents": [{"round": 3, "client": 4, "what": "sent NaN; left out of its round"}] * odd,
        "left_out": int(odd),
        "aborted_rounds": 0,
        "status": "done",
        "error": None,
    }
