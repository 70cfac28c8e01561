"""What stages read and give, alone, wrapped and joined; and the stages that are no rules.

Contract: asks, joins, views. Theorems: pads cancel, nothing less than the whole sum opens, a rule
that streams gives the same bits. Oracle: PyTorch's own SGD. Sabotage: a pad that is not undone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Generator, Tensor, nn

from turncoat.federation import Federation, FixedSample, Plain
from turncoat.messages import Clear, Envelope, Logits, Summable, Update
from turncoat.params import stack
from turncoat.randomness import Randomness
from turncoat.stage import (
    Aggregate,
    IncompatibleStages,
    Memory,
    Plan,
    call,
    gives,
    planned,
    streams,
    takes,
)
from turncoat.stages.aggregate.coordinatewise import Median, TrimmedMean
from turncoat.stages.aggregate.geometric_median import GeometricMedian
from turncoat.stages.aggregate.krum import Krum, MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.optimisers import ServerAdam, ServerMomentum, ServerSGD
from turncoat.stages.channel.secure_aggregation import Masked, SecureAggregation, SumIncomplete
from turncoat.stages.release.queries import Queries
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import Clipped, FedSGD, LocalSGD
from turncoat.task import Model
from turncoat.views import AggregateView, BudgetSpent, ModelView, QueryView, Seat, ServerView

SGD = LocalSGD(0.1)
ROOT = Randomness(0)
MODEL = Model(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)))


def updates(matrix: Tensor) -> list[Update]:
    return [Update(row, 1.0 + i) for i, row in enumerate(matrix)]


def test_what_a_wrapper_reads_is_what_its_inner_stage_reads() -> None:
    assert takes(Mean()) == (Summable,) and takes(Krum(1)) == (Clear,)
    assert Clear in takes(ServerMomentum(0.9, Krum(1)))
    assert Clear not in takes(ServerMomentum(0.9, ServerSGD(0.1, Mean())))
    assert Clear in takes(ServerMomentum(0.9, ServerAdam(0.1, NormBound(Mean(), max_norm=1.0))))


def test_what_a_wrapper_sends_is_what_its_inner_stage_sends() -> None:
    assert gives(Plain(), Update) is Update and gives(Plain(), Logits) is Logits
    assert gives(SecureAggregation(), Update) is Masked
    assert gives(Clipped(1.0, Clipped(2.0, SGD))) is Update


READERS = [
    Krum(1),
    MultiKrum(1),
    Median(),
    TrimmedMean(1),
    GeometricMedian(),
    NormBound(Mean(), max_norm=1.0),
    NormBound(Mean(), ratio=1.0),
    ServerMomentum(0.9, Krum(1)),
    ServerAdam(0.1, ServerSGD(1.0, Median())),
]
LINEAR = [Mean(), ServerSGD(0.5, Mean()), ServerMomentum(0.9, Mean()), ServerAdam(0.1, Mean())]


@pytest.mark.parametrize("rule", READERS, ids=repr)
def test_rules_that_read_each_update_are_refused_behind_masks(rule: Any) -> None:
    with pytest.raises(IncompatibleStages) as refusal:
        Federation(train=SGD, channel=SecureAggregation(), aggregate=rule)
    said = str(refusal.value)
    assert "must read each client's update (Clear)" in said
    assert "gives Masked, which shows the server only the sum of the cohort" in said
    assert "use a rule that needs only the sum (mean), or a channel that shows each (plain)" in said


@pytest.mark.parametrize("rule", LINEAR, ids=repr)
def test_linear_rules_fit_behind_masks(rule: Aggregate[Any]) -> None:
    assert Federation(train=SGD, channel=SecureAggregation(), aggregate=rule).sends is Masked


@pytest.mark.parametrize("rule", [*READERS, *LINEAR], ids=repr)
def test_every_rule_reads_updates_in_the_clear(rule: Aggregate[Any]) -> None:
    assert Federation(train=SGD, channel=Plain(), aggregate=rule).sends is Update


@dataclass(frozen=True)
class Misspelt:
    def __call__(self, messages: Sequence[Clear], *, memroy: Tensor) -> Tensor:
        return memroy


def test_an_unknown_ask_is_refused_with_the_nearest() -> None:
    with pytest.raises(IncompatibleStages, match="did you mean 'memory'"):
        Federation(train=SGD, channel=Plain(), aggregate=NormBound(Misspelt(), max_norm=1.0))


@pytest.mark.parametrize("place", ["train", "channel", "aggregate", "release"])
def test_a_stage_in_the_wrong_place_is_refused(place: str) -> None:
    stages: dict[str, Any] = {"train": SGD, "channel": Plain(), "aggregate": Mean()}
    stages[place] = FixedSample(2)
    with pytest.raises(IncompatibleStages, match=f"cannot stand at {place}"):
        Federation(**stages)


def test_views_follow_from_the_stages() -> None:
    def seen(channel: Any, **more: Any) -> Any:
        return Federation(train=SGD, channel=channel, aggregate=Mean(), **more).views()

    assert seen(Plain())[Seat.SERVER] == (ServerView[Update], AggregateView[Update], ModelView)
    assert ServerView[Masked] in seen(SecureAggregation())[Seat.SERVER]
    assert ServerView[Update] not in seen(SecureAggregation())[Seat.SERVER]
    assert seen(Plain(), release=Queries(budget=3))[Seat.USER] == (QueryView,)


# Masks


def pads(cohort_seed: int, me: int) -> Callable[[int], Generator]:
    return lambda peer: ROOT.at("pair", cohort_seed, min(me, peer), max(me, peer))


def dress(channel: SecureAggregation, sent: Sequence[Update], ids: Sequence[int]) -> list[Masked]:
    return [
        channel(update, envelope=Envelope(me, tuple(ids), 3), pairwise=pads(3, me))
        for me, update in zip(ids, sent, strict=True)
    ]


@pytest.mark.parametrize("num_neighbours", [None, 1, 4, 100])
def test_pads_cancel_in_every_cohort_on_a_connected_and_symmetric_graph(
    num_neighbours: int | None,
) -> None:
    channel = SecureAggregation(num_neighbours)
    for n in range(1, 51):
        ids = [7 * i + 2 for i in range(n)]
        graph = {me: channel.neighbours(Envelope(me, tuple(ids), n)) for me in ids}
        assert all(me in graph[peer] and me != peer for me in ids for peer in graph[me])
        assert len({len(near) for near in graph.values()}) == 1
        reached, edge = {ids[0]}, {ids[0]}
        while edge:
            edge = {peer for me in edge for peer in graph[me]} - reached
            reached |= edge
        assert reached == set(ids)
        sent = updates(torch.randn(n, 3, generator=ROOT.at("x", n)))
        grid = [(u.delta.double() * u.weight / channel.precision).round().long() for u in sent]
        total = sum(m.residue for m in dress(channel, sent, ids))
        assert torch.equal(torch.as_tensor(total), torch.stack(grid).sum(dim=0))


def test_a_sparse_graph_is_sparse_and_differs_from_round_to_round() -> None:
    ids, channel = tuple(range(400)), SecureAggregation()
    here = [channel.neighbours(Envelope(5, ids, round)) for round in range(3)]
    assert {len(near) for near in here} == {18} and len(set(here)) == 3
    assert len(channel.neighbours(Envelope(5, ids[:16], 0))) == 15


def test_the_order_in_which_the_cohort_is_named_changes_no_graph() -> None:
    ids, channel = tuple(range(40)), SecureAggregation()
    there = channel.neighbours(Envelope(5, ids[::-1], 0))
    assert channel.neighbours(Envelope(5, ids, 0)) == there


@settings(max_examples=25, deadline=None)
@given(cohort=st.integers(1, 20), size=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_a_masked_sum_opens_to_the_mean_and_nothing_less_opens(
    cohort: int, size: int, seed: int
) -> None:
    sent = updates(torch.randn(cohort, size, generator=Randomness(seed).at("x")))
    dressed = dress(SecureAggregation(), sent, range(10, 10 + cohort))
    torch.testing.assert_close(
        Mean(max_weight_ratio=1e9)(dressed), Mean(max_weight_ratio=1e9)(sent), atol=1e-6, rtol=0
    )
    for part in (dressed[:-1], dressed[1:]):
        if part:
            with pytest.raises(SumIncomplete, match=f"1 of {cohort} clients are not in this sum"):
                Masked.total(part).open()


def test_tiny_changes_survive_the_grid() -> None:
    sent = [Update(1e-5 * torch.randn(50, generator=ROOT.at("x", i)), 100.0) for i in range(6)]
    opened, clear = Masked.total(dress(SecureAggregation(), sent, range(6))).open(), Mean()(sent)
    assert isinstance(clear, Tensor)
    assert float((opened - clear).abs().max()) < 2.0**-24 / 100


@given(
    st.integers(1, 40) | st.sampled_from([128, 129, 300]),
    st.sampled_from([1, 3, 1 << 15, (1 << 15) + 1]),
    st.integers(0, 99),
)
@example(n=300, size=(1 << 14) + 1, seed=0)
@settings(max_examples=25, deadline=None)
def test_rows_of_a_matrix_have_the_same_total_as_single_vectors(
    n: int, size: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    matrix, weights = torch.randn(n, size, generator=rng), torch.rand(n, generator=rng).tolist()
    listed = [Update(row, w) for row, w in zip(matrix, weights, strict=True)]
    apart = [Update(row.clone(), w) for row, w in zip(matrix, weights, strict=True)]
    found = Update.total(listed)
    for other in (Update.total(apart), Update.total(iter(listed))):
        assert torch.equal(found.delta, other.delta)
        assert found.weight == other.weight


def test_a_total_holds_one_group_of_messages_at_a_time() -> None:
    held, most = 0, 0

    def gone() -> None:
        nonlocal held
        held -= 1

    def stream() -> Iterator[Update]:
        nonlocal held, most
        for i in range(400):
            vector = torch.full((3,), float(i))
            weakref.finalize(vector, gone)
            held += 1
            most = max(most, held)
            yield Update(vector, 1.0)
            del vector

    assert torch.equal(Update.total(stream()).delta, torch.full((3,), 199.5))
    assert 128 <= most <= 130  # the first is kept, and the stream has one in hand


def test_adding_one_by_one_is_the_total() -> None:
    first, second, third = dress(SecureAggregation(), updates(torch.randn(3, 4)), range(3))
    total, added = Masked.total([first, second, third]), first + second + third
    assert torch.equal(total.residue, added.residue)
    assert (total.weight, total.senders) == (added.weight, added.senders)


def test_no_message_counts_twice() -> None:
    first, second = dress(SecureAggregation(), updates(torch.zeros(2, 4)), range(2))
    with pytest.raises(ValueError, match="client 0 is in the sum twice"):
        Masked.total([first, second, first])
    with pytest.raises(ValueError, match="client 0 is in the sum twice"):
        first + first


def test_one_masked_message_is_uniform_whatever_it_hides() -> None:
    sent = [Update(torch.full((40_000,), v), 1.0) for v in (5.0, 0.0)]
    dressed = dress(SecureAggregation(), sent, range(2))
    for message in dressed:
        for byte in message.residue.numpy().view(np.uint8).reshape(-1, 8).T:
            assert chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-6


def test_a_pad_that_is_not_undone_destroys_the_sum() -> None:
    sent, channel = updates(torch.ones(2, 100)), SecureAggregation()
    first, second = dress(channel, sent, range(2))
    stranger = channel(sent[1], envelope=Envelope(1, (0, 1), 3), pairwise=pads(4, 1))
    assert float(Masked.total([first, second]).open().abs().max()) < 2
    assert float(Masked.total([first, stranger]).open().abs().max()) > 1e6


def test_a_claimed_weight_counts_for_no_more_than_the_cap() -> None:
    sent = [Update(torch.zeros(2), 100.0), Update(torch.ones(2), 1e12)]
    total = Masked.total(dress(SecureAggregation(max_weight=100.0), sent, range(2)))
    assert total.weight == 200.0 and total.open().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("value", [1e9, -1e9, float("inf"), float("nan")])
def test_a_change_that_could_leave_the_ring_is_refused(value: float) -> None:
    sent = [Update(torch.tensor([0.0, value]), 1.0)]
    with pytest.raises(ValueError, match=r"carries changes up to 2.749e\+07 .*: clip the updates"):
        dress(SecureAggregation(), sent, [0])


def test_the_largest_changes_that_are_accepted_add_up() -> None:
    channel, n = SecureAggregation(max_weight=1000.0), 9
    most = 2.0**62 * channel.precision / (n * 1000)
    sent = [Update(torch.tensor([most, -most]) * 0.999, 1000.0)] * n
    opened = Masked.total(dress(channel, sent, range(n))).open()
    torch.testing.assert_close(opened, torch.tensor([most, -most]) * 0.999)


def test_survivors_dress_anew_if_enough_of_them_remain() -> None:
    sent, channel = updates(torch.ones(4, 3)), SecureAggregation(recovers_from=3)
    survivors = dress(channel, sent[:3], [0, 1, 3])
    assert Masked.total(survivors).open().tolist() == [1, 1, 1]
    with pytest.raises(SumIncomplete, match="needs 3 clients to the end; 2 are left"):
        dress(channel, sent[:2], [0, 1])


def test_a_masked_parameter_takes_eight_bytes() -> None:
    (message,) = dress(SecureAggregation(), updates(torch.zeros(1, 10)), [0])
    assert message.num_bytes == 88 and "residue" not in repr(message)


@pytest.mark.parametrize(
    "fields",
    [{"num_neighbours": 0}, {"max_weight": 0.0}, {"precision": -1.0}, {"recovers_from": 0}],
)
def test_impossible_masks_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"SecureAggregation: {next(iter(fields))} must be"):
        SecureAggregation(**fields)


# Streams


def once(messages: Iterable[Update]) -> Iterator[Update]:
    yield from messages


@pytest.mark.parametrize(
    "rule", [*LINEAR, NormBound(Mean(), max_norm=2.0), NormBound(Mean(), ratio=1.0)], ids=repr
)
def test_a_stream_gives_the_bits_of_a_list_and_is_read_once(rule: Any) -> None:
    assert streams(rule)
    sent = updates(torch.randn(300, MODEL.layout.num_params, generator=ROOT.at("x")))
    stream = once(sent)
    offers: list[dict[str, Any]] = [{"model": MODEL, "memory": Memory()} for _ in range(2)]
    assert torch.equal(call(rule, sent, **offers[0]), call(rule, stream, **offers[1]))
    assert next(stream, None) is None


@pytest.mark.parametrize("rule", [Krum(1), ServerMomentum(0.9, Krum(1))], ids=repr)
def test_a_rule_that_compares_does_not_stream(rule: Any) -> None:
    assert not streams(rule)


def test_rows_reach_the_inner_rule_without_a_copy() -> None:
    matrix, seen = torch.randn(6, 5), []

    @dataclass(frozen=True)
    class Looks:
        def __call__(self, messages: Sequence[Clear]) -> Tensor:
            seen.append(stack([m.delta for m in messages]).data_ptr())
            return messages[0].delta

    call(ServerSGD(1.0, NormBound(Looks(), max_norm=1e6)), updates(matrix), model=MODEL)
    assert seen == [matrix.data_ptr()]


# Training


DATA = torch.randn(30, 4, generator=ROOT.at("d")), torch.arange(30) % 5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch_size", [None, 8])
def test_local_training_is_pytorchs_sgd(batch_size: int | None, momentum: float) -> None:
    start = MODEL.initial(ROOT.at("m"))
    rule = LocalSGD(0.1, 2, batch_size, momentum, weight_decay=0.01)
    sent = rule(MODEL, start, DATA, rng=ROOT.at("t"))
    module = MODEL.build()
    torch.nn.utils.vector_to_parameters(start.clone(), module.parameters())
    optimiser = torch.optim.SGD(module.parameters(), 0.1, momentum, weight_decay=0.01)
    rng = ROOT.at("t")
    for _ in range(2):
        order = torch.randperm(30, generator=rng)
        for chosen in order.split(batch_size or 30):  # type: ignore[no-untyped-call]
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(DATA[0][chosen]), DATA[1][chosen]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    expected = torch.nn.utils.parameters_to_vector(module.parameters()).detach() - start
    torch.testing.assert_close(sent.delta, expected, atol=1e-6, rtol=1e-4)
    assert sent.weight == 30


def test_fedsgd_is_one_gradient() -> None:
    start = MODEL.initial(ROOT.at("m"))
    sent = FedSGD(0.5)(MODEL, start, DATA, rng=ROOT.at("t"))
    torch.testing.assert_close(sent.delta, -0.5 * MODEL.gradient(start, DATA))


def test_clipping_shortens_and_does_not_turn() -> None:
    start = MODEL.initial(ROOT.at("m"))
    free = SGD(MODEL, start, DATA, rng=ROOT.at("t")).delta
    for radius in (0.5 * float(free.norm()), 2 * float(free.norm())):
        sent = Clipped(radius, SGD)(MODEL, start, DATA, rng=ROOT.at("t")).delta
        torch.testing.assert_close(sent, free * min(1.0, radius / float(free.norm())))


def test_a_calibrated_stage_is_fitted_inside_its_wrapper() -> None:
    dp = DPSGD(0.1, 1.0, 8, target_epsilon=4.0, delta=1e-5, num_steps=2)
    fitted = planned(Clipped(1.0, dp), Plan(2, (40, 30)))
    assert fitted.inner == replace(
        dp, noise_multiplier=fitted.inner.noise_multiplier, target_epsilon=None, delta=None
    )


# Release


PARAMS = MODEL.initial(ROOT.at("m"))
SCORES = MODEL.logits(PARAMS, DATA[0]).log_softmax(dim=1).detach()


def test_queries_answer_with_log_probabilities_until_the_budget_is_spent() -> None:
    view = Queries(budget=40)(MODEL, PARAMS)
    assert torch.equal(view.scores(DATA[0]), SCORES)
    with pytest.raises(BudgetSpent, match="60 queries asked; the budget is 40"):
        view.scores(DATA[0])
    assert view.scores(DATA[0][:10]).shape == (10, 5) and view.num_queries == 40


def test_queries_round() -> None:
    scores = Queries(decimals=1)(MODEL, PARAMS).scores(DATA[0])
    assert torch.equal(scores, SCORES.round(decimals=1)) and not torch.equal(scores, SCORES)


def test_labels_only_tells_labels_and_nothing_else() -> None:
    scores = Queries(labels_only=True)(MODEL, PARAMS).scores(DATA[0])
    assert torch.equal(scores.argmax(dim=1), SCORES.argmax(dim=1))
    assert len(torch.unique(scores)) == 2 and bool(scores.isfinite().all())


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_top_k_tells_k_and_shares_the_rest_evenly(k: int) -> None:
    scores = Queries(top_k=k)(MODEL, PARAMS).scores(DATA[0])
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(30))
    best = SCORES.topk(min(k, 5), dim=1)
    assert torch.equal(scores.gather(1, best.indices), best.values)
    rest = scores.scatter(1, best.indices, -torch.inf).exp()
    assert all(len(torch.unique(row[row > 0])) <= 1 for row in rest)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"budget": 0}, "budget must be at least 1"),
        ({"decimals": -1}, "decimals must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"labels_only": True, "decimals": 2}, "labels_only has no scores"),
    ],
)
def test_impossible_releases_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Queries(**fields)
