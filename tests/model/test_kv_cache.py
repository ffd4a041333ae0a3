"""The static cache: writes land where they were told, rows are apart, nothing grows."""

import pytest
import torch

from csm_core.config import StackConfig
from csm_core.model.kv_cache import KVCache, write

STACK = StackConfig(layers=2, dim=16, heads=4, kv_heads=2, head_dim=4, ffn_dim=32)


@pytest.fixture
def cache():
    return KVCache(STACK, rows=3, max_len=8, dtype=torch.float32, device="cpu")


def filled(rows=3, max_len=8):
    cache = KVCache(STACK, rows=rows, max_len=max_len, dtype=torch.float32, device="cpu")
    cache.keys.normal_()
    cache.values.normal_()
    return cache


def test_shape_and_dtype_are_what_was_asked_for():
    cache = KVCache(STACK, rows=3, max_len=8, dtype=torch.bfloat16, device="cpu")
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 8, 4)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert (cache.rows, cache.max_len) == (3, 8)


def test_a_fresh_cache_is_zero(cache):
    assert not cache.keys.any()
    assert not cache.values.any()


def test_write_puts_each_row_at_its_own_positions_and_touches_nothing_else(cache):
    k = torch.randn(2, 2, 3, 4)
    expected = cache.keys.clone()
    expected[1, 2, :, 1:4], expected[1, 0, :, 5:8] = k

    write(cache.keys[1], k, cache.index(torch.tensor([[1, 2, 3], [5, 6, 7]]), torch.tensor([2, 0])))

    assert torch.equal(cache.keys, expected)
    assert not cache.values.any()


def test_rows_default_to_the_first(cache):
    positions = torch.tensor([[4], [0]])
    assert torch.equal(cache.index(positions), cache.index(positions, torch.tensor([0, 1])))


def test_write_takes_heads_that_were_transposed(cache):
    """A projection's output [B, T, heads, D] seen as [B, heads, T, D]: not contiguous."""
    new = torch.randn(1, 3, 2, 4).transpose(1, 2)
    write(cache.values[0], new, cache.index(torch.tensor([[2, 3, 4]])))
    assert torch.equal(cache.values[0, 0, :, 2:5], new[0])


def test_write_casts_to_the_cache_and_keeps_its_storage():
    cache = KVCache(STACK, rows=1, max_len=8, dtype=torch.bfloat16, device="cpu")
    address = cache.keys.data_ptr()
    for position in range(8):
        write(cache.keys[0], torch.ones(1, 2, 1, 4), cache.index(torch.tensor([[position]])))
    assert cache.keys.data_ptr() == address
    assert cache.keys[0].eq(1).all()
    assert cache.keys[1].eq(0).all()


@pytest.mark.parametrize("rows", [None, torch.tensor([1])])
def test_a_position_past_the_end_is_an_error_not_the_next_row(cache, rows):
    with pytest.raises(IndexError):
        cache.index(torch.tensor([[8]]), rows)


def test_a_position_sees_itself_and_what_is_before_it(cache):
    mask = cache.upto(4).mask(torch.tensor([[0, 2], [3, 6]]))
    assert mask.shape == (2, 1, 2, 4)
    assert mask.eq(0)[:, 0].sum(-1).tolist() == [[1, 3], [4, 4]]
    assert mask[mask != 0].eq(-torch.inf).all()
    assert mask[0, 0, 1].tolist() == [0, 0, 0, -torch.inf]


def test_upto_shortens_what_is_read_and_not_what_can_be_written(cache):
    window = cache.upto(4)
    write(window.keys[0], torch.ones(1, 2, 1, 4), window.index(torch.tensor([[6]]), torch.tensor([1])))
    assert (window.length, window.max_len, cache.length) == (4, 8, 8)
    assert cache.keys[0, 1, :, 6].eq(1).all()


def test_reset_clears_one_row_even_of_nan_and_leaves_its_neighbours():
    cache = filled()
    before = cache.keys.clone(), cache.values.clone()
    cache.keys[:, 1] = torch.nan
    cache.values[:, 1] = torch.inf

    cache.reset(1)

    for now, then in zip((cache.keys, cache.values), before, strict=True):
        assert not now[:, 1].any()
        assert torch.equal(now[:, [0, 2]], then[:, [0, 2]])


def test_copy_prefix_copies_so_many_positions_and_no_more():
    cache = filled()
    before = cache.keys.clone(), cache.values.clone()

    cache.copy_prefix(source=0, target=2, length=5)

    for now, then in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(now[:, 2, :, :5], then[:, 0, :, :5])
        assert torch.equal(now[:, 2, :, 5:], then[:, 2, :, 5:])
        assert torch.equal(now[:, :2], then[:, :2])


def test_clear_zeroes_the_first_rows():
    cache = filled()
    last = cache.keys[:, 2].clone()
    cache.clear(2)
    assert not cache.keys[:, :2].any()
    assert not cache.values[:, :2].any()
    assert torch.equal(cache.keys[:, 2], last)


def test_a_saved_prefix_is_a_copy_and_loads_into_another_row():
    cache = filled()
    prefix = cache.save(0, 5)
    kept = cache.keys[:, 0, :, :5].clone(), cache.values[:, 0, :, :5].clone()
    assert prefix.nbytes == 2 * 2 * 2 * 5 * 4 * 4
    cache.reset(0)
    before = cache.keys[:, 2].clone()

    cache.load(2, prefix, 3)

    assert torch.equal(cache.keys[:, 2, :, :3], kept[0][:, :, :3])
    assert torch.equal(cache.values[:, 2, :, :3], kept[1][:, :, :3])
    assert torch.equal(cache.keys[:, 2, :, 3:], before[:, :, 3:])
