"""Where data lie: a folder that is named, the environment's, the cache, or their public home."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

FOLDER = "TURNCOAT_DATA"  # names a folder of local copies
CACHE = "TURNCOAT_CACHE"  # names where downloads and decoded images are kept
_REACH_SECONDS = 3.0  # before a host is taken to be out of reach


class DataUnusable(ValueError):
    """Data that cannot be learned from as they are, or a wish that they cannot fulfil."""


class DataMissing(FileNotFoundError):
    """Data that are neither here nor to be had. Says what to put where."""


class ExtraMissing(ImportError):
    """A package that comes with an extra of Turncoat is not installed."""


def extra(module: str) -> Any:
    """Return a module of the extra ``data``."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ExtraMissing(
            f"this task needs the package {module.split('.')[0]!r}, which is not installed: "
            "pip install 'turncoat[data]'"
        ) from error


def local(
    names: Sequence[str], data: str | Path | None, *, holds: Callable[[Path], bool]
) -> Path | None:
    """Return the local copy of a data set, the first there is; None if it must be fetched.

    Args:
        names: File or folder names to look for, the usual one first.
        data: The folder to look in, or the very file or folder; None asks the environment.
        holds: Says whether a path is such a copy.
    """
    for root in (data, os.environ.get(FOLDER)):
        if not root:
            continue
        base = Path(root).expanduser()
        for path in (*(base / name for name in names), base):
            if holds(path):
                return path
        if root == data:
            raise DataMissing(
                f"data = {str(root)!r} holds no {' or '.join(names)}, and is none itself"
                f"{'' if base.exists() else ' (it does not exist)'}: {_put(names)}"
            )
    return None


def missing(what: str, names: Sequence[str], why: str) -> DataMissing:
    """Return the error for data that are not to be had, with what to put where."""
    folder = os.environ.get(FOLDER)
    where = f"{FOLDER} is {folder!r} and holds no {names[0]}" if folder else f"{FOLDER} is not set"
    return DataMissing(f"{what} is not at hand: {where}, and {why}. {_put(names)}")


def _put(names: Sequence[str]) -> str:
    return (
        f"Put {' or '.join(names)} into a folder, and name that folder by the environment "
        f'variable {FOLDER} or by data = "..."'
    )


def cache() -> Path:
    """Return the folder of downloads, which need not exist."""
    import pooch

    named = os.environ.get(CACHE)
    return Path(named).expanduser() if named else Path(pooch.os_cache("turncoat"))


def download(what: str, url: str, known_hash: str, names: Sequence[str]) -> Path:
    """Return a file of the public web, checked against its hash and kept in the cache."""
    import pooch

    bar = _Bar(names[0])
    try:
        path = pooch.retrieve(
            url,
            known_hash=known_hash,
            fname=names[0],
            path=cache(),
            downloader=pooch.HTTPDownloader(progressbar=bar, timeout=10),
        )
    except OSError as error:  # requests' errors are OSErrors
        reason = str(error) if len(str(error)) < 100 else type(error).__name__
        raise missing(what, names, f"{url} cannot be fetched ({reason})") from error
    except ValueError as error:
        raise DataUnusable(
            f"{what}: what came from {url} has not the hash {known_hash}: try again, or get a "
            f"copy elsewhere. {_put(names)}"
        ) from error
    finally:
        bar.close()
    return Path(path)


class _Bar:
    """What pooch expects of a progress bar, drawn by rich."""

    total = 0

    def __init__(self, title: str) -> None:
        look = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*look, console=Console(stderr=True))
        self._row = self._progress.add_task(title)

    def update(self, amount: int) -> None:
        self._progress.start()
        self._progress.update(self._row, total=self.total, advance=amount)

    def reset(self) -> None:
        self._progress.update(self._row, completed=0)

    def close(self) -> None:
        self._progress.stop()


def reachable(url: str) -> bool:
    """Say whether a host answers at all, so that a client need not retry for half a minute."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # the proxy knows
    parts = urlsplit(url)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), _REACH_SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def offline_hub(offline: bool) -> Iterator[None]:
    """Let the hub's client answer from its cache alone, without trying the network."""
    homes = [extra("datasets").config, extra("huggingface_hub.constants")]
    before = [home.HF_HUB_OFFLINE for home in homes]
    try:
        for home, value in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = value or offline
        yield
    finally:
        for home, value in zip(homes, before, strict=True):
            home.HF_HUB_OFFLINE = value


def remembered(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """Return ``make()``, or what it gave for this very file the last time."""
    stat = path.stat()
    address = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    kept = cache() / "decoded" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.npy"
    with suppress(OSError, ValueError, EOFError):  # not there yet, or damaged: made anew
        held: NDArray[Any] = np.load(kept, allow_pickle=False)
        return held
    array = make()
    with suppress(OSError):  # a cache that cannot be written is none
        kept.parent.mkdir(parents=True, exist_ok=True)
        draft = kept.with_suffix(f".{os.getpid()}.npy")
        np.save(draft, array)
        os.replace(draft, kept)
    return array


def has_hash(path: Path, md5: str) -> bool:
    """Say whether a file is the published one."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5
