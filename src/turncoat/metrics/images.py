"""How alike two images are, and which guess belongs to which original. Pixels are in [0, 1]."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from skimage.feature import hog
from skimage.metrics import structural_similarity
from torch import Tensor, nn

MAX_PSNR = 100.0  # dB, reported for images that are equal


def mse(images: Tensor, originals: Tensor) -> Tensor:
    """Return the mean squared error of each pair. Shape: ``(n,)``, float64.

    >>> mse(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)).tolist()
    [0.25]
    """
    return (images.double() - originals.double()).square().flatten(1).mean(dim=1)


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Return ``10 log10(1 / MSE)`` of each pair, in dB, at most 100. Shape: ``(n,)``, float64.

    >>> psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1)).round().tolist()
    [20.0]
    """
    return -10 * mse(images, originals).clamp(min=10 ** (-MAX_PSNR / 10)).log10()


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Return the mean structural similarity of each pair [1]_. Shape: ``(n,)``, float64.

    Differs from the paper: a uniform window of 7 pixels, or the largest odd number that fits.

    Args:
        images, originals: Shape: ``(n, channels, height, width)``; no side below 3.

    .. [1] Wang et al., IEEE TIP 2004. https://doi.org/10.1109/TIP.2003.819861
    """
    side = min(originals.shape[-2:])
    if side < 3:
        raise ValueError(f"ssim needs images of 3 x 3 pixels at least; a side has {side}")
    window = min(7, side - (side + 1) % 2)
    pairs = zip(images.cpu().double().numpy(), originals.cpu().double().numpy(), strict=True)
    alike = [
        structural_similarity(a, b, data_range=1.0, channel_axis=0, win_size=window)  # type: ignore[no-untyped-call]
        for a, b in pairs
    ]
    return torch.tensor(alike, dtype=torch.float64)


def features(images: Tensor) -> Tensor:
    """Return histograms of oriented gradients, of length 1 [1]_. Shape: ``(n, d)``, float64.

    What an image shows, rather than how bright it is: a fixed description that nobody trained, of
    edges and their directions. An image without any edge has the length 0.

    Differs from the paper: cells of a quarter of the smaller side, at most 8 pixels.

    Args:
        images: Shape: ``(n, channels, height, width)``; no side below 4.

    .. [1] Dalal and Triggs, CVPR 2005. https://doi.org/10.1109/CVPR.2005.177
    """
    side = min(images.shape[-2:])
    if side < 4:
        raise ValueError(f"features needs images of 4 x 4 pixels at least; a side has {side}")
    cell = min(8, max(2, side // 4))
    found = [
        hog(image, pixels_per_cell=(cell, cell), cells_per_block=(2, 2), channel_axis=0)
        for image in images.cpu().double().numpy()
    ]
    vectors: Tensor = torch.from_numpy(np.stack(found)).flatten(1)
    return nn.functional.normalize(vectors)


def feature_distance(images: Tensor, originals: Tensor) -> Tensor:
    """Return how far apart the ``features`` of each pair are, from 0 to 1. Shape: ``(n,)``.

    It is one less their cosine: 0 for the same edges, 1 for none in common; half if only one has
    edges at all.
    """
    return (features(images) - features(originals)).square().sum(dim=1) / 2


def match(guesses: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """Pair guesses and originals one to one, so that their squared errors add up to least.

    Returns:
        Indices of guesses, rising, and of their originals. Shape: ``(min(n, m),)`` each.
    """
    a, b = guesses.cpu().double().flatten(1), originals.cpu().double().flatten(1)
    rows, columns = linear_sum_assignment(torch.cdist(a, b).square().numpy())
    return torch.as_tensor(rows), torch.as_tensor(columns)
