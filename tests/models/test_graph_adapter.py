"""Graphs: depths, edges in tokens, a bias by depth, and what is refused."""

import math

import pytest
import torch
from data._refused import refused, taken
from models._added import CONFIG, check_others_keep_their_bits, check_packed_is_padded, check_rows_stand_alone, extended

from onepeace_fast.layers.adapters import GraphAdapter
from onepeace_fast.layers.adapters.graph import depths

NONE = torch.zeros(0, 3, dtype=torch.int64)
# A ring of five with a tail to node 5, and nodes 6 and 7 apart; types 0 and 1.
RING = torch.tensor([[0, 1, 0], [1, 2, 1], [2, 3, 0], [3, 4, 1], [4, 0, 0], [2, 5, 1], [6, 7, 0]])
CHAIN = torch.tensor([[i, i + 1, i % 2] for i in range(7)])


def make(config):
    return GraphAdapter(config, features=2, edge_types=2, deepest=3, longest=8)


def nodes(count, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed + count), dtype=torch.float64)


def batch(*graphs):
    return make(CONFIG).batch("other", [*graphs])


GRAPHS = [(nodes(8), RING), (nodes(1), NONE), (nodes(4), CHAIN[:3])]


def test_graphs_leave_all_other_outputs_bitwise_alone():
    check_others_keep_their_bits(make)


@pytest.mark.parametrize(
    "graphs",
    [GRAPHS, [(nodes(1), NONE)], [(nodes(0), NONE), (nodes(8), CHAIN), (nodes(2), NONE)], [GRAPHS[0]] * 2],
    ids=["ragged", "one node", "empty and longest", "duplicates"],
)
def test_graphs_are_one_packed_and_padded_in_value_and_gradient(graphs):
    check_packed_is_padded(make, batch(*graphs))


def test_graphs_that_are_all_empty_are_their_cls():
    inputs = batch((nodes(0), NONE), (nodes(0), NONE))
    assert inputs["other"].shape == (2, 0, 9)
    assert extended(make).encode(**inputs)["other"].shape == (2, 1, 48)


def test_graphs_embed_as_they_do_alone():
    check_rows_stand_alone(make, batch(*GRAPHS), [batch(graph) for graph in GRAPHS])


def test_the_order_of_nodes_behind_the_first_and_of_edges_does_not_matter():
    model, features = extended(make), nodes(8)
    order = torch.tensor([0, 5, 3, 7, 1, 2, 6, 4])  # where each node goes
    moved = torch.cat([order[RING[:, :2]], RING[:, 2:]], dim=1).flip(0)
    shuffled = torch.empty_like(features).index_copy_(0, order, features)
    torch.testing.assert_close(model.embed(**batch((shuffled, moved))), model.embed(**batch((features, RING))))


def test_depths_are_shortest_ways_from_node_0_against_edges_too():
    assert depths(8, RING[:, :2].tolist()) == [0, 1, 2, 2, 1, 3, None, None]
    assert depths(4, [[3, 0], [3, 2], [1, 2], [2, 2]]) == [0, 3, 2, 1]
    assert depths(0, []) == [] and depths(2, []) == [0, None]


def test_a_node_s_numbers_are_its_own_its_neighbours_and_its_edges_by_type():
    features = nodes(8)
    value = batch((features, RING))["other"][0]
    assert value[:, 0].tolist() == [1, 2, 3, 3, 2, 4, 8, 8]  # behind the deepest depth, 3, comes what is apart
    assert torch.equal(value[:, 1:3], features)
    around = [[1, 4], [0, 2], [1, 3, 5], [2, 4], [3, 0], [2], [7], [6]]
    torch.testing.assert_close(value[:, 3:5], torch.stack([features[others].sum(0) for others in around]))
    leaving = [[1, 0], [0, 1], [1, 1], [0, 1], [1, 0], [0, 0], [1, 0], [0, 0]]
    entering = [[1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [0, 0], [1, 0]]
    assert value[:, 5:7].tolist() == leaving and value[:, 7:].tolist() == entering


def test_nodes_deeper_than_the_deepest_share_its_position_and_edges_count_each_time():
    value = batch((nodes(8), CHAIN), (nodes(2), torch.tensor([[0, 1, 0], [0, 1, 0], [1, 1, 1]])))["other"]
    assert value[0, :, 0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4]
    assert value[1, :2, 5:].tolist() == [[2, 0, 0, 0], [0, 1, 2, 1]]


def test_a_token_is_the_projection_of_its_numbers_and_the_embedding_of_its_depth():
    adapter = extended(make).encoder.adapter("other")
    value = batch((nodes(8), RING))["other"]
    found, places = adapter(value)[0], [1, 2, 3, 3, 2, 4, 5, 5]
    linear, positions = adapter.embed_nodes, adapter.embed_positions
    expected = value[0, :, 1:] @ linear.weight.t() + linear.bias + positions[places]
    torch.testing.assert_close(found[1:], expected)
    torch.testing.assert_close(found[0], adapter.cls_embedding[0, 0] + positions[0])


def test_the_bias_of_two_nodes_is_that_of_the_difference_of_their_depths_and_apart_is_further():
    adapter = make(CONFIG)
    index = adapter.dense_table_index(adapter.position_count)
    for query in range(4):
        for key in range(4):
            assert index[1 + query, 1 + key] == query - key + 4
    apart = adapter.position_count - 1
    assert (index[apart, 1:5] == 8).all() and (index[1:5, apart] == 0).all() and index[apart, apart] == 4
    assert (index[0, 1:] == 9).all() and (index[1:, 0] == 10).all() and index[0, 0] == 11
    assert len(adapter.rel_pos_table_list[0].weight) == 12


@pytest.mark.parametrize(
    ("graph", "start", "part"),
    [
        ((nodes(3), torch.tensor([[0, 1, 0], [2, 3, 0]])), "other, graphs[1], edge 1: expected nodes 0 to 2", "2 to 3"),
        ((nodes(3), torch.tensor([[-1, 1, 0]])), "other, graphs[1], edge 0: expected nodes 0 to 2", "got -1 to 1"),
        ((nodes(3), torch.tensor([[0, 1, 2]])), "other, graphs[1], edge 0: expected a type from 0 to 1", "got 2"),
        ((nodes(3), torch.tensor([[0, 1]])), "other, graphs[1]: expected edges [edges, 3]", "int64 [1, 2]"),
        ((nodes(3), torch.zeros(1, 3)), "other, graphs[1]: expected int64 edges [edges, 3]", "float32 [1, 3]"),
        ((nodes(3)[:, :1], NONE), "other, graphs[1]: expected nodes [nodes, 2]", "float64 [3, 1]"),
        ((nodes(3) * math.nan, NONE), "other, graphs[1]: expected finite features", "got others"),
        ((nodes(9), NONE), "other, graphs[1]: expected up to 8 nodes", "got 9"),
        (nodes(3), "other, graphs[1]: expected a pair of nodes and edges", "float64 [3, 2]"),
    ],
)
def test_graphs_that_do_not_fit_are_refused_by_their_place(graph, start, part):
    refused(lambda: batch(GRAPHS[0], graph), start, part)


def test_a_graph_of_one_type_of_edges_has_two_numbers_for_each():
    adapter = GraphAdapter(CONFIG, features=2)
    assert adapter.batch("other", [(nodes(2), torch.tensor([[0, 1]]))])["other"].shape == (1, 2, 7)
    refused(lambda: adapter.batch("other", [(nodes(2), RING)]), "other, graphs[0]: expected edges [edges, 2]")


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (torch.ones(1, 9, 9), "with nodes up to 8, got float64 [1, 9, 9]"),
        (torch.ones(1, 8, 8), "expected [rows, nodes, 9]"),
        (torch.ones(1, 9), "expected float64 [rows, nodes, 9], got float64 [1, 9]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(value, part):
    refused(lambda: extended(make).embed(other=value.double()), "other: ", part)


def test_positions_that_are_none_are_counted_at_real_nodes():
    value, padding = torch.zeros(1, 8, 9), torch.zeros(1, 9, dtype=torch.bool)
    value[0, :, 0] = torch.tensor([1, 4, 8, 0, 5, 1.5, math.nan, 0])
    padding[0, 8] = True
    assert [int(count) for count, _ in make(CONFIG).faults("other", value, padding)] == [0, 4]
    refused(lambda: extended(make).embed(other=value.double()), "other: ", "positions by depth", "got 5 others")


def test_the_largest_graph_is_taken():
    with taken():
        assert extended(make).encode(**batch((nodes(8), CHAIN)))["other"].shape == (1, 9, 48)


@pytest.mark.parametrize(
    ("changed", "start"),
    [
        ({"edge_types": 0}, "edge_types: "),
        ({"deepest": 101}, "deepest: expected an integer from 1 to 100, got int 101"),
        ({"features": -1}, "features: expected an integer of at least 0, got int -1"),
        ({"longest": 0}, "longest: expected an integer of at least 1, got int 0"),
        ({"longest": "a"}, "longest: expected an integer of at least 1, got str 'a'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(changed, start):
    refused(lambda: GraphAdapter(CONFIG, **{"features": 2, **changed}), start)
