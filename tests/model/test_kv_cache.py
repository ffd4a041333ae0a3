"""The static cache: writes land where they were told, rows are apart, nothing grows."""

import pytest
import torch

from csm_core.config import StackConfig
from csm_core.model.kv_cache import KVCache

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
    k, v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    expected_keys, expected_values = cache.keys.clone(), cache.values.clone()
    expected_keys[1, 2, :, 1:4], expected_keys[1, 0, :, 5:8] = k
    expected_values[1, 2, :, 1:4], expected_values[1, 0, :, 5:8] = v

    cache.write(1, k, v, positions=torch.tensor([[1, 2, 3], [5, 6, 7]]), rows=torch.tensor([2, 0]))

    assert torch.equal(cache.keys, expected_keys)
    assert torch.equal(cache.values, expected_values)


def test_write_casts_to_the_cache_and_keeps_its_storage():
    cache = KVCache(STACK, rows=1, max_len=8, dtype=torch.bfloat16, device="cpu")
    address = cache.keys.data_ptr()
    for position in range(8):
        cache.write(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), torch.tensor([[position]]), torch.tensor([0]))
    assert cache.keys.data_ptr() == address
    assert cache.keys[0].eq(1).all()
    assert cache.keys[1].eq(0).all()


def test_write_past_the_end_is_an_error_not_growth(cache):
    with pytest.raises(IndexError):
        cache.write(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), torch.tensor([[8]]), torch.tensor([0]))


def test_upto_is_a_window_onto_the_same_storage(cache):
    window = cache.upto(4)
    window.write(0, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), torch.tensor([[3]]), torch.tensor([1]))
    assert (window.max_len, cache.max_len) == (4, 8)
    assert cache.keys[0, 1, :, 3].eq(1).all()
    assert cache.values[0, 1, :, 3].eq(1).all()


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

    cache.copy_prefix(src_row=0, dst_row=2, length=5)

    for now, then in zip((cache.keys, cache.values), before, strict=True):
        assert torch.equal(now[:, 2, :, :5], then[:, 0, :, :5])
        assert torch.equal(now[:, 2, :, 5:], then[:, 2, :, 5:])
        assert torch.equal(now[:, :2], then[:, :2])
