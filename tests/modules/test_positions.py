"""Sinusoidal and learned positions."""

import math

import pytest
import torch

from fairseq.errors import UserError
from fairseq.modules import LearnedPositionalEmbedding, PositionalEmbedding, SinusoidalPositionalEmbedding
from fairseq.utils import make_positions

PAD = 1


def test_first_token_of_width_four_has_the_known_vector():
    table = SinusoidalPositionalEmbedding(4, PAD)
    expected = torch.tensor([0.909297, 0.0002, -0.416147, 1.0])
    torch.testing.assert_close(table(torch.tensor([[7]]))[0, 0], expected, atol=1e-6, rtol=0)


def test_position_ids_start_after_pad_and_pads_keep_its_id():
    assert make_positions(torch.tensor([[2, 7, 9, 1, 1]]), PAD).tolist() == [[2, 3, 4, 1, 1]]


def test_frequencies_divide_by_half_minus_one():
    table = SinusoidalPositionalEmbedding.get_embedding(6, 10)
    for k in range(5):
        frequency = math.exp(-k * math.log(10000) / 4)
        assert table[5, k].item() == pytest.approx(math.sin(5 * frequency), abs=1e-6)
        assert table[5, 5 + k].item() == pytest.approx(math.cos(5 * frequency), abs=1e-6)


def test_odd_width_ends_in_a_zero_column_and_pad_row_is_zero():
    table = SinusoidalPositionalEmbedding.get_embedding(5, 7, PAD)
    assert table.shape == (5, 7)
    assert table[:, -1].abs().max() == 0
    assert table[PAD].abs().max() == 0
    assert table[PAD + 1].abs().max() > 0


def test_table_grows_on_demand_without_changing_earlier_rows():
    table = SinusoidalPositionalEmbedding(8, PAD, init_size=4)
    short = table(torch.full((1, 3), 5))
    long = table(torch.full((1, 50), 5))
    assert torch.equal(long[:, :3], short)
    assert table.max_positions() == 100_000


def test_pads_on_either_side_get_zero_vectors():
    table = SinusoidalPositionalEmbedding(8, PAD)
    vectors = table(torch.tensor([[1, 1, 5, 6], [5, 6, 1, 1]]))
    assert vectors[0, :2].abs().max() == 0
    assert torch.equal(vectors[0, 2:], vectors[1, :2])


def test_half_precision_follows_the_module():
    table = SinusoidalPositionalEmbedding(8, PAD).half()
    assert table(torch.tensor([[5, 6]])).dtype == torch.float16


def test_old_table_is_dropped_and_the_dummy_buffer_supplied():
    table = SinusoidalPositionalEmbedding(8, PAD)
    state = {"embed_positions.weights": torch.zeros(3, 8)}
    table.upgrade_state_dict_named(state, "embed_positions")
    assert list(state) == ["embed_positions._float_tensor"]


def test_learned_positions_have_room_for_pad_and_refuse_longer_input():
    table = PositionalEmbedding(10, 6, PAD, learned=True)
    assert isinstance(table, LearnedPositionalEmbedding)
    assert table.weight.shape == (12, 6)
    assert table.weight[PAD].abs().max() == 0
    assert table.max_positions() == 10
    assert table(torch.full((2, 10), 5)).shape == (2, 10, 6)
    with pytest.raises(UserError, match="11 tokens.*at most 10"):
        table(torch.full((2, 11), 5))
