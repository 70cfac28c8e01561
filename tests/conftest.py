import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def task() -> Task:
    """Eight clients with 112 digits each, and a net that trains in no time."""
    return digits(8, model=MLP((32,)))
