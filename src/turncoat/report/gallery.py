"""What inversion brought to light: pictures beside the originals, small enough for one file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from turncoat.report.pooled import Square
from turncoat.report.record import Record

MOST_PICTURES = 6
MOST_PIXELS = 64
Tensors = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Strip:
    """A row of pictures of one origin, or why there are none.

    Attributes:
        pictures: PNGs as data addresses.
        alts: What each shows, in words.
        captions: What is written under each; none where nothing is to be said.
        decoys: Of each guess, the public image of its class that it is nearest to.
    """

    label: str
    note: str
    kind: str
    pictures: tuple[str, ...] = ()
    alts: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    decoys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exhibition:
    """One attack at one seat: what it saw of the same records behind each defence, or its trigger.

    Attributes:
        attack: Its name; names, where several of a seat carry one trigger.
    """

    attack: str
    seat: str
    strips: tuple[Strip, ...]

    @property
    def rebuilt(self) -> bool:
        """Whether it shows records that were rebuilt, and not a trigger."""
        return any(strip.kind != "trigger" for strip in self.strips)


def exhibits(record: Record, square: Square) -> tuple[list[Tensors], list[str]]:
    """Return what a square has to show, one for each seed, and what could not be read."""
    found: list[Tensors] = []
    lost: list[str] = []
    root = record.folder.resolve()
    for name in square.exhibits:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            lost.append(f"{name} lies outside the folder")
        elif not path.is_file():
            lost.append(f"{name} is missing")
        else:
            try:
                found.append(load_file(path))
            except (SafetensorError, OSError, TypeError, KeyError) as error:
                lost.append(f"{name} cannot be read ({error})")
    return found, lost


def exhibition(
    attack: str, seat: str, squares: Sequence[Square], shown: Mapping[str, Tensors]
) -> Exhibition | None:
    """Lay out the pictures of one attack: the originals, a blind guess, then each defence."""
    hung = [square for square in squares if _pictures(shown.get(square.defence), "reconstructions")]
    if not hung:
        return _triggered(attack, seat, squares, shown)
    strips: list[Strip] = []
    before: tuple[str, ...] = ()
    for square in squares:
        tensors = shown.get(square.defence)
        if square in hung and tensors is not None:
            labels = _labels(tensors)
            originals = _pictures(tensors, "originals")
            if originals and originals != before:
                strips.append(
                    _strip("originals", "what the clients hold", "truth", originals, labels)
                )
                if not before and (mean := _pictures(tensors, "mean_image")):
                    note = "a blind guess: the baseline"
                    strips.append(
                        _strip("mean image", note, "blind", mean[:1] * len(originals), ())
                    )
                if not before and (prior := _pictures(tensors, "prior_only")):
                    note = "the same attack without the update: a baseline"
                    strips.append(_strip("priors alone", note, "blind", prior, ()))
                before = originals
            pictures = _pictures(tensors, "reconstructions")
            lead = square.headline
            note = f"{lead.metric} {lead.text}" if lead else ""
            strip = _strip(square.defence, note, "guess", pictures, labels)
            captions = _captions(tensors)[: len(pictures)]
            decoys = _pictures(tensors, "decoys")[: len(pictures)]
            strips.append(replace(strip, captions=captions, decoys=decoys))
        elif square.status != "scored":
            strips.append(Strip(square.defence, square.says, square.status))
    return Exhibition(attack, seat, tuple(strips))


def _triggered(
    attack: str, seat: str, squares: Sequence[Square], shown: Mapping[str, Tensors]
) -> Exhibition | None:
    for square in squares:
        tensors = shown.get(square.defence)
        if tensors is not None and (pictures := _pictures(tensors, "triggered")):
            strip = _strip(
                "with the trigger", "what the backdoor answers to", "trigger", pictures, ()
            )
            return Exhibition(attack, seat, (strip,))
    return None


def _strip(
    label: str, note: str, kind: str, pictures: tuple[str, ...], labels: Sequence[str]
) -> Strip:
    alts = tuple(
        f"{label}, {number}{f', class {labels[number - 1]}' if number <= len(labels) else ''}"
        for number in range(1, len(pictures) + 1)
    )
    return Strip(label, note, kind, pictures, alts)


def _captions(tensors: Tensors) -> tuple[str, ...]:
    """Return the PSNR of each guess, marked where it points out its original."""
    found = tensors.get("psnr")
    if found is None:
        return ()
    likeness: list[float] = np.ravel(found).tolist()
    hits = np.ravel(tensors.get("identified", np.zeros(0))).tolist()
    marks = [" ●" if i < len(hits) and hits[i] else "" for i in range(len(likeness))]
    return tuple(f"{x:.1f} dB{mark}" for x, mark in zip(likeness, marks, strict=True))


def _labels(tensors: Tensors) -> list[str]:
    labels = tensors.get("labels")
    return [] if labels is None else [f"{label:g}" for label in np.ravel(labels).tolist()]


def _pictures(tensors: Tensors | None, name: str) -> tuple[str, ...]:
    images = None if tensors is None else tensors.get(name)
    if images is None:
        return ()
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[1] < 1:
        return ()
    return tuple(_png(image) for image in images[:MOST_PICTURES])


def _png(image: NDArray[np.generic]) -> str:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.5, posinf=1.0, neginf=0.0)
    pixels = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    shown = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
    picture = Image.fromarray(np.ascontiguousarray(shown))
    if max(picture.size) > MOST_PIXELS:
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
