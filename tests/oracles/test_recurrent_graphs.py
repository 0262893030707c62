"""Random graphs as recurrent structure, and the epochs a pruned network needs, against what is worked out by hand."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from gossamer.attach import hold
from gossamer.core.errors import BudgetError, GossamerError, PatternError, TargetError, UnknownName
from gossamer.data.reber import LETTERS, is_reber, reber
from gossamer.recipes.random_graphs import (
    barabasi_albert,
    correlations,
    graph_statistics,
    recurrent_supports,
    watts_strogatz,
)
from gossamer.recipes.regain import regain

KINDS = {
    "tanh": lambda units: nn.RNN(3, units, batch_first=True),
    "relu": lambda units: nn.RNN(3, units, batch_first=True, nonlinearity="relu"),
    "gru": lambda units: nn.GRU(3, units, batch_first=True),
    "lstm": lambda units: nn.LSTM(3, units, batch_first=True),
}


@pytest.mark.parametrize(("nodes", "neighbours", "rewire"), [(5, 2, 0.0), (12, 4, 0.3), (30, 6, 1.0)])
def test_a_small_world_has_its_links(nodes, neighbours, rewire):
    graph = watts_strogatz(nodes, neighbours, rewire, seed=3)
    assert int(graph.sum()) == nodes * neighbours and torch.equal(graph, graph.t()) and not graph.diagonal().any()
    assert torch.equal(graph, watts_strogatz(nodes, neighbours, rewire, seed=3))
    if not rewire:
        ring = [
            [min((i - j) % nodes, (j - i) % nodes) in range(1, neighbours // 2 + 1) for i in range(nodes)]
            for j in range(nodes)
        ]
        assert torch.equal(graph, torch.tensor(ring))


@pytest.mark.parametrize(("nodes", "links"), [(2, 1), (9, 3), (40, 5)])
def test_a_scale_free_graph_has_its_links(nodes, links):
    graph = barabasi_albert(nodes, links, seed=1)
    assert int(graph.sum()) == 2 * links * (nodes - links) and torch.equal(graph, graph.t())
    assert not graph.diagonal().any() and int(graph.sum(1).min()) >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_hears_its_neighbours_and_nobody_else(kind):
    """The Jacobian of one step by the state before has an entry where the graph has a link, in every gate."""
    torch.manual_seed(0)
    graph = watts_strogatz(10, 4, 0.5, seed=2)
    layer = nn.Sequential(KINDS[kind](10)).double()
    hold(layer, supports=recurrent_supports(layer, graph))
    x, c = torch.randn(1, 1, 3).double(), torch.zeros(1, 1, 10).double()

    def step(h: torch.Tensor) -> torch.Tensor:
        return layer[0](x, (h, c) if kind == "lstm" else h)[0].flatten()

    if kind == "relu":
        layer[0].bias_hh_l0.data.fill_(10)  # nobody is silent
    change = torch.autograd.functional.jacobian(step, torch.randn(1, 1, 10).double()).reshape(10, 10)
    if kind == "gru":
        change -= torch.diag(change.diagonal())  # the update gate lets a unit's own state through
    assert torch.equal(change != 0, graph)


@pytest.mark.parametrize(("kind", "gates"), [("tanh", 1), ("gru", 3), ("lstm", 4)])
def test_counts_are_the_graphs_and_training_keeps_them(kind, gates):
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind](8))
    graph = barabasi_albert(8, 2, seed=0)
    supports = recurrent_supports(model, graph)
    assert {n: s.count for n, s in supports.items()} == {"0.weight_hh_l0": gates * 2 * 2 * 6}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    handle = hold(model, supports=supports, optimizer=optimizer)

    def advance(model, optimizer, handle) -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 4, 3))[0].square().sum().backward()
        optimizer.step(), handle.step()

    for _ in range(3):
        advance(model, optimizer, handle)
    kept = supports["0.weight_hh_l0"].kept
    assert not model[0].parametrizations["weight_hh_l0"].original[~kept].any()
    again = nn.Sequential(KINDS[kind](8))
    theirs = torch.optim.Adam(again.parameters(), 0.01)
    other = hold(again, supports=recurrent_supports(again, barabasi_albert(8, 2, seed=9)), optimizer=theirs)
    for part, held in ((again, model), (theirs, optimizer), (other, handle)):
        part.load_state_dict(copy.deepcopy(held.state_dict()))
    for run in ((model, optimizer, handle), (again, theirs, other)):
        torch.manual_seed(5)
        advance(*run), advance(*run)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_figures_of_a_path_and_of_a_complete_graph():
    path = torch.diag(torch.ones(3), 1).bool()
    figures = graph_statistics(path | path.t())
    assert (figures.links, figures.diameter, figures.clustering) == (3, 3, 0.0)
    assert figures.path == pytest.approx(10 / 6) and figures.density == pytest.approx(0.5)
    assert figures.eccentricity == pytest.approx(2.5) and figures.degree_variance == pytest.approx(0.25)
    assert figures.closeness_variance == pytest.approx(((3 / 4 - 1 / 2) / 2) ** 2)
    assert figures.betweenness_variance == pytest.approx((2 / 3 / 2) ** 2)
    full = graph_statistics(~torch.eye(5, dtype=torch.bool))
    assert (full.diameter, full.path, full.clustering, full.density) == (1, 1.0, 1.0, 1.0)
    assert not (full.degree_variance or full.closeness_variance or full.betweenness_variance)


def test_rank_correlations_are_scipys_with_ties_and_an_interval():
    x, y = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0, 1.0]
    found = correlations([{"x": a, "same": 1.0, "y": b} for a, b in zip(x, y)], y)
    assert set(found) == {"x", "y"} and found["y"].rank == pytest.approx(1.0)
    assert found["x"].rank == pytest.approx(spearmanr(x, y).statistic)
    assert found["x"].low < found["x"].rank < found["x"].high
    worlds = [graph_statistics(watts_strogatz(12, 4, p, seed=s)) for s, p in enumerate((0.0, 0.1, 0.3, 0.6, 1.0))]
    assert correlations(worlds, [w.path for w in worlds])["path"].rank == pytest.approx(1.0)


def test_graphs_that_cannot_be_are_refused_in_words():
    for neighbours, rewire in ((3, 0.1), (0, 0.1), (10, 0.1), (4, 1.5)):
        with pytest.raises(BudgetError, match="small world"):
            watts_strogatz(10, neighbours, rewire)
    with pytest.raises(BudgetError, match="1 link or more"):
        barabasi_albert(5, 5)
    graph, model = watts_strogatz(6, 2, 0.0), nn.ModuleDict({"rnn": nn.LSTM(6, 8), "p": nn.LSTM(4, 6, proj_size=3)})
    with pytest.raises(PatternError, match="6 nodes, but layer"):
        recurrent_supports(model, graph)
    with pytest.raises(PatternError, match="projected"):
        recurrent_supports(model, graph, targets=["p.weight_hh*"])
    with pytest.raises(TargetError, match="no recurrent weight"):
        recurrent_supports(model, graph, targets=["rnn.weight_ih*"])
    with pytest.raises(PatternError, match="bool matrix"):
        recurrent_supports(model, graph.float())
    with pytest.raises(TargetError, match="matches none"):
        recurrent_supports(nn.Linear(3, 3), graph)
    pieces = torch.zeros(4, 4, dtype=torch.bool)
    with pytest.raises(PatternError, match="in pieces"):
        graph_statistics(pieces)
    with pytest.raises(PatternError, match="symmetric"):
        graph_statistics(torch.triu(~pieces, 1))
    with pytest.raises(BudgetError, match="five graphs"):
        correlations([{"x": 1.0}], [1.0])


def test_strings_follow_the_grammar_or_miss_it_by_one_letter():
    grammar = re.compile(r"B((TS*X|PT*VP)(XT*VP)*(S|XT*VV)|PT*VV)E")
    held = reber(300, seed=4)
    texts = ["".join(LETTERS[k - 1] for k in row if k) for row in held.letters.tolist()]
    assert len(set(texts)) == 300 and held.valid.sum() == 150 and max(map(len, texts)) <= 30
    for text, row, valid in zip(texts, held.letters, held.valid):
        assert is_reber(text) == bool(valid) == bool(grammar.fullmatch(text))
        assert row[-len(text) :].all() and not row[: -len(text)].any()
    assert torch.equal(held.letters, reber(300, seed=4).letters)
    assert not is_reber("") and not is_reber("BTSXSEE") and not is_reber("BTSXS") and is_reber("BPTVPSE")
    with pytest.raises(GossamerError, match="were found"):
        reber(200, longest=7)
    with pytest.raises(GossamerError, match="1 string or more"):
        reber(0)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def score(model: nn.Module) -> float:
    with torch.no_grad():
        return float((model(X).argmax(1) == Y).float().mean())


def epochs(model: nn.Module, handle):
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5)
    while True:
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step(), handle.step()
        yield


class Free:
    def step(self) -> None: ...


def trained() -> nn.Module:
    model = network()
    for _ in zip(range(15), epochs(model, Free())):
        pass
    return model


def by_hand(model: nn.Module, density: float, most: int, wanted: float) -> list[float]:
    """One threshold over both weights, masks after every step."""
    weights = [model[0].weight, model[2].weight]
    flat = torch.cat([w.detach().abs().flatten() for w in weights])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[: round(density * len(flat))]] = True
    masks = [part.view_as(w) for part, w in zip(kept.split([w.numel() for w in weights]), weights)]
    cut = lambda: [w.data.mul_(m) for w, m in zip(weights, masks)]

    class Cut:
        def step(self) -> None:
            cut()

    for w, m in zip(weights, masks):
        w.register_hook(lambda g, m=m: g * m)
    cut()
    scores = [score(model)]
    for _ in epochs(model, Cut()):
        if scores[-1] >= wanted or len(scores) > most:
            return scores
        scores.append(score(model))
    raise AssertionError


def test_epochs_are_counted_as_by_hand_and_the_model_is_as_it_was():
    model = trained()
    before, dense = copy.deepcopy(model.state_dict()), score(model)
    told = []
    how = {"most": 6, "tolerance": 0.02}
    report = regain(model, epochs, score, densities=(0.9, 0.4, 0.15), progress=lambda *a: told.append(a), **how)
    assert report.dense == dense and [r.kept for r in report.rows] == [90, 40, 15]
    for row in report.rows:
        pruned, *curve = by_hand(copy.deepcopy(model), row.density, 6, dense - 0.02)
        assert row.pruned == pruned and list(row.curve) == curve
        reached = [i for i, s in enumerate([pruned, *curve]) if s >= dense - 0.02]
        assert row.epochs == (reached[0] if reached else None)
    assert {r.epochs for r in report.rows} & {0, 1, 2} and len(told) == 3 and told[-1][1:] == (3, 3)
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before)
    worse = regain(model, epochs, lambda m: -score(m), densities=(0.4,), higher_is_better=False, **how)
    assert worse.rows[0].epochs == report.rows[1].epochs


def test_what_cannot_be_regained_is_refused_in_words():
    model = trained()
    before = copy.deepcopy(model.state_dict())
    go = lambda train=epochs, **how: regain(model, train, score, **{"densities": (0.1,), "most": 2, **how})
    for how in ({"densities": ()}, {"densities": (1.0,)}, {"densities": (0.0,)}, {"most": 0}, {"tolerance": -0.1}):
        with pytest.raises(BudgetError):
            go(**how)
    with pytest.raises(UnknownName):
        go(method="wnada")
    with pytest.raises(TargetError, match="weights alone"):
        go(method="wanda")
    with pytest.raises(TargetError, match="generator"):
        go(lambda model, handle: 3)
    with pytest.raises(TargetError, match="not once"):
        go(lambda model, handle: iter([1, 2]))
    with pytest.raises(TargetError, match="ended after 1 epochs"):
        go(lambda model, handle: (handle.step() for _ in range(1)))
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before)
