"""What a long attack has finished so far: who stops it loses one victim at most."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator

from turncoat.runtimes.saved import Unreadable, read_tensors, write_tensors
from turncoat.trial import Reconstruction


@dataclass(frozen=True)
class Drafts:
    """A folder with one file for each victim that is done.

    An attack that asks for ``drafts`` gets one, or None. Files hold the state of the generator
    after that victim, and torch's own: a run that goes on gives the bits of one never stopped.
    """

    path: Path

    def of(self, name: str) -> Drafts:
        """Return a folder within, for another pass over the same victims."""
        return Drafts(self.path / name)

    def get(self, number: int, rng: Generator) -> Reconstruction | None:
        """Return what came of a victim, with the generators as they then were; None if nothing."""
        try:
            found, _ = read_tensors(self._file(number))
            done = Reconstruction(found["inputs"], found["labels"])
            own, ambient = found["rng"], found["ambient"]
        except (OSError, KeyError, Unreadable):
            return None
        rng.set_state(own)
        torch.set_rng_state(ambient)
        return done

    def put(self, number: int, done: Reconstruction, rng: Generator) -> Reconstruction:
        """Keep what came of a victim, and return it."""
        kept = {
            "inputs": done.inputs,
            "labels": done.labels,
            "rng": rng.get_state(),
            "ambient": torch.get_rng_state(),
        }
        write_tensors(self._file(number), kept)
        return done

    def drop(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.path / f"{number}.safetensors"
