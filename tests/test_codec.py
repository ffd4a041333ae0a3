"""The codec: shapes, its two halves, and that a stream is the offline pass whatever the chunks and the neighbours.

Every test of streams runs on both decoders: our own, and moshi's modules (``fast=False``).
"""

import itertools
import logging
import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moshi.models import loaders

from csm_core.codec import PIECE, Codec, build_mimi
from csm_core.config import BUNDLED_CODEC, MIMI, CodecConfig
from csm_core.errors import InvalidInputError, ShapeMismatchError

FRAMES = 6 * PIECE + 2  # 100 positions: many times the tiny attention context of 12

both_decoders = pytest.mark.parametrize("fast", [True, False], ids=["own", "moshi"])


@pytest.fixture(scope="module")
def codes() -> torch.Tensor:
    return torch.randint(0, 61, (FRAMES, 2), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def offline(tiny_codec: Codec, codes: torch.Tensor) -> torch.Tensor:
    return tiny_codec.decode(codes)


def test_mimi_preset_is_what_moshi_builds_and_computes() -> None:
    torch.manual_seed(0)
    theirs = loaders.get_mimi(None, num_codebooks=32)
    state = theirs.state_dict()
    for name, value in state.items():
        if name.endswith("embedding_sum"):
            value.normal_()
    codec = Codec(MIMI, state)
    pcm = torch.randn(2 * 1920) * 0.1
    with torch.no_grad():
        codes = theirs.encode(pcm[None, None])
        sound = theirs.decode(codes)
    assert codes.shape == (1, 32, 2)
    assert torch.equal(codec.encode(pcm), codes[0].T)
    torch.testing.assert_close(codec.decode(codes[0].T), sound[0, 0])
    assert {*codec._decoder.state_dict(), *codec._encoder.state_dict()} == set(state)  # nothing published is left out


def test_bundled_preset_has_the_size_of_the_recipe() -> None:
    with torch.device("meta"):
        mimi = build_mimi(BUNDLED_CODEC)
    assert sum(p.numel() for p in mimi.encoder.parameters()) == 790_088
    assert sum(p.numel() for p in mimi.decoder.parameters()) == 1_899_469
    assert sum(p.numel() for p in mimi.parameters()) == 3_642_901


def test_decode_shape_and_sound(offline: torch.Tensor) -> None:
    assert offline.shape == (FRAMES * 1920,)
    assert offline.dtype == torch.float32
    assert 0.01 < offline.std() < 1  # else the comparisons below compare silence with silence


def test_no_frames_no_sound(tiny_codec: Codec) -> None:
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    assert tiny_codec.decode(nothing).shape == (0,)
    assert tiny_codec.stream(slots=2).push(nothing[None]).shape == (1, 0)
    assert tiny_codec.encode(torch.zeros(0)).shape == (0, 2)


@both_decoders
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, FRAMES - 1), max_size=12))
def test_any_chunking_equals_offline(
    tiny_codec: Codec, codes: torch.Tensor, offline: torch.Tensor, fast: bool, cuts: list[int]
) -> None:
    edges = [0, *sorted(set(cuts)), FRAMES]
    stream = tiny_codec.stream(fast=fast)
    pieces = [stream.push(codes[a:b][None])[0] for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.cat(pieces), offline, rtol=0, atol=1e-5)


@both_decoders
def test_single_frames_equal_offline(tiny_codec: Codec, codes: torch.Tensor, offline: torch.Tensor, fast: bool) -> None:
    stream = tiny_codec.stream(fast=fast)
    pieces = [stream.push(frame[None, None])[0] for frame in codes]
    torch.testing.assert_close(torch.cat(pieces), offline, rtol=0, atol=1e-5)


@both_decoders
@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_equals_offline(tiny_codec: Codec, fast: bool, seed: int) -> None:
    """Rows of their own pace: pushes of the first rows, masks, resets and moves; what a row is not to hear is noise."""
    choose, slots = random.Random(seed), 4
    codes = torch.randint(0, 61, (slots, 60, 2), generator=torch.Generator().manual_seed(seed))
    whole = [tiny_codec.decode(row) for row in codes]
    stream = tiny_codec.stream(slots, fast)
    speakers = list(range(slots))  # whose codes a row decodes ...
    at = [0] * slots  # ... and how many of them it has had
    for _ in range(45):
        action, row = choose.random(), choose.randrange(slots)
        if action < 0.1:
            stream.reset(row)
            speakers[row], at[row] = choose.randrange(slots), 0
        elif action < 0.2:
            target = choose.choice([other for other in range(slots) if other != row])
            stream.move(row, target)
            speakers[target], at[target] = speakers[row], at[row]
        else:
            b, n = choose.randint(1, slots), choose.choice([1, 1, 1, 2, 3, PIECE + 1])
            active = [choose.random() < 0.8 and at[i] + n <= 60 for i in range(b)]
            pushed = torch.randint(0, 61, (b, n, 2))
            for i in range(b):
                if active[i]:
                    pushed[i] = codes[speakers[i], at[i] : at[i] + n]
            sound = stream.push(pushed, None if all(active) else torch.tensor(active))
            assert sound.shape == (b, n * 1920)
            for i in range(b):
                if active[i]:
                    wanted = whole[speakers[i]][at[i] * 1920 : (at[i] + n) * 1920]
                    torch.testing.assert_close(sound[i], wanted, rtol=0, atol=1e-5)
                    at[i] += n
            for i in range(slots):
                if at[i] > 60 - PIECE:
                    stream.reset(i)
                    at[i] = 0


@both_decoders
def test_a_reset_row_forgets_and_its_neighbour_does_not(
    tiny_codec: Codec, codes: torch.Tensor, offline: torch.Tensor, fast: bool
) -> None:
    stream = tiny_codec.stream(slots=2, fast=fast)
    stream.push(torch.stack([codes[20:40], codes[:20]]))
    stream.reset(0)
    sound = stream.push(torch.stack([codes[:10], codes[20:30]]))
    torch.testing.assert_close(sound[0], offline[: 10 * 1920], rtol=0, atol=1e-5)
    torch.testing.assert_close(sound[1], offline[20 * 1920 : 30 * 1920], rtol=0, atol=1e-5)


@both_decoders
def test_a_moved_row_goes_on_elsewhere(
    tiny_codec: Codec, codes: torch.Tensor, offline: torch.Tensor, fast: bool
) -> None:
    stream = tiny_codec.stream(slots=3, fast=fast)
    stream.push(torch.stack([codes[:20], codes[10:30], codes[20:40]]))
    stream.move(2, 0)
    stream.reset(2)
    sound = stream.push(torch.stack([codes[40:44], codes[30:34]]))
    offset = tiny_codec.decode(codes[20:44])[-4 * 1920 :]
    torch.testing.assert_close(sound[0], offset, rtol=0, atol=1e-5)
    torch.testing.assert_close(sound[1], tiny_codec.decode(codes[10:34])[-4 * 1920 :], rtol=0, atol=1e-5)


@both_decoders
def test_more_rows_than_slots(tiny_codec: Codec, codes: torch.Tensor, fast: bool) -> None:
    with pytest.raises(InvalidInputError, match="2 slots"):
        tiny_codec.stream(slots=2, fast=fast).push(codes[:3, None])


@both_decoders
def test_state_is_allocated_and_logged_once(
    tiny_codec: Codec, codes: torch.Tensor, fast: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "csm_core.codec"):
        stream = tiny_codec.stream(slots=3, fast=fast)
        places = [tensor.data_ptr() for tensor in stream._decoder.state]
        stream.push(codes[:12].view(3, 4, 2))
        stream.reset(1)
    assert [tensor.data_ptr() for tensor in stream._decoder.state] == places
    assert [record.message for record in caplog.records] == [
        f"The codec keeps {stream.nbytes / 1e6:.1f} MB for 3 streams."
    ]
    attention = 2 * 16 * (12 + 2 * PIECE) * 4  # keys and values, 16 wide, of the context and a piece, fp32
    assert 3 * attention < stream.nbytes < 3 * (attention + 8000)


@both_decoders
def test_streams_and_decode_share_the_weights_at_once(
    tiny_codec: Codec, codes: torch.Tensor, offline: torch.Tensor, fast: bool
) -> None:
    def speak(results: list[torch.Tensor]) -> None:
        stream = tiny_codec.stream(fast=fast)
        results.append(torch.cat([stream.push(codes[i : i + 5][None])[0] for i in range(0, FRAMES, 5)]))

    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=speak, args=(results,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    whole = [tiny_codec.decode(codes) for _ in range(3)]
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for sound in [*results, *whole]:
        torch.testing.assert_close(sound, offline, rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 1919, 1920, 1921, 5 * 1920])
def test_encode_covers_every_sample(tiny_codec: Codec, samples: int) -> None:
    codes = tiny_codec.encode(torch.randn(samples))
    assert codes.shape == (-(-samples // 1920), 2)
    assert codes.dtype == torch.int64
    assert codes.device.type == "cpu"
    assert 0 <= codes.min() <= codes.max() < 61


def test_encoder_waits_for_first_use(tiny_codec_config: CodecConfig, tiny_codec_state: dict[str, torch.Tensor]) -> None:
    codec = Codec(tiny_codec_config, tiny_codec_state)
    encoder = codec._encoder
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    codec.encode(torch.randn(1920))
    assert {p.device.type for p in encoder.parameters()} == {"cpu"}


def test_fewer_codebooks_than_the_weights_have(tiny_codec_state: dict[str, torch.Tensor]) -> None:
    config = CodecConfig(**{**MIMI.to_dict(), "ratios": (8, 6, 5, 4), "num_codebooks": 8})
    with torch.device("meta"):
        mimi = build_mimi(config)
    assert (mimi.num_codebooks, mimi.total_codebooks) == (8, 32)


@pytest.mark.parametrize(
    "codes",
    [
        torch.tensor([[0, 61]]),
        torch.tensor([[-1, 0]]),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(3, 2),
        torch.zeros(2, dtype=torch.int64),
    ],
)
def test_codes_that_are_none(tiny_codec: Codec, codes: torch.Tensor) -> None:
    for reject in (tiny_codec.decode, lambda c: tiny_codec.stream().push(c[None])):
        with pytest.raises(InvalidInputError) as caught:
            reject(codes)
        assert caught.value.param == "codes"


def test_stereo_is_not_encoded(tiny_codec: Codec) -> None:
    with pytest.raises(InvalidInputError, match="mono"):
        tiny_codec.encode(torch.zeros(2, 1920))


@pytest.mark.parametrize("spoil", ["missing", "shape"])
def test_weights_that_do_not_fit(
    tiny_codec_config: CodecConfig, tiny_codec_state: dict[str, torch.Tensor], spoil: str
) -> None:
    state = dict(tiny_codec_state)
    name = next(name for name in state if name.startswith("decoder.") and name.endswith("weight"))
    if spoil == "missing":
        del state[name]
    else:
        state[name] = state[name][1:]
    with pytest.raises(ShapeMismatchError, match="codec"):
        Codec(tiny_codec_config, state)
