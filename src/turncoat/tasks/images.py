"""Images from parquet folders, the hub, and npz files."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from turncoat.task import Batch, Task
from turncoat.tasks.models import Architecture, LeNet5
from turncoat.tasks.partitions import IID, Partition
from turncoat.tasks.pool import Pool, Split, federate
from turncoat.tasks.sources import (
    DataMissing,
    DataUnusable,
    extra,
    missing,
    offline_hub,
    reachable,
    remembered,
)
from turncoat.validate import nearest

_IID = IID()
_LENET = LeNet5()
_HUB = "https://huggingface.co"
_FEW = 1000  # classes that a label may tell of, however few examples there are


def from_parquet(
    folder: str | Path,
    num_clients: int | None = None,
    *,
    image: str = "image",
    label: str = "label",
    classes: tuple[str, ...] = (),
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    public_size: int = 0,
    seed: int = 0,
    source: str = "",
) -> Task:
    """Return a task from ``train*.parquet`` and, if there, ``test*.parquet`` of a folder.

    Images are encoded files, as PNG, in a column of the hub's kind; without a test file a fifth,
    or ``test_size``, is held out. The other columns are there to partition by. Needs the extra
    ``data``.
    """
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    pool = read_parquet(Path(folder).expanduser(), image, label, classes=classes, source=source)
    return federate(pool, split, model)


def from_hub(
    name: str,
    num_clients: int | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    image: str = "image",
    label: str = "label",
    train: str = "train",
    test: str | None = "test",
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    public_size: int = 0,
    seed: int = 0,
    source: str = "",
) -> Task:
    """Return a task from an image data set of the Hugging Face hub, as ``"ylecun/mnist"``.

    ``train`` and ``test`` name its splits; without ``test`` a fifth is held out. Name a
    ``revision`` to pin the data. The hub's client keeps what it has fetched, so a second time
    needs no network. Needs the extra ``data``.
    """
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    pool = read_hub(
        name, image, label, config=config, revision=revision, train=train, test=test, source=source
    )
    return federate(pool, split, model)


def from_npz(
    path: str | Path,
    num_clients: int | None = None,
    *,
    classes: tuple[str, ...] = (),
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    public_size: int = 0,
    seed: int = 0,
    source: str = "",
) -> Task:
    """Return a task from arrays ``train_images``, ``train_labels``, ``test_images``, ... of a file.

    Or ``x_train``, ``y_train``, ... Images are uint8, or floats in [0, 1], of shape ``(n, h, w)``,
    ``(n, h, w, c)`` or ``(n, c, h, w)``; labels whole numbers, ``(n,)`` or ``(n, 1)``. Without
    test arrays a fifth is held out; validation arrays are left alone. An array ``classes`` of
    strings names the labels.
    """
    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    pool = read_npz(Path(path).expanduser(), classes=classes, source=source)
    return federate(pool, split, model)


def read_parquet(
    folder: Path,
    image: str,
    label: str,
    *,
    name: str = "",
    classes: Sequence[str] = (),
    source: str = "",
) -> Pool:
    """Return the examples of a folder of parquet files."""
    parts = {part: _tables(folder, part) for part in ("train", "test")}
    if not parts["train"]:
        raise DataMissing(
            f"{folder} has no train*.parquet, neither itself nor in data/: name a folder with "
            "train*.parquet and, if there is one, test*.parquet"
        )
    kept = {part: [_table(file) for file in files] for part, files in parts.items() if files}
    told = tuple(classes) or _told_classes(kept["train"][0], label)
    batches: dict[str, Batch] = {}
    lossy = False
    for part, tables in kept.items():
        read = []
        for file, table in zip(parts[part], tables, strict=True):
            where = f"{folder.name}/{file.name}"
            cells = _column(table, image, where)
            jpeg, encoded = _encoded(cells, where, image)
            lossy = lossy or jpeg
            images = remembered(file, partial(decoded, encoded, where))
            read.append((images, whole(_column(table, label, where).to_numpy(), where)))
        images = _joined([i for i, _ in read], f"{folder.name}: {part}")
        batches[part] = as_images(images), torch.from_numpy(np.concatenate([y for _, y in read]))
    names = told or _numbered(batches.values(), folder.name)
    columns = _text_columns(kept["train"], {image, label})
    note = "JPEG images" if lossy else ""
    said = ", ".join(s for s in (source or f"local folder {folder.name}", note) if s)
    return Pool(
        name or folder.name, batches["train"], batches.get("test"), names, columns, None, said
    )


def read_hub(
    hub: str,
    image: str,
    label: str,
    *,
    name: str = "",
    config: str | None = None,
    revision: str | None = None,
    train: str = "train",
    test: str | None = "test",
    folder: str = "",
    source: str = "",
) -> Pool:
    """Return the examples of a data set of the Hugging Face hub."""
    datasets = extra("datasets")
    offline = not Path(hub).exists() and not reachable(datasets.config.HF_ENDPOINT)
    try:
        with offline_hub(offline):
            held = datasets.load_dataset(hub, config, revision=revision)
    except (OSError, RuntimeError) as error:
        why = f"the hub has not given {hub} ({str(error).splitlines()[0]})"
        if folder:
            cure = [f"{folder}/ (train*.parquet and test*.parquet of {_HUB}/datasets/{hub})"]
            raise missing(name or hub, cure, why) from error
        raise DataMissing(
            f"{hub} is not at hand: {why}. Check the name and the network, or get its parquet "
            f"files from {_HUB}/datasets/{hub} and use from_parquet"
        ) from error
    except ValueError as error:
        raise DataUnusable(f"{hub}: {str(error).splitlines()[0]}") from error
    batches = {}
    for part in (train, test):
        if part is not None:
            where = f"{hub}, split {part}"
            if part not in held:
                raise DataUnusable(f"{where} is not there; {nearest(part, held)}")
            rows = held[part]
            for column in (image, label):
                _known(column, rows.column_names, where)
            if isinstance(rows.features[image], datasets.Image):
                rows = rows.cast_column(image, datasets.Image(decode=False))
            table = rows.with_format("arrow")[:]
            _, encoded = _encoded(_column(table, image, where), where, image)
            labels = whole(_column(table, label, where).to_numpy(), where)
            batches[part] = as_images(decoded(encoded, where)), torch.from_numpy(labels)
    first = held[train]
    told = tuple(getattr(first.features[label], "names", ()))
    columns = _text_columns([first.with_format("arrow")[:]], {image, label})
    return Pool(
        name or hub,
        batches[train],
        batches.get(test) if test else None,
        told or _numbered(batches.values(), hub),
        columns,
        None,
        source or f"{_HUB}/datasets/{hub}",
    )


def read_npz(path: Path, *, name: str = "", classes: Sequence[str] = (), source: str = "") -> Pool:
    """Return the examples of a MedMNIST-style file."""
    held = arrays(path)
    keys = {
        part: next(
            (
                pair
                for pair in ((f"{part}_images", f"{part}_labels"), (f"x_{part}", f"y_{part}"))
                if held.keys() >= set(pair)
            ),
            None,
        )
        for part in ("train", "test")
    }
    if keys["train"] is None:
        raise DataUnusable(
            f"{path.name} has neither train_images and train_labels nor x_train and y_train; it "
            f"has {', '.join(held) or 'nothing'}"
        )
    batches = {}
    for part, pair in keys.items():
        if pair is not None:
            where = f"{path.name}: {pair[1]}"
            images = as_images(held[pair[0]], f"{path.name}: {pair[0]}")
            batches[part] = images, torch.from_numpy(whole(held[pair[1]], where))
    told = tuple(classes) or tuple(str(c) for c in held.get("classes", ()))
    return Pool(
        name or path.stem,
        batches["train"],
        batches.get("test"),
        told or _numbered(batches.values(), path.name),
        source=source or f"local file {path.name}",
    )


def arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an npz; pickled objects, which could run code, are refused."""
    if not path.is_file():
        raise DataMissing(f"there is no file {str(path)!r}: name an npz file")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as held:
            return {key: held[key] for key in held.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError) as error:
        pickled = "allow_pickle" in str(error) and zipfile.is_zipfile(path)
        cure = (
            "it holds pickled objects, which could run code: save plain arrays"
            if pickled
            else f"it is truncated, or no npz ({_first_line(error)}): get it again"
        )
        raise DataUnusable(f"{path} cannot be read: {cure}") from error


def decoded(encoded: Sequence[bytes | None], where: str) -> NDArray[Any]:
    """Return encoded images as one array. Shape: ``(n, h, w)`` or ``(n, h, w, 3)``."""
    images: NDArray[Any] | None = None
    for i, content in enumerate(encoded):
        try:
            with Image.open(io.BytesIO(content or b"")) as image:
                plain = image.mode in ("L", "RGB") or image.mode.startswith("I;16")
                one = np.asarray(image if plain else image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataUnusable(
                f"{where}: image {i} cannot be decoded ({_first_line(error)}): get the file again, "
                "or drop that row"
            ) from error
        if images is None:
            images = np.empty((len(encoded), *one.shape), one.dtype)
        if one.shape != images.shape[1:]:
            raise DataUnusable(
                f"{where}: image {i} has shape {one.shape}, image 0 {images.shape[1:]}: resize "
                "them to one shape first"
            )
        images[i] = one
    if images is None:
        raise DataUnusable(f"{where} holds no images")
    return images


def as_images(images: NDArray[Any], where: str = "images") -> Tensor:
    """Return images as uint8, or as floats in [0, 1]. Shape: ``(n, c, h, w)``."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4:
        raise DataUnusable(
            f"{where}: images must have shape (n, h, w), (n, h, w, c) or (n, c, h, w); the shape "
            f"is {images.shape}"
        )
    if images.dtype == np.uint16:
        images = images.astype(np.float32) / 65535
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images))
    if images.dtype != np.bool_ and not np.issubdtype(images.dtype, np.floating):
        raise DataUnusable(
            f"{where}: images must be uint8, uint16 or float; they are {images.dtype}"
        )
    low, high = float(images.min(initial=0)), float(images.max(initial=0))
    if low < 0 or high > 1:
        raise DataUnusable(
            f"{where}: floats must be within 0 and 1; they run from {low:g} to {high:g}: scale them"
        )
    return torch.from_numpy(np.ascontiguousarray(images, np.float32))


def whole(labels: NDArray[Any], where: str) -> NDArray[np.int64]:
    """Return labels as whole numbers. Shape: ``(n,)``."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataUnusable(
            f"{where}: labels must have shape (n,) or (n, 1), one class an example; the shape is "
            f"{labels.shape}"
        )
    try:
        odd = labels.astype(np.float64) % 1 != 0  # NaN is unequal to 0
    except (TypeError, ValueError):  # words
        odd = np.ones(len(labels), dtype=bool)
    if odd.any():
        raise DataUnusable(
            f"{where}: labels must be whole numbers from 0 on; there are others, as "
            f"{labels[odd].tolist()[0]!r}"
        )
    return labels.astype(np.int64)


def _tables(folder: Path, part: str) -> list[Path]:
    return sorted(folder.glob(f"{part}*.parquet")) or sorted(folder.glob(f"data/{part}*.parquet"))


def holds_parquet(folder: Path) -> bool:
    """Say whether a folder is one that ``read_parquet`` reads."""
    return bool(_tables(folder, "train"))


def _table(file: Path) -> Any:
    parquet = extra("pyarrow.parquet")
    try:
        return parquet.read_table(file, partitioning=None)
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise DataUnusable(
            f"{file.name} cannot be read: it is truncated, or no parquet ({_first_line(error)}): "
            "get it again"
        ) from error


def _known(name: str, names: Iterable[str], where: str) -> None:
    if name not in names:
        raise DataUnusable(f"{where} has no column {name!r}; it has {', '.join(names)}")


def _column(table: Any, name: str, where: str) -> Any:
    _known(name, table.column_names, where)
    return table.column(name).combine_chunks()


def _encoded(cells: Any, where: str, name: str) -> tuple[bool, list[bytes | None]]:
    """Return whether images are JPEG files, and their bytes."""
    types = extra("pyarrow").types
    if types.is_struct(cells.type) and cells.type.get_field_index("bytes") >= 0:
        cells = cells.field("bytes")
    if not (types.is_binary(cells.type) or types.is_large_binary(cells.type)):
        raise DataUnusable(
            f"{where}: column {name!r} holds {cells.type}, not encoded images: name the column of "
            "images"
        )
    encoded: list[bytes | None] = cells.to_pylist()
    return (encoded[0] or b"").startswith(b"\xff\xd8\xff") if encoded else False, encoded


def _joined(parts: Sequence[NDArray[Any]], where: str) -> NDArray[Any]:
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = " and ".join(sorted({str(part.shape[1:]) for part in parts}))
        raise DataUnusable(f"{where}: images have shapes {shapes}: resize them to one shape first")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _told_classes(table: Any, label: str) -> tuple[str, ...]:
    """Return the names of the classes that the hub writes into a parquet file."""
    told = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = told.get("info", {}).get("features", {}).get(label, {})
    return tuple(feature.get("names", ())) if isinstance(feature, Mapping) else ()


def _numbered(batches: Iterable[Batch], where: str) -> tuple[str, ...]:
    """Return names for the classes up to the largest label, where nobody has told them."""
    labels = [y for _, y in batches if len(y)]
    last, num_labels = max((int(y.max()) for y in labels), default=0), sum(map(len, labels))
    if last >= max(num_labels, _FEW):
        raise DataUnusable(
            f"{where}: the largest of {num_labels} labels is {last}: number the classes from 0 on, "
            "without gaps"
        )
    return tuple(map(str, range(1 + last)))


def _text_columns(tables: Sequence[Any], but: set[str]) -> dict[str, list[str]]:
    types = extra("pyarrow").types
    found: dict[str, list[str]] = {}
    for field in tables[0].schema:
        kind = field.type
        plain = types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)
        if field.name not in but and plain:
            found[field.name] = [str(v) for t in tables for v in t.column(field.name).to_pylist()]
    return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".:")
