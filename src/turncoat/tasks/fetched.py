"""Public data sets: a local copy if one is named, their public home otherwise."""

from __future__ import annotations

import os
import tarfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turncoat.task import Task
from turncoat.tasks.images import arrays, decoded, holds_parquet, read_hub, read_npz, read_parquet
from turncoat.tasks.models import MLP, Architecture, LeNet5
from turncoat.tasks.partitions import IID, ByColumn, Partition
from turncoat.tasks.pool import Pool, Split, federate
from turncoat.tasks.sources import (
    DataUnusable,
    cache,
    download,
    has_hash,
    local,
    missing,
)

_IID = IID()
_LENET = LeNet5()
_MLP = MLP(hidden=(16,))
_CENTRES = ByColumn("centre")
_PLACES = ("cleveland", "hungarian", "switzerland", "va")
_MEASURED = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal"),
)


def mnist(
    num_clients: int | None = 20,
    *,
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    public_size: int = 500,
    data: str | Path | None = None,
    seed: int = 0,
) -> Task:
    """Return MNIST: 60,000 handwritten digits of 28x28 pixels, and 10,000 for tests."""
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    said = "MNIST, Yann LeCun, Corinna Cortes, Christopher Burges; CC BY-SA 3.0"
    return federate(_hub("mnist", "ylecun/mnist", "image", data, said), split, model)


def fashion_mnist(
    num_clients: int | None = 20,
    *,
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    public_size: int = 500,
    data: str | Path | None = None,
    seed: int = 0,
) -> Task:
    """Return Fashion-MNIST: 60,000 articles of 28x28 pixels, and 10,000 for tests."""
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    said = "Fashion-MNIST, Zalando SE; MIT"
    pool = _hub("fashion_mnist", "zalando-datasets/fashion_mnist", "image", data, said)
    return federate(pool, split, model)


def cifar10(
    num_clients: int | None = 20,
    *,
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    public_size: int = 500,
    data: str | Path | None = None,
    seed: int = 0,
) -> Task:
    """Return CIFAR-10: 50,000 photographs of 32x32 pixels, and 10,000 for tests."""
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    said = "CIFAR-10, Alex Krizhevsky; no licence stated, research use"
    return federate(_hub("cifar10", "uoft-cs/cifar10", "img", data, said), split, model)


def pneumoniamnist(
    num_clients: int | None = 3,
    *,
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    public_size: int = 100,
    data: str | Path | None = None,
    seed: int = 0,
) -> Task:
    """Return PneumoniaMNIST: 4,708 chest X-rays of 28x28 pixels, and 624 for tests.

    The 524 validation images are left alone.
    """
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    names, md5 = ["pneumoniamnist.npz"], "28209eda62fecd6e6a2d98b1501bb15f"
    path = local(names, data, holds=_is_file(names))
    if path is None:
        url = "https://zenodo.org/records/10519652/files/pneumoniamnist.npz?download=1"
        path = download("PneumoniaMNIST", url, f"md5:{md5}", names)
    said = "PneumoniaMNIST (MedMNIST v2); CC BY 4.0"
    if not has_hash(path, md5):
        said += "; a local copy that is not the published file"
    classes = ("normal", "pneumonia")
    return federate(
        read_npz(path, name="pneumoniamnist", classes=classes, source=said), split, model
    )


def mednist(
    num_clients: int | None = 6,
    *,
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = 4500,
    test_size: int | None = 600,
    public_size: int = 100,
    data: str | Path | None = None,
    seed: int = 0,
) -> Task:
    """Return MedNIST: medical images of 64x64 pixels in six classes, 4,500 of them to the clients.

    The published archive has 58,954 images and no test set; the local subset has 4,800 + 600.
    """
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    names = ["mednist_64_subset.npz", "mednist.npz", "MedNIST.tar.gz"]
    path = local(names, data, holds=_is_file(names))
    if path is None:
        url = (
            "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
            "MedNIST.tar.gz"
        )
        md5 = "0bc7306e7427e00ad1c5526a6677552d"
        path = download("MedNIST", url, f"md5:{md5}", ["MedNIST.tar.gz"])
    if path.name.endswith(".tar.gz"):
        path = _unpacked(path)
    said = "MedNIST, gathered by B. J. Erickson (Mayo Clinic), in MONAI's archive; CC BY-SA 4.0"
    return federate(read_npz(path, name="mednist", source=said), split, model)


def heart_disease(
    num_clients: int | None = None,
    *,
    partition: Partition = _CENTRES,
    model: Architecture = _MLP,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = 180,
    public_size: int = 0,
    data: str | Path | None = None,
    seed: int = 0,
) -> Task:
    """Return 920 patients of four hospitals, each of them a client: has one a heart disease?

    Kinds of pain, of electrocardiogram, of slope and of thallium scan are one-hot, all zeros where
    missing. The other features are standardised, and missing values are replaced by medians
    first; figures of all training records, taken to be agreed on beforehand. A cholesterol or
    blood pressure of 0 is missing too.
    """
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    names = ["uci_heart_disease_4centres.npz", "heart_disease"]
    path = local(names, data, holds=lambda p: _is_file(names)(p) or _holds_centres(p))
    if path is None:
        why = (
            "it is not fetched, for want of a hash to vouch for: "
            "https://archive.ics.uci.edu/dataset/45 has it"
        )
        files = "heart_disease/ (" + ", ".join(f"processed.{c}.data" for c in _PLACES) + ")"
        raise missing("heart_disease", [names[0], files], why)
    return federate(_patients(path), split, model)


def _patients(path: Path) -> Pool:
    held = _processed(path) if path.is_dir() else arrays(path)
    wanted = {"x", "num", "centre", "columns", "centre_names"}
    if absent := sorted(wanted - held.keys()):
        raise DataUnusable(f"{path.name} lacks {', '.join(absent)}; it has {', '.join(held)}")
    names = [str(name) for name in held["columns"]][: held["x"].shape[1]]
    features, continuous = [], []
    for name, column in zip(names, torch.from_numpy(held["x"]).float().T, strict=True):
        if name in ("cp", "restecg", "slope", "thal"):
            known = column[~column.isnan()].unique()
            features.append((column[:, None] == known).float())
            continuous += [False] * len(known)
        else:
            if name in ("chol", "trestbps"):
                column = torch.where(column == 0, torch.nan, column)
            features.append(column[:, None])
            continuous.append(True)
    centres = [str(held["centre_names"][i]) for i in held["centre"]]
    return Pool(
        "heart_disease",
        (torch.cat(features, dim=1), torch.from_numpy(held["num"] > 0).long()),
        None,
        ("healthy", "diseased"),
        columns={"centre": centres},
        continuous=torch.tensor(continuous),
        source="Heart Disease, UCI: Cleveland, Hungarian, Switzerland and VA; CC BY 4.0",
    )


def _holds_centres(folder: Path) -> bool:
    return all((folder / f"processed.{place}.data").is_file() for place in _PLACES)


def _processed(folder: Path) -> dict[str, NDArray[Any]]:
    """Return what the four files of the UCI archive hold; "?" is missing."""
    tables = []
    for place in _PLACES:
        file = folder / f"processed.{place}.data"
        try:
            rows = [line.split(",") for line in file.read_text("ascii").split()]
            table = np.array([[np.nan if c == "?" else float(c) for c in row] for row in rows])
        except (OSError, ValueError) as error:
            raise DataUnusable(f"{file.name} cannot be read ({error}): get it again") from error
        if table.ndim != 2 or table.shape[1] != 14 or np.isnan(table[:, -1]).any():
            raise DataUnusable(
                f"{file.name}: rows must have 14 numbers, of which the last, num, is never missing"
            )
        tables.append(table)
    every = np.concatenate(tables)
    return {
        "x": every[:, :13].astype(np.float32),
        "num": every[:, 13],
        "centre": np.repeat(np.arange(4), [len(table) for table in tables]),
        "columns": np.array(_MEASURED),
        "centre_names": np.array(_PLACES),
    }


def _hub(name: str, hub: str, image: str, data: str | Path | None, said: str) -> Pool:
    """Return a data set of the hub, from a local folder of its parquet files if there is one."""
    folder = local([name], data, holds=holds_parquet)
    if folder is None:
        return read_hub(hub, image, "label", name=name, folder=name, source=said)
    pool = read_parquet(folder, image, "label", name=name, source=said)
    if pool.source.endswith("JPEG images"):  # the published images are lossless
        title, rest = said.split(",", 1)
        pool = replace(pool, source=f"{title}, JPEG re-encoding,{rest}")
    return pool


def _is_file(names: list[str]) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and path.name in names


def _unpacked(archive: Path) -> Path:
    """Return an npz of an archive with one folder of images a class, made once."""
    kept = cache() / f"{archive.name.removesuffix('.tar.gz').lower()}.npz"
    if kept.is_file() and kept.stat().st_mtime >= archive.stat().st_mtime:
        return kept
    found: dict[str, list[bytes]] = defaultdict(list)
    try:
        with tarfile.open(archive) as members:
            for member in members:
                file = members.extractfile(member) if member.name.endswith(".jpeg") else None
                if file is not None:
                    found[Path(member.name).parent.name].append(file.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataUnusable(
            f"{archive.name} cannot be read: it is truncated, or no archive ({error}): get it again"
        ) from error
    names = sorted(found)
    images = decoded([content for name in names for content in found[name]], archive.name)
    labels = np.repeat(np.arange(len(names)), [len(found[name]) for name in names])
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(f".{os.getpid()}.npz")
    np.savez(draft, x_train=images, y_train=labels, classes=np.array(names))
    os.replace(draft, kept)
    return kept
