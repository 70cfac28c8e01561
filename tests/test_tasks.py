"""Tasks, their partitions and their models.

Kinds: contract (every shipped task trains; what is described can be described), theorem
(partitions, with hypothesis), golden (parameter counts), and what is said of bad data.
"""

from __future__ import annotations

import csv
import doctest
import io
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d

from turncoat.randomness import Randomness
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.task import Task
from turncoat.tasks import bundled, fetched, images, sources, tables
from turncoat.tasks.models import (
    MLP,
    Architecture,
    Built,
    ConvNet,
    LeNet5,
    ResNet,
    _MeanOfFour,
)
from turncoat.tasks.partitions import (
    IID,
    ByColumn,
    ClassShards,
    Columns,
    Dirichlet,
    Partition,
    UnequalSizes,
)
from turncoat.tasks.sources import DataMissing, DataUnusable, ExtraMissing

DATA = Path(__file__).parents[1].parent / "shared" / "data"
local = pytest.mark.skipif(not DATA.is_dir(), reason="needs the local data sets")

SHIPPED: dict[str, Callable[[], Task]] = {
    "digits": bundled.digits,
    "breast_cancer": bundled.breast_cancer,
    "faces": bundled.faces,
}
LOCAL: dict[str, Callable[[], Task]] = {
    "cifar10": lambda: fetched.cifar10(
        4, per_client=50, test_size=100, data=str(DATA / "cifar10-lossless-4k")
    ),
    "pneumoniamnist": fetched.pneumoniamnist,
    "mednist": lambda: fetched.mednist(4, train_size=200, test_size=60),
    "heart_disease": fetched.heart_disease,
}


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(sources.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(sources.FOLDER, raising=False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.FOLDER, str(DATA))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def drawn(seed: int = 0) -> Generator:
    return Randomness(seed).at("test")


# Contracts -----------------------------------------------------------------------------------


def trains(task: Task) -> None:
    state = task.model.initial(drawn())
    again = task.model.layout.flatten(task.model.module)
    assert state.shape == again.shape == (task.model.layout.num_params,)
    named = task.model.layout.split(state)
    assert torch.equal(
        torch.cat([named[s.name].reshape(-1) for s in task.model.layout.slots]), state
    )
    assert all(size > 0 for size in task.sizes)
    for inputs, labels in (*task.clients, task.test, task.population):
        assert inputs.dtype == torch.float32 and labels.dtype == torch.int64
        assert inputs.isfinite().all() and len(inputs) == len(labels)
        assert int(labels.min()) >= 0 and int(labels.max()) < len(task.classes)
        assert task.model.loss(state, (inputs[:8], labels[:8])).isfinite()
        if inputs.ndim == 4:
            assert float(inputs.min()) >= 0 and float(inputs.max()) <= 1
    assert task.source


@pytest.mark.parametrize("name", SHIPPED)
def test_a_bundled_task_can_be_trained_by_every_client(name: str) -> None:
    trains(SHIPPED[name]())


@local
@pytest.mark.parametrize("name", LOCAL)
def test_a_fetched_task_can_be_trained_by_every_client(name: str, here: None) -> None:
    trains(LOCAL[name]())


def test_the_same_seed_gives_the_same_task_and_another_gives_another() -> None:
    a, b, c = (bundled.digits(4, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(x[0], y[0]) for x, y in zip(a.clients, b.clients, strict=True))
    assert not torch.equal(a.clients[0][0], c.clients[0][0])


def test_clients_public_data_and_tests_share_no_example() -> None:
    task = bundled.breast_cancer(3)
    assert task.public is not None
    every = torch.cat([inputs for inputs, _ in (*task.clients, task.test, task.public)])
    assert len(every) == 569 - 350 % 3 + 350 % 3 == len(torch.unique(every, dim=0))


def test_digits_are_divided_as_the_documentation_says() -> None:
    task = bundled.digits()
    assert task.sizes == (90,) * 10 and task.public is not None
    assert (len(task.public[1]), len(task.test[1])) == (100, 797)


def test_features_are_standardised_by_what_is_not_held_out() -> None:
    task = bundled.breast_cancer(2)
    assert task.public is not None
    seen = torch.cat([inputs for inputs, _ in (*task.clients, task.public)])
    assert seen.mean(dim=0).abs().max() < 1e-4
    assert (seen.std(dim=0, correction=0) - 1).abs().max() < 1e-4


def test_per_client_and_train_size_bound_what_is_used() -> None:
    assert bundled.digits(5, per_client=7).sizes == (7,) * 5
    assert sum(bundled.digits(5, train_size=103).sizes) == 103
    assert bundled.digits(5, public_size=0).public is None


@local
def test_a_natural_federation_names_its_clients(here: None) -> None:
    task = fetched.heart_disease()
    assert task.client_names == ("cleveland", "hungarian", "switzerland", "va")
    assert sum(task.sizes) == 740


@local
def test_four_files_of_the_archive_are_the_same_as_the_npz(here: None, tmp_path: Path) -> None:
    with np.load(DATA / "uci_heart_disease_4centres.npz") as held:
        x, num, centre = held["x"], held["num"], held["centre"]
        places = held["centre_names"]
    (tmp_path / "heart_disease").mkdir()
    for c, place in enumerate(places):
        lines = [
            ",".join("?" if np.isnan(v) else repr(float(v)) for v in [*row, n])
            for row, n in zip(x[centre == c], num[centre == c], strict=True)
        ]
        (tmp_path / "heart_disease" / f"processed.{place}.data").write_text("\n".join(lines))
    a, b = fetched.heart_disease(), fetched.heart_disease(data=str(tmp_path))
    assert torch.equal(a.test[0], b.test[0]) and a.sizes == b.sizes


@local
def test_a_local_copy_says_what_it_is_not(here: None) -> None:
    folder = str(DATA / "cifar10-lossless-4k")
    assert "JPEG" not in fetched.cifar10(4, data=folder).source
    assert "not the published file" in fetched.pneumoniamnist().source


@local
def test_mnist_has_lenets_size_and_its_licence(tmp_path: Path) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    for part in ("train", "test"):  # the test file for both: 10,000 images are decoded faster
        (folder / f"{part}.parquet").symlink_to(DATA / "mnist" / "test-00000-of-00001.parquet")
    task = fetched.mnist(4, per_client=50, test_size=100, data=str(tmp_path))
    trains(task)
    assert task.model.layout.num_params == 61706 and "CC BY-SA 3.0" in task.source


def test_decoded_images_are_remembered_and_a_damaged_memory_is_made_anew(tmp_path: Path) -> None:
    folder = str(parquet(tmp_path / "x", [(8, 8)] * 50))
    first = images.from_parquet(folder, 4)
    (kept,) = (sources.cache() / "decoded").iterdir()
    again = images.from_parquet(folder, 4)
    kept.write_bytes(kept.read_bytes()[:1000])
    anew = images.from_parquet(folder, 4)
    assert torch.equal(first.test[0], again.test[0]) and torch.equal(first.test[0], anew.test[0])


def test_an_archive_of_folders_becomes_a_task(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "MedNIST.tar.gz", "w:gz") as archive:
        for i in range(12):
            content = encoded(np.full((64, 64), 20 * i, np.uint8), "JPEG")
            entry = tarfile.TarInfo(f"MedNIST/{'Hand' if i % 2 else 'CXR'}/{i:06}.jpeg")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for _ in range(2):  # the second time from the cache
        task = fetched.mednist(2, data=str(tmp_path), train_size=8, test_size=4, public_size=0)
        assert task.classes == ("CXR", "Hand") and task.sizes == (4, 4)


# Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "shape", "count"),
    [
        (LeNet5(), (1, 28, 28), 61706),
        (LeNet5("tanh"), (3, 32, 32), 62006),
        (LeNet5(), (1, 8, 8), 42794),
        (MLP((32,)), (30,), 31 * 32 + 33 * 10),
        (MLP(()), (1, 8, 8), 650),
        (ConvNet(), (1, 8, 8), 160 + 16 * 9 * 32 + 32 + (128 + 1) * 10),
        (ResNet(), (3, 32, 32), 78042),
        (ResNet(20), (3, 32, 32), 272474),
    ],
)
def test_an_architecture_has_the_parameters_it_should(
    architecture: Architecture, shape: tuple[int, ...], count: int
) -> None:
    built = Built(architecture, shape, 10)
    net = built()
    assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.rand(2, *shape)).shape == (2, 10)
    assert eval(repr(built)) == built
    with pytest.raises(FrozenInstanceError):
        built.num_classes = 3  # type: ignore[misc]


@pytest.mark.parametrize("side", [8, 15, 16, 25, 28, 31, 32, 64])
def test_lenet_fits_images_of_any_side(side: int) -> None:
    assert LeNet5()((1, side, side), 3)(torch.rand(1, 1, side, side)).shape == (1, 3)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_a_smooth_net_has_second_derivatives(activation: Any) -> None:
    for net in (LeNet5(activation), ConvNet(activation=activation), MLP(activation=activation)):
        x = torch.rand(1, 1, 8, 8, requires_grad=True)
        (first,) = torch.autograd.grad(net((1, 8, 8), 4)(x)[0, 0], x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert second.abs().sum() > 0


def test_architectures_refuse_what_they_cannot_be() -> None:
    for make, said in (
        (lambda: MLP((0,)), "hidden must be at least 1"),
        (lambda: ConvNet((8,), (1, 2)), "one stride for each width"),
        (lambda: ResNet(9), "6n \\+ 2"),
        (lambda: ResNet(width=12), "must divide width"),
        (lambda: LeNet5("swish"), "one of relu, tanh, sigmoid"),  # type: ignore[arg-type]
        (lambda: LeNet5()((30,), 2), "choose another model"),
    ):
        with pytest.raises(ValueError, match=said):
            make()


# Theorems about partitions -------------------------------------------------------------------


def labels_of(counts: list[int]) -> Tensor:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=drawn())]


COUNTS = st.lists(st.integers(5, 40), min_size=2, max_size=6)
PARTITIONS = st.one_of(
    st.just(IID()),
    st.builds(UnequalSizes, st.floats(0, 3)),
    st.builds(Dirichlet, st.floats(0.3, 100)),
    st.builds(ClassShards, st.integers(1, 2)),
)


@settings(max_examples=80, deadline=None)
@given(PARTITIONS, COUNTS, st.integers(1, 5), st.integers(0, 99))
def test_parts_are_disjoint_not_empty_and_cover_what_they_should(
    partition: Partition, counts: list[int], num_clients: int, seed: int
) -> None:
    labels = labels_of(counts)
    parts = partition(labels, num_clients, columns={}, rng=drawn(seed))
    again = partition(labels, num_clients, columns={}, rng=drawn(seed))
    every = torch.cat(parts).tolist()
    assert len(parts) == num_clients and all(len(part) for part in parts)
    assert len(set(every)) == len(every)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    if not isinstance(partition, ClassShards):
        assert len(every) == len(labels)


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_class_shards_give_each_client_its_number_of_classes(
    counts: list[int], num_clients: int, classes: int, seed: int
) -> None:
    labels, classes = labels_of(counts), min(classes, len(counts))
    parts = ClassShards(classes)(labels, num_clients, columns={}, rng=drawn(seed))
    owned = [set(labels[part].tolist()) for part in parts]
    assert all(len(mine) == classes for mine in owned)
    owners = [sum(c in mine for mine in owned) for c in range(len(counts))]
    assert max(owners) - min(owners) <= 1
    if num_clients * classes >= len(counts):
        assert sum(map(len, parts)) == len(labels)


def test_dirichlet_goes_from_one_class_a_client_to_iid() -> None:
    labels = labels_of([200] * 10)

    def largest(alpha: float) -> float:
        parts = Dirichlet(alpha)(labels, 10, columns={}, rng=drawn())
        return float(np.mean([labels[p].bincount().max() / len(p) for p in parts]))

    assert largest(1e4) < 0.13 < 0.3 < largest(0.1)


def test_dirichlet_has_the_variance_of_its_distribution() -> None:
    labels, alpha, num = torch.zeros(10_000, dtype=torch.long), 2.0, 5
    shares = [
        len(part) / len(labels)
        for seed in range(300)
        for part in Dirichlet(alpha)(labels, num, columns={}, rng=drawn(seed))
    ]
    expected = (1 / num) * (1 - 1 / num) / (num * alpha + 1)
    assert np.var(shares) == pytest.approx(expected, rel=0.15)


def test_unequal_sizes_are_log_normal_and_even_without_spread() -> None:
    labels = torch.zeros(100_000, dtype=torch.long)
    even = UnequalSizes(0)(labels, 50, columns={}, rng=drawn())
    assert {len(part) for part in even} == {2000}
    spread = UnequalSizes(1.0)(labels, 500, columns={}, rng=drawn())
    assert np.std(np.log([len(part) for part in spread])) == pytest.approx(1, rel=0.15)


def test_a_column_makes_one_client_a_value() -> None:
    columns = {"hospital": ["b", "a", "b", "c"]}
    parts = ByColumn("hospital")(torch.zeros(4).long(), None, columns=columns, rng=drawn())
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3]]
    assert bundled.digits(None, partition=ByColumn("label")).client_names == tuple("0123456789")


def test_a_partition_of_ones_own_is_checked() -> None:
    def greedy(
        labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]:
        return [torch.arange(10)] * (num_clients or 1)

    def absent(
        labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]:
        return [torch.arange(10), torch.arange(0)]

    with pytest.raises(DataUnusable, match="to two clients"):
        bundled.digits(2, partition=greedy)
    with pytest.raises(DataUnusable, match="left client 1 without examples"):
        bundled.digits(2, partition=absent)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_clients": 0}, "num_clients must be at least 1; it is 0"),
        ({"num_clients": 901}, "901 clients of at least 1 examples need 901; there are 900: lower"),
        ({"num_clients": None}, "give num_clients, or partition by a column"),
        ({"per_client": 91}, "needs 910 examples; there are 900: lower"),
        ({"train_size": 901}, "1000 training examples are too few"),
        ({"test_size": 1797}, "test_size = 1797, but there are 1797"),
        ({"public_size": -1}, "public_size must be at least 0"),
        ({"partition": Dirichlet(1e-3, 60)}, "raise alpha"),
        ({"partition": ClassShards(11)}, "have 10 classes: lower"),
        ({"partition": ByColumn("lable")}, "no such column; did you mean 'label'?"),
        ({"partition": ByColumn("label"), "num_clients": 3}, "makes 10 clients .* leave it out"),
    ],
)
def test_a_wish_that_the_data_cannot_fulfil_is_refused(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bundled.digits(**options)


def test_partitions_refuse_numbers_out_of_range() -> None:
    for make in (
        lambda: Dirichlet(0),
        lambda: Dirichlet(float("nan")),
        lambda: UnequalSizes(-1),
        lambda: ClassShards(0),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()


def test_what_a_config_reads_has_types_that_can_be_resolved() -> None:
    resolved = {
        name: get_type_hints(made)
        for module in (bundled, fetched, images, tables)
        for name, made in vars(module).items()
        if getattr(made, "__module__", "") == module.__name__ and not name.startswith("_")
    }
    assert {"digits", "mnist", "from_npz", "from_csv"} <= resolved.keys()
    assert all(hints for hints in resolved.values())


# Files ---------------------------------------------------------------------------------------


def encoded(image: Any, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def parquet(folder: Path, shapes: list[tuple[int, ...]], kind: str = "PNG", **columns: Any) -> Path:
    arrow, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": encoded(np.zeros(s, np.uint8), kind), "path": None} for s in shapes]
    columns = {"image": cells, "label": [i % 2 for i in range(len(shapes))], **columns}
    folder.mkdir(exist_ok=True)
    write.write_table(arrow.table(columns), folder / "train-00000-of-00001.parquet")
    return folder


def test_a_folder_of_parquet_becomes_a_task(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "x", [(8, 8, 3)] * 20, "JPEG", ward=["a", "b"] * 10)
    task = images.from_parquet(str(folder), test_size=4, partition=ByColumn("ward"))
    assert task.client_names == ("a", "b") and task.test[0].shape == (4, 3, 8, 8)
    assert task.source.endswith("JPEG images")


def test_a_hub_name_becomes_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    folder = str(parquet(tmp_path / "x", [(8, 8)] * 20))
    task = images.from_hub(folder, 2, test=None)
    assert task.sizes == (8, 8) and task.test[0].shape == (4, 1, 8, 8)
    with pytest.raises(DataUnusable, match="no column 'img'; it has image, label"):
        images.from_hub(folder, 2, image="img", test=None)
    with pytest.raises(DataUnusable, match="split test is not there; there are train"):
        images.from_hub(folder, 2)


def test_a_table_becomes_a_task(tmp_path: Path) -> None:
    file = tmp_path / "patients.csv"
    file.write_text(
        "age,sex,ward,ill,split\n50,m,a,no,train\n?,f,b,yes,train\n70,?,b,no,train\n60,f,a,no,test\n"
    )
    task = tables.from_csv(
        str(file), label="ill", drop=("ward",), split_column="split", partition=ByColumn("ward")
    )
    assert task.classes == ("no", "yes") and task.client_names == ("a", "b")
    every = torch.cat([inputs for inputs, _ in task.clients])
    deviation = np.std([50, 50, 70])  # the median of 50 and 70, the lower one, stands in
    assert sorted(every[:, 0].tolist()) == pytest.approx(
        sorted((v - 170 / 3) / deviation for v in (50, 50, 70)), rel=1e-5
    )
    assert every[:, 1:].sum(dim=1).tolist() == [1, 1, 1]  # "", f, m: one of them
    assert task.test[0].shape == (1, 4)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("a,y\n1,0\n2,1\n", {"label": "z"}, "no column 'z'; it has a, y"),
        ("a,y\n1,0\n2,1\n", {"label": "y", "drop": ("b",)}, "no column 'b'"),
        ("a,y\n1,0\n2\n", {"label": "y"}, "row 2 has 1 cells, the header 2"),
        ("a,y\n1,\n2,1\n", {"label": "y"}, "label 'y' is missing in row 1"),
        ("a,y\n,0\n?,1\n", {"label": "y"}, "column 'a' is missing in every row"),
        ("a,y\n,0\n2,1\n", {"label": "y", "impute": "refuse"}, "column 'a' is missing in 1 rows"),
        ("a,y\ninf,0\n2,1\n", {"label": "y"}, "column 'a' is infinite in row 1"),
        ("y\n0\n1\n", {"label": "y"}, "no features but the label"),
        ("a,a\n0,1\n", {"label": "a"}, "need names, each of them once"),
        ("a,y\n", {"label": "y"}, "no rows"),
        ("a,s,y\n1,x,0\n2,x,1\n", {"label": "y", "split_column": "s"}, "must say train or test"),
    ],
)
def test_a_bad_table_is_named_by_column_or_row(
    tmp_path: Path, text: str, options: Any, said: str
) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataUnusable, match=said):
        tables.from_csv(str(tmp_path / "bad.csv"), 1, **options)


def test_a_column_of_names_is_not_made_one_hot(tmp_path: Path) -> None:
    with open(tmp_path / "wide.csv", "w", newline="") as file:
        csv.writer(file).writerows([("name", "y"), *((f"n{i}", i % 2) for i in range(300))])
    with pytest.raises(DataUnusable, match="'name' has 300 categories"):
        tables.from_csv(str(tmp_path / "wide.csv"), 2, label="y")


def test_a_truncated_file_is_said_to_be(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "p", [(8, 8)] * 20)
    np.savez(tmp_path / "n.npz", train_images=np.zeros((9, 8, 8), np.uint8), train_labels=[0] * 9)
    for path in (folder / "train-00000-of-00001.parquet", tmp_path / "n.npz"):
        path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(DataUnusable, match=r"train-.*parquet cannot be read: it is truncated"):
        images.from_parquet(str(folder), 2)
    with pytest.raises(DataUnusable, match=r"n.npz cannot be read: it is truncated"):
        images.from_npz(str(tmp_path / "n.npz"), 2)
    with pytest.raises(DataUnusable, match=r"cannot be read: it is truncated"):
        fetched.mednist(2, data=str(junk(tmp_path / "MedNIST.tar.gz")))


def junk(path: Path) -> Path:
    path.write_bytes(b"\x1f\x8b" + bytes(50))
    return path


def test_a_broken_image_is_named_by_its_row(tmp_path: Path) -> None:
    good = encoded(np.random.default_rng(0).integers(0, 255, (28, 28), dtype=np.uint8))
    for bad in (good[:-90], b"", b"no image"):
        cells = [{"bytes": c, "path": None} for c in (good, bad)]
        folder = parquet(tmp_path / "x", [(8, 8)] * 2, image=cells)
        with pytest.raises(DataUnusable, match="image 1 cannot be decoded"):
            images.from_parquet(str(folder), 1)


def test_images_of_differing_shape_are_refused(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "x", [(8, 8), (8, 8), (9, 8)])
    with pytest.raises(DataUnusable, match=r"image 2 has shape \(9, 8\), image 0 \(8, 8\): resize"):
        images.from_parquet(str(folder), 1)


def test_a_wrong_column_is_answered_by_those_there_are(tmp_path: Path) -> None:
    folder = str(parquet(tmp_path / "x", [(8, 8)] * 9))
    with pytest.raises(DataUnusable, match="no column 'img'; it has image, label"):
        images.from_parquet(folder, 1, image="img")
    with pytest.raises(DataUnusable, match="holds int64, not encoded images"):
        images.from_parquet(folder, 1, image="label")


PICTURES = np.zeros((10, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": PICTURES}, "neither train_images .* it has x"),
        ({"x_train": PICTURES, "y_train": np.full(10, -1)}, "labels from -1 to -1"),
        ({"x_train": PICTURES, "y_train": np.full(10, 0.5)}, "whole numbers .* as 0.5"),
        ({"x_train": PICTURES, "y_train": np.full(10, np.nan)}, "whole numbers .* as nan"),
        ({"x_train": PICTURES, "y_train": np.array(["cat"] * 10)}, "whole numbers .* as 'cat'"),
        ({"x_train": PICTURES, "y_train": np.zeros((10, 3))}, "one class an example"),
        ({"x_train": PICTURES, "y_train": np.zeros(9)}, "10 examples and 9 labels"),
        ({"x_train": PICTURES[:0], "y_train": np.zeros(0)}, "is empty|holds no"),
        ({"x_train": PICTURES + 2.0, "y_train": np.zeros(10)}, "within 0 and 1"),
        ({"x_train": PICTURES * np.nan, "y_train": np.zeros(10)}, "NaN or infinity in 10"),
        ({"x_train": PICTURES.astype(int), "y_train": np.zeros(10)}, "must be uint8"),
        ({"x_train": PICTURES[0], "y_train": np.zeros(8)}, "images must have shape"),
        (
            {"x_train": PICTURES, "y_train": np.arange(10) // 9 * 7, "classes": ["a", "b"]},
            "labels from 0 to 7, but there are 2 classes: number them 0 to 1",
        ),
        (
            {
                "x_train": PICTURES,
                "y_train": np.zeros(10),
                "x_test": np.zeros((3, 9, 9), np.uint8),
                "y_test": np.zeros(3),
            },
            "bring them to one shape",
        ),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: Any, said: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataUnusable, match=said):
        images.from_npz(str(tmp_path / "bad.npz"), 2)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}] * 10, dtype=object)
    np.savez(tmp_path / "o.npz", x_train=objects, y_train=np.zeros(10))
    with pytest.raises(DataUnusable, match="pickled objects, which could run code"):
        images.from_npz(str(tmp_path / "o.npz"), 2)


@pytest.mark.parametrize("shape", [(6, 8, 9), (6, 8, 9, 3), (6, 3, 8, 9), (6, 8, 9, 1)])
def test_channels_are_found_first_or_last(shape: tuple[int, ...]) -> None:
    channels = 3 if 3 in shape else 1
    assert images.as_images(np.zeros(shape, np.uint8)).shape == (6, channels, 8, 9)


# What is missing -----------------------------------------------------------------------------


def test_a_missing_file_says_which() -> None:
    for read in (lambda: images.from_npz("/no/x.npz", 2), lambda: images.from_parquet("/no", 2)):
        with pytest.raises(DataMissing, match="/no"):
            read()  # type: ignore[no-untyped-call]
    with pytest.raises(DataMissing, match=r"no file '/no/x.csv'"):
        tables.from_csv("/no/x.csv", 2, label="y")


@pytest.mark.parametrize(
    ("task", "what"),
    [
        (fetched.mnist, r"mnist/ \(train\*.parquet"),
        (fetched.fashion_mnist, r"fashion_mnist/ \(train\*.parquet"),
        (fetched.cifar10, r"cifar10/ \(train\*.parquet"),
        (fetched.pneumoniamnist, "pneumoniamnist.npz"),
        (fetched.mednist, "MedNIST.tar.gz"),
        (fetched.heart_disease, "uci_heart_disease_4centres.npz"),
    ],
)
def test_without_a_network_it_is_said_what_to_put_where(
    task: Callable[..., Task], what: str, no_network: None
) -> None:
    pytest.importorskip("datasets")
    began = time.monotonic()
    with pytest.raises(DataMissing, match=f"Put {what}.* into a folder.* TURNCOAT_DATA or by data"):
        task()
    assert time.monotonic() - began < 5
    with pytest.raises(DataMissing, match="it does not exist"):
        task(data="/nowhere")


def test_an_unknown_hub_name_without_a_network_is_told_of_from_parquet(no_network: None) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataMissing, match=r"some/thing is not at hand.* use from_parquet"):
        images.from_hub("some/thing", 2)


def test_a_download_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Served:
        headers: dict[str, str] = {"content-length": "5"}  # noqa: RUF012

        def raise_for_status(self) -> None: ...

        def iter_content(self, chunk_size: int) -> list[bytes]:
            return [b"other"]

    monkeypatch.setattr("requests.get", lambda *_, **__: Served())
    with pytest.raises(DataUnusable, match="has not the hash md5:28209eda"):
        fetched.pneumoniamnist()
    good = "md5:795f3202b17cb6bc3d4b771d8c6c9eaf"
    assert sources.download("x", "https://x.org/x", good, ["x"]).read_bytes() == b"other"


def test_a_missing_extra_is_answered_by_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parquet(tmp_path / "x", [(8, 8)] * 9)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'turncoat\[data\]'"):
        images.from_parquet(str(folder), 1)


def test_the_example_in_the_documentation_is_true() -> None:
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"__name__": "my_module"}
    exec(compile(code, "my_module.py", "exec"), names)
    parsed = doctest.DocTestParser().get_doctest(text, names, "tasks.md", None, None)
    assert parsed.examples and doctest.DocTestRunner().run(parsed).failed == 0
    trains(names["make_task"]())


@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (4, 5)])
def test_lenets_pooling_is_average_pooling_to_the_second_derivative(shape: tuple[int, int]) -> None:
    maps = torch.randn(3, 2, *shape, dtype=torch.float64, requires_grad=True)
    ours, torchs = _MeanOfFour(shape[1])(maps), avg_pool2d(maps, 2)
    assert torch.allclose(ours, torchs)
    weights = torch.randn_like(torchs)
    (back,) = torch.autograd.grad(ours, maps, weights)
    assert torch.allclose(back, torch.autograd.grad(torchs, maps, weights)[0])
    assert torch.autograd.gradcheck(_MeanOfFour(shape[1]), maps)
    assert torch.autograd.gradgradcheck(lambda x: _MeanOfFour(shape[1])(x) ** 3, maps)
    each = torch.func.vmap(torch.func.grad(lambda x: (_MeanOfFour(shape[1])(x) ** 2).sum()))(maps)
    whole = (_MeanOfFour(shape[1])(maps) ** 2).sum()
    assert torch.allclose(each, torch.autograd.grad(whole, maps)[0])


def test_lenet_can_be_trained_privately() -> None:
    task = bundled.digits(num_clients=4, model=LeNet5())
    start = task.model.initial(Generator().manual_seed(0))
    private = DPSGD(0.1, 1.0, 16, noise_multiplier=1.0)
    payload = private(task.model, start, task.clients[0], rng=Generator().manual_seed(0))
    assert payload.fault(start) is None
