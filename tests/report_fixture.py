"""Folders as an audit leaves them, with made-up figures: for the report's tests and its design."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

DEFENCES = {
    "none": (1.0, 0.972, "the federation as it is"),
    "dp-8": (0.10, 0.914, "DP-SGD, ε = 8"),
    "clipping": (0.82, 0.969, "updates clipped"),
    "masks": (0.95, 0.972, "secure aggregation"),
    "median": (0.45, 0.958, "coordinate-wise median"),
    "krum": (0.35, 0.941, "Multi-Krum"),
    "norm-bound": (0.22, 0.967, "updates no longer than 2 medians"),
}
SERVER = "{who} rebuilds training images to a PSNR of {value} (95 % interval {interval}); the mean image alone has {baseline}."
MEMBER = "{who} tells members from others with an AUC of {value} (95 % interval {interval}), where guessing has {baseline}."
ATTACKS: dict[str, tuple[str, list[str], str, str, float, float, str]] = {
    "inverting-gradients": ("inversion", ["server"], "psnr", "dB", 11.2, 40.0, SERVER),
    "loss-threshold": ("membership", ["client", "user"], "auc", "", 0.5, 1.0, MEMBER),
    "lira": ("membership", ["server", "user"], "auc", "", 0.5, 1.0, MEMBER),
    "label-flip": ("poisoning", ["coalition"], "accuracy", "", 0.97, 0.0, "{who} brings the accuracy down to {value} (95 % interval {interval}) from {baseline}."),
    "sign-flip": ("poisoning", ["coalition"], "accuracy", "", 0.97, 0.0, "{who} brings the accuracy down to {value} (95 % interval {interval}) from {baseline}."),
    "alie": ("poisoning", ["coalition"], "accuracy", "", 0.97, 0.0, "{who} brings the accuracy down to {value} (95 % interval {interval}) from {baseline}."),
    "model-replacement": ("backdoor", ["coalition"], "attack_success_rate", "", 0.012, 1.0, "{who} makes {value} (95 % interval {interval}) of images with its trigger the class of its choice; {baseline} are without the attack."),
    "trace": ("sidechannel", ["neighbour"], "auc", "", 0.5, 1.0, MEMBER),
}
_STRENGTH = {"inverting-gradients": 0.5, "loss-threshold": 0.14, "lira": 0.34, "label-flip": 0.03, "sign-flip": 0.6, "alie": 0.2, "model-replacement": 0.96, "trace": 0}  # fmt: skip


def write_audit(
    folder: Path,
    *,
    seeds: int = 3,
    num_clients: int = 10,
    images: bool = True,
    title: str = "Digits among ten clinics",
    defences: list[str] | None = None,
    attacks: list[str] | None = None,
    rounds: int = 20,
) -> Path:
    """Fill ``folder`` with an audit of digits: figures are invented, pictures are real."""
    rng = np.random.default_rng(0)
    (folder / "cells").mkdir(parents=True)
    defences, attacks = defences or list(DEFENCES), attacks or list(ATTACKS)
    counts = rng.dirichlet([1.0] * 10, num_clients) * 143
    label_counts = counts.round().astype(int).tolist()
    plan: dict[str, Any] = {
        "schema_version": 1,
        "turncoat": "0.1.0",
        "title": title,
        "rounds": rounds,
        "seeds": list(range(seeds)),
        "config_sha256": "9f2c" * 16,
        "task": {
            "name": "digits", "source": "scikit-learn, UCI optical digits", "classes": [str(i) for i in range(10)],
            "client_names": [f"client {i}" for i in range(num_clients)], "num_params": 5142,
            "image_shape": [1, 8, 8], "sizes": [sum(row) for row in label_counts],
            "label_counts": label_counts, "num_test": 360, "metric": "accuracy",
        },
        "coalition": {"text": f"clients 0 and 1 of {num_clients}", "members": [0, 1]},
        "defences": [_defence(name) for name in defences],
        "attacks": [
            {"name": n, "family": ATTACKS[n][0], "text": f"{n.title().replace('-', '')}()", "game": "Game()",
             "says": ATTACKS[n][6], "seats": ATTACKS[n][1], "needs": "ModelView or QueryView"}
            for n in attacks
        ],
        "versions": {"python": "3.11.2", "torch": "2.13.0", "turncoat": "0.1.0"},
        "machine": {"cores": 2, "system": "Linux"},
        "command": "turncoat audit digits.toml --out audits/digits",
        "delta": 1e-5,
    }  # fmt: skip
    digits = load_digits().images.astype(np.float32)[:, None] / 16
    cells: list[dict[str, Any]] = []
    for defence in defences:
        for attack in attacks:
            for seat in ATTACKS[attack][1]:
                for seed in range(seeds):
                    cells.append(_cell(folder, defence, attack, seat, seed, digits if images else None, rng))
    trainings = [
        _training(defence, attack, seed, rounds, num_clients, rng)
        for defence in defences
        for attack in [None, *(a for a in attacks if ATTACKS[a][1] == ["coalition"])]
        for seed in range(seeds)
    ]
    rewrite(folder, "plan.json", plan)
    rewrite(folder, "cells.jsonl", cells)
    rewrite(folder, "trainings.jsonl", trainings)
    (folder / "config.toml").write_text('title = "Digits"\n[task]\nuse = "digits"\n', encoding="utf-8")
    return folder


def rewrite(folder: Path, name: str, content: Any) -> None:
    """Write JSON, or lines of it."""
    rows = content if name.endswith("l") else [content]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def _defence(name: str) -> dict[str, Any]:
    private = {"kind": "private", "unit": "record", "epsilon": 8.0, "delta": 1e-5,
               "against": ["client", "server", "user"], "text": "ε = 8 at δ = 1e-05 for each record"}  # fmt: skip
    sent = "Masked" if name == "masks" else "Update"
    return {
        "name": name,
        "title": DEFENCES[name][2],
        "stages": {"train": "LocalSGD(lr=0.1)", "channel": "Plain()", "aggregate": "Mean()"},
        "changed": [] if name == "none" else ["channel" if name == "masks" else "train"],
        "guarantees": [private] if name == "dp-8" else [],
        "sees": {"server": [f"ServerView[{sent}]"], "client": ["ClientView[Update]", "AggregateView[Update]"],
                 "coalition": ["CoalitionView[Update]"], "user": ["ModelView"], "neighbour": []},
        "simulated": ["SecureAggregation: the algebra of the pads, no key agreement"] if name == "masks" else [],
    }  # fmt: skip


def _cell(folder: Path, defence: str, attack: str, seat: str, seed: int, digits: Any, rng: Any) -> dict[str, Any]:
    family, _, metric, unit, baseline, worst, _ = ATTACKS[attack]
    key = f"{defence}-{attack}-{seat}-{seed}".encode().hex()[:40]
    row: dict[str, Any] = dict.fromkeys(
        ("metric", "unit", "value", "baseline", "low", "high", "worst", "success", "beats_baseline", "reason", "error", "exhibits")
    ) | {"schema_version": 1, "key": key, "defence": defence, "attack": attack, "family": family,
         "seat": seat, "seed": seed, "seconds": float(rng.uniform(1, 9))}  # fmt: skip
    reads = {"inverting-gradients": "ServerView[Clear]", "trace": "TraceView"}
    if attack == "trace" or (defence == "masks" and seat == "server" and attack == "inverting-gradients"):
        sees = "ServerView[Masked]" if seat == "server" else "nothing"
        return row | {"status": "blocked", "reason": f"{attack} needs {reads[attack]}; the {seat} sees {sees}"}
    if defence == "krum" and attack == "alie":
        return row | {"status": "failed", "error": "Krum(num_byzantine=3) needs at least 9 updates (2f + 3); the cohort has 8"}
    success = _STRENGTH[attack] * DEFENCES[defence][0] * (1 + 0.08 * rng.normal())
    if family == "poisoning":
        baseline = DEFENCES[defence][1]
    value = baseline + success * (worst - baseline)
    half = 0.6 if unit else 0.02
    row |= {"status": "scored", "metric": metric, "unit": unit, "value": value, "baseline": baseline,
            "low": value - half, "high": value + half, "worst": worst, "success": max(0.0, success),
            "beats_baseline": abs(value - baseline) > half}  # fmt: skip
    exhibits: dict[str, Any] = {}
    if family == "membership":
        row |= {"tpr_at_0.01": 0.01 + success / 3, "tpr_at_0.01_baseline": 0.01, "tpr_at_0.01_low": 0.0, "tpr_at_0.01_high": 0.02 + success / 2}
        members = np.sort(rng.normal(2.5 * success, 1 + success, 400))[::-1]
        others = np.sort(rng.normal(0, 1, 400))[::-1]
        cut = np.sort(np.concatenate([members, others]))[::-1]
        exhibits["roc_fpr"] = np.array([0.0, *[(others >= c).mean() for c in cut]], dtype=np.float32)
        exhibits["roc_tpr"] = np.array([0.0, *[(members >= c).mean() for c in cut]], dtype=np.float32)
    if family == "inversion" and digits is not None:
        chosen = digits[seed * 10 : seed * 10 + 8]
        noisy = chosen * min(1, 1.6 * success) + rng.normal(0, 0.12 + 0.5 * (0.5 - success), chosen.shape)
        exhibits |= {"originals": chosen, "reconstructions": np.clip(noisy, 0, 1).astype(np.float32),
                     "mean_image": digits.mean(0), "labels": load_digits().target[seed * 10 : seed * 10 + 8]}  # fmt: skip
    if family == "backdoor" and digits is not None:
        stamped = digits[:6].copy()
        stamped[:, :, -2:, -2:] = 1.0
        exhibits["triggered"] = stamped
    if exhibits:
        row["exhibits"] = f"cells/{key}.safetensors"
        save_file({k: np.ascontiguousarray(v) for k, v in exhibits.items()}, folder / row["exhibits"])
    return row


def _training(defence: str, attack: str | None, seed: int, rounds: int, num_clients: int, rng: Any) -> dict[str, Any]:
    top = DEFENCES[defence][1] * (1 - (_STRENGTH[attack] * DEFENCES[defence][0] * (0.1 if attack == "model-replacement" else 1) if attack else 0))
    curve = top - (top - 0.1) * np.exp(-np.arange(1, rounds + 1) / 4) + rng.normal(0, 0.006, rounds)
    incident = {"round": 3, "client": 4, "what": "sent NaN; left out of its round"}
    return {
        "defence": defence, "attack": attack, "seed": seed, "metric": "accuracy",
        "history": np.clip(curve, 0, 1).round(4).tolist(),
        "seconds_per_round": (rng.uniform(0.9, 1.1, rounds) * (0.21 if defence == "dp-8" else 0.08)).round(4).tolist(),
        "bytes_up": 20568, "bytes_down": 20568, "cohort": [num_clients] * rounds,
        "incidents": [incident] if defence == "clipping" and seed == 1 and attack is None else [],
        "left_out": 1 if defence == "clipping" else 0, "aborted_rounds": 0, "status": "done", "error": None,
    }  # fmt: skip
