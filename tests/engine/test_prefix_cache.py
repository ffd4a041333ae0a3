"""Segments by the digest of everything up to their end: what is found, what it shares, what goes first."""

import pytest
import torch
from torch import Tensor

from csm_core.engine.prefix_cache import PrefixCache, find_marks
from csm_core.engine.scheduler import Mark
from csm_core.model.csm import ABSENT
from csm_core.model.kv_cache import Prefix

SEGMENT = 64  # bytes of the keys and values of a segment of two positions, as ``prefix`` makes them


def segment(*codes: int) -> Tensor:
    return torch.tensor([[ABSENT, ABSENT, 5], *([code, code, ABSENT] for code in codes), [0, 0, ABSENT]])


TEXT = torch.tensor([[ABSENT, ABSENT, 7], [ABSENT, ABSENT, 8]])


def prefix(marks: tuple[Mark, ...], seed: int = 0) -> Prefix:
    """Keys and values [2 layers, 1 head, length, 2] fp32."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 1, marks[-1].end, 2, generator=generator) for _ in range(2))
    return Prefix(keys, values)


def marks_of(*names: str) -> tuple[Mark, ...]:
    """Segments of two positions each."""
    return tuple(Mark(2 * count, "".join(names[:count]).encode()) for count in range(1, len(names) + 1))


def names(cache: PrefixCache) -> set[str]:
    return {digest.decode() for digest in cache._segments}


def test_a_segment_ends_after_its_closing_frame() -> None:
    prompt = torch.cat([segment(1, 2, 3), segment(4), TEXT])
    assert [mark.end for mark in find_marks(prompt)] == [5, 8]
    assert find_marks(TEXT) == ()
    assert find_marks(TEXT[:1]) == ()


def test_neither_text_nor_a_zero_code_closes_a_segment() -> None:
    prompt = torch.cat([torch.tensor([[0, 1, ABSENT], [0, 0, 4], [ABSENT, ABSENT, 0]]), TEXT])
    assert find_marks(prompt) == ()


def test_the_last_frame_is_never_read_and_closes_nothing() -> None:
    prompt = torch.cat([segment(1), segment(2)])
    assert [mark.end for mark in find_marks(prompt)] == [3]


def test_a_digest_names_everything_before_it() -> None:
    first = find_marks(torch.cat([segment(1), segment(2), segment(3), TEXT]))
    same = find_marks(torch.cat([segment(1), segment(2), segment(4), segment(3), TEXT]))
    assert [a == b for a, b in zip(first, same, strict=False)] == [True, True, False]
    other = find_marks(torch.cat([segment(9), segment(2), segment(3), TEXT]))
    assert not {mark.digest for mark in first} & {mark.digest for mark in other}
    assert len({mark.digest for mark in first}) == 3


def test_a_prompt_that_is_a_view_has_the_digests_of_its_copy() -> None:
    wide = torch.cat([segment(1), segment(2), TEXT]).repeat(1, 2)
    assert find_marks(wide[:, :3]) == find_marks(wide[:, :3].clone())


def test_what_was_kept_comes_back() -> None:
    cache, marks = PrefixCache(10_000), marks_of("a", "b", "c")
    assert cache.known(marks) == []
    kept = prefix(marks)
    cache.add(marks, kept)
    for count in range(1, 4):
        got = cache.get(cache.known(marks[:count]))
        assert torch.equal(got.keys, kept.keys[:, :, : 2 * count])
        assert torch.equal(got.values, kept.values[:, :, : 2 * count])
    assert list(cache.known(marks_of("a", "b", "x"))) == list(marks[:2])
    assert cache.known(marks_of("x", "b", "c")) == []


def test_it_keeps_copies() -> None:
    cache, marks = PrefixCache(10_000), marks_of("a")
    given = prefix(marks)
    wanted = given.keys.clone()
    cache.add(marks, given)
    given.keys.zero_()
    cache.get(marks).keys.zero_()
    assert torch.equal(cache.get(marks).keys, wanted)


def test_contexts_that_begin_alike_share_the_beginning() -> None:
    cache = PrefixCache(10_000)
    cache.add(marks_of("v", "a"), prefix(marks_of("v", "a"), seed=1))
    beginning = cache.get(marks_of("v"))
    cache.add(marks_of("v", "b"), prefix(marks_of("v", "b"), seed=2))
    assert names(cache) == {"v", "va", "vb"}
    assert cache.nbytes == 3 * SEGMENT
    assert torch.equal(cache.get(marks_of("v")).keys, beginning.keys)


def test_what_was_not_needed_for_longest_goes_first() -> None:
    cache = PrefixCache(3 * SEGMENT)
    for name in "abc":
        cache.add(marks_of(name), prefix(marks_of(name)))
    cache.get(marks_of("a"))
    cache.add(marks_of("d"), prefix(marks_of("d")))
    assert names(cache) == {"a", "c", "d"}
    assert cache.nbytes == 3 * SEGMENT


def test_a_beginning_outlives_what_builds_on_it() -> None:
    cache = PrefixCache(4 * SEGMENT)
    cache.add(marks_of("v", "a", "b"), prefix(marks_of("v", "a", "b")))
    cache.add(marks_of("x", "y"), prefix(marks_of("x", "y")))
    assert names(cache) == {"v", "va", "x", "xy"}
    cache.add(marks_of("z"), prefix(marks_of("z")))
    assert names(cache) == {"v", "x", "xy", "z"}


@pytest.mark.parametrize(("budget", "kept"), [(0, set()), (SEGMENT - 1, set()), (2 * SEGMENT, {"v", "va"})])
def test_what_exceeds_the_budget_is_not_kept(budget: int, kept: set[str]) -> None:
    cache = PrefixCache(budget)
    cache.add(marks_of("v", "a", "b"), prefix(marks_of("v", "a", "b")))
    assert names(cache) == kept
    assert cache.nbytes == SEGMENT * len(kept)


def test_it_can_be_emptied() -> None:
    cache = PrefixCache(10_000)
    cache.add(marks_of("a"), prefix(marks_of("a")))
    cache.clear()
    assert (cache.nbytes, cache.known(marks_of("a"))) == (0, [])
