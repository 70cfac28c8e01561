"""Property inference: federations are told apart by the share of a group in their data.

Kinds: theorem (the draws have their shares, and nothing else differs; the order of neurons does not
matter), oracle (a threshold and an excess of losses by hand, the paths that records pass), baseline
(equal shares: chance), sabotage (noise in training; answers withheld; swapped kinds), contract (bad
shares, too few records, wrong games).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from turncoat.attacks.property.losses import LossTest, ThresholdTest
from turncoat.attacks.property.queries import QueryClassifier
from turncoat.attacks.property.updates import AggregateClassifier, UpdateClassifier
from turncoat.attacks.property.weights import MetaClassifier, in_order, layers_of, slopes
from turncoat.audit import Audit, Entry, run_audit
from turncoat.federation import Federation, Plain, Same
from turncoat.games.membership import Membership
from turncoat.games.properties import PropertyInference
from turncoat.plan import plan, pose, world_of
from turncoat.randomness import Randomness
from turncoat.stage import call
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.release.queries import Queries
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model, Shards, Task
from turncoat.tasks.models import MLP, Built, ConvNet
from turncoat.trial import Blocked, Cell, Failed, Leanings, Scored, Trial, UnknownQuestion
from turncoat.views import ModelView, Seat, Suspects, Worlds

RANDOM = Randomness(3)
GAME = PropertyInference((0.1, 0.9), column=0, num_suspects=16)
BEGUN = PropertyInference((0.1, 0.9), column=0, num_suspects=16, same_start=True)
SGD = LocalSGD(0.5, num_epochs=2, batch_size=20)
torch.set_num_threads(1)


@cache
def people(hidden: tuple[int, ...] = ()) -> Task:
    """Return a table whose first column is a group, for which the label follows another rule."""

    def drawn(purpose: str, num: int) -> Batch:
        rng = RANDOM.at(purpose)
        rows = torch.randn(num, 4, generator=rng)
        rows[:, 0] = (torch.rand(num, generator=rng) < 0.5).float()
        rule = torch.where(rows[:, 0] > 0, rows[:, 1], rows[:, 2])
        return rows, (rule + 0.3 * torch.randn(num, generator=rng) > 0).long()

    clients = Shards.of(drawn("clients", 480), [torch.arange(c, 480, 4) for c in range(4)])
    model = Model(Built(MLP(hidden), (4,), 2))
    return Task("people", model, clients, drawn("test", 100), public=drawn("public", 480))


def federation(channel: Any = None, aggregate: Any = None, **more: Any) -> Federation[Any, Any]:
    return Federation(train=SGD, channel=channel or Plain(), aggregate=aggregate or Mean(), **more)


def audit_of(
    attacks: dict[str, Any],
    game: PropertyInference = GAME,
    hidden: tuple[int, ...] = (),
    seat: Seat = Seat.SERVER,
    **stages: Any,
) -> Audit:
    entries = {name: Entry(Trial(attack, game), (seat,)) for name, attack in attacks.items()}
    return Audit("shares", people(hidden), {"none": federation(**stages)}, entries, 2, (0,))


def cells_of(folder: Path, *given: Any, **options: Any) -> dict[str, Cell]:
    cells = run_audit(audit_of(*given, **options), folder)
    return {planned.attack: cell for planned, cell in cells.items()}


def accuracy(cell: Cell) -> Any:
    assert isinstance(cell, Scored), cell
    return cell.marked.headline


MODELS = {
    "threshold": ThresholdTest(12),
    "loss": LossTest(),
    "calibrated": LossTest(12),
    "answers": QueryClassifier(12),
    "parameters": MetaClassifier(12),
}
ROUNDS = {"updates": UpdateClassifier(12), "aggregates": AggregateClassifier(12)}


def test_a_model_tells_two_shares_apart(tmp_path: Path) -> None:
    for name, cell in cells_of(tmp_path, MODELS).items():
        assert accuracy(cell).low > 0.5, name


def test_nothing_tells_equal_shares_apart(tmp_path: Path) -> None:
    equal = PropertyInference((0.5, 0.5), column=0, num_suspects=16)
    for name, cell in cells_of(tmp_path, MODELS | ROUNDS, equal).items():
        assert accuracy(cell).low < 0.5 < accuracy(cell).high, name


def test_noise_in_training_takes_classifiers_towards_chance(tmp_path: Path) -> None:
    attacks = {"parameters": MetaClassifier(12), "answers": QueryClassifier(12)}
    noisy = DPFedAvg(max_norm=0.1, noise_multiplier=20.0, expected_cohort=4)
    plain = cells_of(tmp_path / "plain", attacks)
    noised = cells_of(tmp_path / "noised", attacks, aggregate=noisy)
    for name in attacks:
        without, private = accuracy(plain[name]), accuracy(noised[name])
        assert without.low > 0.5 and private.low < 0.5
        assert private.value < without.value - 0.2


def test_answers_and_paths_tell_a_net_whose_parameters_do_not(tmp_path: Path) -> None:
    attacks = {
        "answers": QueryClassifier(24),
        "paths": MetaClassifier(24, "paths"),
        "in order": MetaClassifier(24, "flat"),
    }
    found = cells_of(tmp_path, attacks, hidden=(6,))
    for name in ("answers", "paths"):
        assert accuracy(found[name]).low > 0.5
        assert accuracy(found[name]).value > accuracy(found["in order"]).value


@pytest.mark.parametrize(("budget", "enough"), [(40, True), (39, False)])
def test_whoever_may_only_ask_can_mount_it_if_they_may_ask_enough(
    tmp_path: Path, budget: int, enough: bool
) -> None:
    few = replace(GAME, num_suspects=8)
    attacks = {"answers": QueryClassifier(8, 40), "parameters": MetaClassifier(8)}
    release = Queries(budget=budget)
    found = cells_of(tmp_path, attacks, few, seat=Seat.USER, release=release)
    assert isinstance(found["parameters"], Blocked)
    assert isinstance(found["answers"], Scored if enough else Failed)


def test_masked_updates_block_the_server_and_the_sum_still_tells(tmp_path: Path) -> None:
    plain = cells_of(tmp_path / "plain", ROUNDS, BEGUN)
    masked = cells_of(tmp_path / "masked", ROUNDS, BEGUN, channel=SecureAggregation())
    assert isinstance(masked["updates"], Blocked)
    for cell in (plain["updates"], plain["aggregates"], masked["aggregates"]):
        assert accuracy(cell).low > 0.5


def test_one_client_is_told_by_its_own_updates(tmp_path: Path) -> None:
    game = replace(BEGUN, client=2)
    found = cells_of(tmp_path, {"updates": UpdateClassifier(12)}, game)["updates"]
    assert accuracy(found).low > 0.5


def test_attacks_on_one_game_share_its_federations() -> None:
    attacks = {
        "few": MetaClassifier(4),
        "many": ThresholdTest(6),
        "none": LossTest(),
        "as few": LossTest(4),
    }
    planned = plan(audit_of(attacks))
    assert sum(t.shadow is not None for t in planned.trainings.values()) == 16 + 6


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    few = replace(BEGUN, num_suspects=2)
    audit = audit_of({"updates": UpdateClassifier(2), "parameters": MetaClassifier(2)}, few)
    alone, two = (run_audit(audit, tmp_path / str(n), num_jobs=n) for n in (1, 2))
    assert [*alone.values()] == [*two.values()]
    assert all(isinstance(cell, Scored) for cell in alone.values())


@pytest.mark.parametrize("client", [None, 1])
def test_worlds_have_their_shares_and_share_neither_records_nor_seeds(client: int | None) -> None:
    game = PropertyInference((0.2, 0.8), column=0, client=client, num_suspects=4)
    audit = audit_of({"one": MetaClassifier(4)}, game)
    posed = pose(audit, federation(), game, -1, 0)
    question, truth = posed
    assert truth.second.sum() == 2
    private, public = (
        {tuple(r) for r in x[0].tolist()} for x in (truth.records, question.population)
    )
    sizes, seeds = set(), set()
    for i in range(8):
        _, task, seed, second = world_of(audit, federation(), game, i, 0, posed)
        sizes.add(task.sizes)
        seeds.add(seed)
        for c, (inputs, _) in enumerate(task.clients):
            share = (0.2, 0.8)[second] if client in (None, c) else 0.5
            assert float((inputs[:, 0] > 0).float().mean()) == pytest.approx(share, abs=0.02)
        held = [tuple(r) for inputs, _ in task.clients for r in inputs.tolist()]
        assert len(set(held)) == len(held)
        assert set(held) <= (private if i < 4 else public)
    assert len(sizes) == 1 and len(seeds) == 8


def test_same_start_is_the_same_for_all_and_otherwise_is_not() -> None:
    def starts(same_start: bool) -> list[Tensor]:
        game = PropertyInference((0.2, 0.8), column=0, num_suspects=4, same_start=same_start)
        audit = audit_of({"one": MetaClassifier(4)}, game)
        posed, found = pose(audit, federation(), game, -1, 0), []
        for i in range(2):
            played, task, seed, _ = world_of(audit, federation(), game, i, 0, posed)
            found.append(call(played.begin, task, rng=Randomness(seed).at("begin")))
        return found

    assert torch.equal(*starts(True))
    assert not torch.equal(*starts(False))


def shuffled(model: Model, params: Tensor) -> Tensor:
    """Return the parameters with the hidden neurons of each layer in another order."""
    named = {k: v.clone() for k, v in model.layout.split(params).items()}
    weights = [n for n in named if n.endswith("weight")]
    for first, second in pairwise(weights):
        order = torch.randperm(len(named[first]), generator=RANDOM.at("order"))
        bias = first.replace("weight", "bias")
        named[first], named[bias] = named[first][order], named[bias][order]
        after = named[second]
        grouped = after.reshape(len(after), len(order), -1)
        named[second] = grouped[:, order].reshape(after.shape)
    return torch.cat([v.reshape(-1) for v in named.values()])


@pytest.mark.parametrize("order", ["sets", "paths", "sorted"])
@pytest.mark.parametrize(
    ("architecture", "shape"), [(MLP((5, 4)), (3,)), (ConvNet((4, 3)), (2, 6, 6))], ids=repr
)
def test_a_meta_classifier_is_blind_to_the_order_of_neurons(
    order: Any, architecture: Any, shape: tuple[int, ...]
) -> None:
    model = Model(Built(architecture, shape, 2))
    params = torch.stack([model.initial(RANDOM.at("start", i)) for i in range(9)])
    inputs = torch.randn(4, *shape, generator=RANDOM.at("inputs"))
    other = shuffled(model, params[0])
    assert torch.allclose(model.logits(params[0], inputs), model.logits(other, inputs), atol=1e-5)
    views = tuple(ModelView(model, p) for p in params)
    shadows = Worlds(views[1:], torch.arange(8) % 2 == 0)
    own = inputs, torch.zeros(4).long()

    def score(one: Tensor) -> float:
        suspects = Suspects((ModelView(model, one), views[1]))
        attack = MetaClassifier(8, order, num_steps=20)
        return float(
            attack(suspects, population=own, shadows=shadows, rng=RANDOM.at("meta")).scores[0]
        )

    assert score(other) == pytest.approx(score(params[0]), abs=1e-3)


def test_answers_are_blind_to_the_order_of_neurons() -> None:
    model = Model(Built(MLP((5, 4)), (3,), 2))
    params = [model.initial(RANDOM.at("start", i)) for i in range(9)]
    views = tuple(ModelView(model, p) for p in params)
    suspects = Suspects((views[0], ModelView(model, shuffled(model, params[0]))))
    population = torch.randn(30, 3, generator=RANDOM.at("asked")), torch.zeros(30).long()
    shadows: Any = Worlds(views[1:], torch.arange(8) % 2 == 0)
    first, second = QueryClassifier(8, 20)(
        suspects, population=population, shadows=shadows, rng=RANDOM.at("attack")
    ).scores
    assert float(first) == pytest.approx(float(second), abs=1e-4)


def test_paths_count_as_often_as_records_pass_them() -> None:
    model = Model(Built(MLP((5,)), (3,), 2))
    params = model.initial(RANDOM.at("start"))
    named = model.layout.split(params)
    records = torch.randn(40, 3, generator=RANDOM.at("records"))
    passed = records @ named["1.weight"].T + named["1.bias"] > 0
    assert 0 < passed.float().mean() < 1
    product = named["3.weight"] * passed.float().mean(dim=0) @ named["1.weight"]
    outputs = model.logits(params, records).mean(dim=0)
    found = slopes([ModelView(model, params)], records)[0]
    expected = torch.cat([(product - product.mean(dim=0)).flatten(), outputs - outputs.mean()])
    assert torch.allclose(found, expected, atol=1e-6)


def test_sorted_neurons_rise_by_their_weights() -> None:
    model = Model(Built(MLP((5,)), (3,), 2))
    params = model.initial(RANDOM.at("start"))
    first = in_order(layers_of(None, model.layout, params[None]))[0, :15].reshape(5, 3)
    assert bool((first.sum(dim=1).diff() >= 0).all())


def answers(losses: list[tuple[float, float]]) -> tuple[Any, ...]:
    """Return views whose loss on records of 0 and of 1 is what is said."""

    class Said:
        def __init__(self, pair: tuple[float, float]) -> None:
            self.pair = torch.tensor(pair)

        def scores(self, inputs: Tensor) -> Tensor:
            return -self.pair[inputs[:, 0].long()][:, None]

    return tuple(map(Said, losses))


SAMPLES = tuple((torch.full((3, 1), float(k)), torch.zeros(3, dtype=torch.long)) for k in (0, 1))


def test_the_loss_test_takes_the_kind_of_lower_loss() -> None:
    view: Any = Suspects(answers([(0.2, 0.5), (0.6, 0.5)]))
    samples: Any = SAMPLES
    scores = LossTest()(view, samples=samples, shadows=None).scores
    assert scores.tolist() == pytest.approx([-0.3, 0.1])


def test_losses_are_counted_from_those_of_own_models_of_that_kind() -> None:
    """Own models of the first kind have 0.8 on it, those of the second 0.2 on that."""
    known = [(0.7, 0.3), (0.9, 0.3), (0.9, 0.1), (0.9, 0.3)]
    shadows: Any = Worlds(answers(known), torch.tensor([False, False, True, True]))
    view: Any = Suspects(answers([(0.8, 0.3), (1.0, 0.25)]))
    samples: Any = SAMPLES
    scores = LossTest(4)(view, samples=samples, shadows=shadows).scores
    assert scores.tolist() == pytest.approx([-0.1, 0.15])
    assert (LossTest()(view, samples=samples, shadows=None).scores > 0).all()


def test_a_threshold_is_learned_where_one_kind_is_always_easier() -> None:
    known = [(0.9, 0.1), (0.8, 0.1), (0.5, 0.1), (0.4, 0.1)]
    shadows: Any = Worlds(answers(known), torch.tensor([False, False, True, True]))
    view: Any = Suspects(answers([(0.85, 0.1), (0.45, 0.1)]))
    samples: Any = SAMPLES
    scores = ThresholdTest(4)(view, samples=samples, shadows=shadows).scores
    assert scores.tolist() == pytest.approx([-0.2, 0.2])
    assert (LossTest()(view, samples=samples, shadows=None).scores > 0).all()


def test_scores_are_marked_by_their_sign() -> None:
    _, truth = pose(audit_of({"one": LossTest()}), federation(), GAME, -1, 0)
    right = truth.second.double() - 0.5
    for scores, value in ((right, 1.0), (-right, 0.0), (torch.zeros(16), 0.5)):
        marked = GAME.mark(Leanings(scores), truth, rng=RANDOM.at("mark"))
        assert marked.headline.value == value
    with pytest.raises(ValueError, match="a score for each of 16 suspects"):
        GAME.mark(Leanings(torch.zeros(3)), truth, rng=RANDOM.at("mark"))


@dataclass(frozen=True)
class OfOne:
    """An attack on one federation."""

    def __call__(self, view: ModelView) -> Leanings:
        return Leanings(torch.zeros(1))


def test_what_cannot_be_asked_is_refused() -> None:
    def ask(**options: Any) -> None:
        game = PropertyInference(**({"num_suspects": 4} | options))
        pose(audit_of({"one": LossTest()}, game), federation(), game, -1, 0)

    with pytest.raises(ValueError, match="lower num_records"):
        ask(column=0, num_records=5_000)
    with pytest.raises(ValueError, match="name a column of a table"):
        ask(column=9)
    with pytest.raises(ValueError, match="client 7, who never took part"):
        ask(column=0, client=7)
    with pytest.raises(UnknownQuestion, match="takes a view of one"):
        Trial[Any](OfOne(), GAME)
    with pytest.raises(UnknownQuestion, match="asks for 'samples'"):
        Trial[Any](LossTest(), Membership())
    with pytest.raises(ValueError, match="neither a coalition nor a server"):
        Trial[Any](LossTest(), GAME, server=Same())
    with pytest.raises(ValueError, match="have the audit play them"):
        MetaClassifier()(Suspects(()), population=SAMPLES[0], shadows=None, rng=RANDOM.at("x"))
    with pytest.raises(ValueError, match="have the audit play them"):
        LossTest(4)(Suspects(answers([(0.1, 0.2)])), samples=SAMPLES, shadows=None)  # type: ignore[arg-type]
