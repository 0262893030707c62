"""Random graphs as recurrent structure: which unit hears which, and what the graph's figures say about the score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pvariance
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attach.targets import find
from ..core.errors import BudgetError, PatternError, TargetError, need
from ..core.support import Support

if TYPE_CHECKING:
    from types import ModuleType

RECURRENT = ("*weight_hh*",)


def watts_strogatz(nodes: int, neighbours: int, rewire: float, *, seed: int = 0) -> Tensor:
    """A connected small world: a ring where each node knows its nearest, and some links lead elsewhere.

    nodes·neighbours/2 links, each rewired with probability `rewire`.

    Args:
        neighbours: of each node on the ring; even, 2 or more, fewer than nodes.
        rewire: 0 = the ring, 1 = nearly a graph by lot.

    Returns:
        The adjacency matrix, bool [nodes, nodes], symmetric, with an empty diagonal.

    Raises:
        BudgetError: the numbers make no such graph, or it stays in pieces however often it is drawn.
        MissingDependency: networkx is not installed.

    Reference: Watts and Strogatz, Collective dynamics of 'small-world' networks, Nature 393, 1998.
    """
    if neighbours < 2 or neighbours % 2 or neighbours >= nodes or not 0.0 <= rewire <= 1.0:
        raise BudgetError(
            "a small world has an even number of neighbours, 2 or more and fewer than nodes, and rewire in [0, 1]; got "
            f"nodes={nodes}, neighbours={neighbours}, rewire={rewire:g}"
        )
    library = _networkx()
    try:
        return _matrix(library.connected_watts_strogatz_graph(nodes, neighbours, rewire, tries=1000, seed=seed))
    except library.NetworkXError as error:
        raise BudgetError(f"{error}; give more neighbours or a smaller rewire") from error


def barabasi_albert(nodes: int, links: int, *, seed: int = 0) -> Tensor:
    """A scale-free graph: each new node links to `links` old ones, the likelier the more links they have.

    links·(nodes − links) links in all, connected.

    Returns:
        The adjacency matrix, bool [nodes, nodes], symmetric, with an empty diagonal.

    Raises:
        BudgetError: links is not between 1 and nodes − 1.
        MissingDependency: networkx is not installed.

    Reference: Barabási and Albert, Emergence of scaling in random networks, Science 286, 1999.
    """
    if not 1 <= links < nodes:
        raise BudgetError(f"each new node has 1 link or more and fewer than nodes, got nodes={nodes}, links={links}")
    return _matrix(_networkx().barabasi_albert_graph(nodes, links, seed=seed))


def recurrent_supports(model: nn.Module, graph: Tensor, *, targets: Iterable[str] = RECURRENT) -> dict[str, Support]:
    """Unit j of a recurrent layer hears unit i, in all its gates, where graph[j, i] is true.

    weight_hh is [gates·units, units] with the gates one block after the other, so the graph is repeated as a whole,
    once per gate. Give the result to `gossamer.attach.hold(model, supports=...)` before training.

    Args:
        graph: bool [units, units].
        targets: the weights to give this structure; all recurrent weights unless named.

    Example:
        >>> handle = hold(model, supports=recurrent_supports(model, watts_strogatz(50, 8, 0.2)))  # doctest: +SKIP

    Raises:
        PatternError: the graph is no square of bools, or a layer has another number of units.
        TargetError: a target matches nothing, or is no recurrent weight.

    Reference: Darji, Investigating Sparsity in Recurrent Neural Networks, arXiv:2407.20601.
    Departs from: the thesis turns the graph into layers without cycles, joined by input weights and skip connections;
        here it is the recurrence itself, as which it needs no order. The official code repeats each row for the gates
        (`repeat` along rows), where torch's layers have a block per gate, so its GRUs and LSTMs are not the graph's.
    """
    if graph.ndim != 2 or graph.shape[0] != graph.shape[1] or graph.dtype != torch.bool:
        raise PatternError(f"a graph is a bool matrix [units, units], got {graph.dtype} {tuple(graph.shape)}")
    supports = {}
    for t in find(model, tuple(targets)).targets:
        rows, units = t.stored(model).shape[:2]
        if not t.tensor.startswith("weight_hh"):
            raise TargetError(f"layer {t.name!r} is no recurrent weight; name weight_hh of RNN, GRU or LSTM layers")
        if units != len(graph) or rows % units:
            raise PatternError(
                f"the graph has {len(graph)} nodes, but layer {t.name!r} is {(rows, units)}; draw one of its hidden "
                "size (a projected LSTM has no such graph)"
            )
        supports[t.name] = Support(graph.to(t.stored(model).device).tile(rows // units, 1))
    return supports


@dataclass(frozen=True)
class GraphStatistics:
    """Figures of a connected graph. Means and variances are over its nodes.

    Args:
        links: undirected.
        density: links over possible links.
        diameter: the longest of all shortest paths. Unit: links.
        path: the mean of all shortest paths. Unit: links.
        clustering: how often two neighbours of a node are neighbours.
        eccentricity: the longest shortest path from a node, on average. Unit: links.
        degree_variance, closeness_variance, betweenness_variance: how unlike the nodes are.
    """

    links: int
    density: float
    diameter: int
    path: float
    clustering: float
    eccentricity: float
    degree_variance: float
    closeness_variance: float
    betweenness_variance: float


def graph_statistics(graph: Tensor) -> GraphStatistics:
    """Its figures.

    Raises:
        PatternError: it is not symmetric, has links from a node to itself, or is in pieces, so that paths are infinite.
        MissingDependency: networkx is not installed.
    """
    if not torch.equal(graph, graph.t()) or bool(graph.diagonal().any()):
        raise PatternError("these figures are of an undirected graph without loops; make it symmetric, diagonal empty")
    library = _networkx()
    made = library.from_numpy_array(graph.int().cpu().numpy())
    if not library.is_connected(made):
        raise PatternError("the graph is in pieces, between which paths are infinite; draw another one")
    far = library.eccentricity(made)
    return GraphStatistics(
        links=made.number_of_edges(),
        density=library.density(made),
        diameter=max(far.values()),
        path=library.average_shortest_path_length(made),
        clustering=library.average_clustering(made),
        eccentricity=fmean(far.values()),
        degree_variance=pvariance([float(d) for _, d in made.degree()]),
        closeness_variance=pvariance(library.closeness_centrality(made).values()),
        betweenness_variance=pvariance(library.betweenness_centrality(made).values()),
    )


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with its 95 % interval (Fisher's transform, standard error 1.06/√(n − 3))."""

    rank: float
    low: float
    high: float


def correlations(
    statistics: Sequence[GraphStatistics | Mapping[str, float]], scores: Sequence[float]
) -> dict[str, Correlation]:
    """How each figure goes with the score, over graphs. Figures that are the same for all graphs are left out.

    Raises:
        BudgetError: there are fewer than five graphs, or not as many scores.
    """
    if len(statistics) != len(scores) or len(scores) < 5:
        raise BudgetError(f"give five graphs or more and a score each, got {len(statistics)} and {len(scores)}")
    rows = [asdict(s) if isinstance(s, GraphStatistics) else s for s in statistics]
    columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
    return {n: _correlation(x, scores) for n, x in columns.items() if len(set(x)) > 1 and len(set(scores)) > 1}


def _correlation(x: Sequence[float], y: Sequence[float]) -> Correlation:
    r = float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])
    middle, wide = math.atanh(max(-1 + 1e-9, min(r, 1 - 1e-9))), 1.96 * 1.06 / math.sqrt(max(len(x) - 3, 1))
    return Correlation(r, math.tanh(middle - wide), math.tanh(middle + wide))


def _ranks(x: Sequence[float]) -> Tensor:
    """From 0; equal numbers share the mean of their ranks."""
    values = torch.tensor(x, dtype=torch.float64)
    below, same = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return below + (same - 1) / 2


def _networkx() -> ModuleType:
    return need("networkx", "graphs")


def _matrix(graph: Any) -> Tensor:
    return torch.from_numpy(_networkx().to_numpy_array(graph, nodelist=sorted(graph))).bool()
