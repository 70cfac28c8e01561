"""Real data that come with scikit-learn and scikit-image: no download, no extra."""

from __future__ import annotations

import torch

from turncoat.task import Task
from turncoat.tasks.images import as_images
from turncoat.tasks.models import MLP, Architecture, ConvNet, LeNet5
from turncoat.tasks.partitions import IID, Partition
from turncoat.tasks.pool import Pool, Split, federate

_IID = IID()
_LENET = LeNet5()
_MLP = MLP(hidden=(32,))
_CONVNET = ConvNet()


def digits(
    num_clients: int | None = 10,
    *,
    partition: Partition = _IID,
    model: Architecture = _LENET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = 797,
    public_size: int = 100,
    seed: int = 0,
) -> Task:
    """Return 1,797 handwritten digits of 8x8 pixels: 900 to the clients, 100 public, 797 for tests.

    >>> digits(3, per_client=20).sizes
    (20, 20, 20)
    """
    from sklearn.datasets import load_digits

    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    held = load_digits()
    images = as_images((held.images / 16).astype("float32"))
    pool = Pool(
        "digits",
        (images, torch.from_numpy(held.target).long()),
        None,
        tuple("0123456789"),
        source="optical recognition of handwritten digits, UCI, in scikit-learn's copy; CC BY 4.0",
    )
    return federate(pool, split, model)


def breast_cancer(
    num_clients: int | None = 5,
    *,
    partition: Partition = _IID,
    model: Architecture = _MLP,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = 169,
    public_size: int = 50,
    seed: int = 0,
) -> Task:
    """Return 569 tumours of 30 features: 350 to the clients, 50 public, 169 for tests.

    Features are standardised by the mean and deviation of all that is not held out for tests.
    """
    from sklearn.datasets import load_breast_cancer

    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    held = load_breast_cancer()
    pool = Pool(
        "breast_cancer",
        (torch.from_numpy(held.data).float(), torch.from_numpy(held.target).long()),
        None,
        tuple(str(name) for name in held.target_names),
        continuous=torch.ones(held.data.shape[1], dtype=torch.bool),
        source="Breast Cancer Wisconsin (Diagnostic), UCI, in scikit-learn's copy; CC BY 4.0",
    )
    return federate(pool, split, model)


def faces(
    num_clients: int | None = 4,
    *,
    partition: Partition = _IID,
    model: Architecture = _CONVNET,
    per_client: int | None = None,
    train_size: int | None = None,
    test_size: int | None = 60,
    public_size: int = 20,
    seed: int = 0,
) -> Task:
    """Return 200 patches of 25x25 pixels, half of them faces: 120 to the clients, 20 public."""
    from skimage.data import lfw_subset

    split = Split(num_clients, partition, per_client, train_size, test_size, public_size, seed)
    images = as_images(lfw_subset())  # type: ignore[no-untyped-call]
    pool = Pool(
        "faces",
        (images, torch.arange(200).lt(100).long()),
        None,
        ("background", "face"),
        source="Labeled Faces in the Wild, scikit-image's subset; no licence is stated",
    )
    return federate(pool, split, model)
