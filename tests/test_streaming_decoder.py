"""The streaming decoder: convolutions against torch's, passes against moshi's, and that they can be recorded."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from csm_core.codec import PIECE, Codec, build_mimi
from csm_core.config import BUNDLED_CODEC, MIMI, CodecConfig
from csm_core.streaming_decoder import PACK_FROM, Affine, History, Play, _plain, _transposed, runs


def random_codec(config: CodecConfig) -> Codec:
    """As loud as speech: each convolution keeps the variance of what it is given."""
    torch.manual_seed(0)
    mimi = build_mimi(config).requires_grad_(False)
    for name, value in mimi.state_dict().items():
        if name.endswith("embedding_sum"):
            value.normal_()
    for module in [*mimi.decoder.modules(), *mimi.upsample.modules()]:
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            fan_in = module.in_channels // module.groups * module.kernel_size[0]
            if isinstance(module, nn.ConvTranspose1d):
                fan_in //= module.stride[0]
            nn.init.normal_(module.weight, std=fan_in**-0.5)
    mimi.decoder.model[-1].conv.conv.weight.mul_(0.1)
    return Codec(config, mimi.state_dict())


def streamed(codec: Codec, codes: Tensor, sizes: list[int]) -> Tensor:
    stream = codec.stream()
    return torch.cat([stream.push(piece[None])[0] for piece in codes.split(sizes)])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_affine_is_linear(packed: bool, bias: bool) -> None:
    width = PACK_FROM // 256
    layer = nn.Linear(width if packed else 24, 256, bias=bias).requires_grad_(False)
    affine = Affine(layer.weight, layer.bias)
    assert affine.packed == (packed and torch.backends.mkldnn.is_available())
    for rows in (1, 2, 3, 40):
        x = torch.randn(2, rows, layer.in_features)
        torch.testing.assert_close(affine(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 12, [12], [5, 1, 4, 2]])
@pytest.mark.parametrize(
    ("conv", "rate"),
    [
        (nn.Conv1d(4, 6, 7), 1),
        (nn.Conv1d(4, 6, 3, dilation=4), 1),
        (nn.Conv1d(4, 6, 1, bias=False), 1),
        (nn.ConvTranspose1d(4, 6, 10, 5), 5),
        (nn.ConvTranspose1d(4, 6, 9, 3), 3),
        (nn.ConvTranspose1d(4, 4, 4, 2, groups=4, bias=False), 2),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_convolution_in_chunks_is_the_whole_one(
    conv: nn.Conv1d | nn.ConvTranspose1d, rate: int, sizes: list[int]
) -> None:
    x = torch.randn(3, 12, 4)
    if isinstance(conv, nn.Conv1d):
        own = _plain(conv, after_elu=True)
        wanted = conv(nn.functional.pad(nn.functional.elu(x).mT, (own.past, 0))).mT
    else:
        own = _transposed(conv, after_elu=True)
        wanted = conv(nn.functional.elu(x).mT).mT[:, : 12 * rate]
    floats = torch.zeros(3, own.past * own.channels)
    parts = [floats.view(3, own.past, own.channels)]
    heard = []
    for chunk in x.split(sizes, dim=1):
        history = History(floats, parts)
        heard.append(own(chunk, history))
        if own.past:
            history.close(torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(torch.cat(heard, dim=1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        BUNDLED_CODEC,  # with packed products, and without
        dataclasses.replace(BUNDLED_CODEC, channel_wise_upsample=True, num_codebooks=4),
        dataclasses.replace(
            BUNDLED_CODEC, ratios=(4, 4, 5, 3), sample_rate=12_000, decoder_filters=4, dim=16, residual_layers=3
        ),
    ],
    ids=["bundled", "upsampled channel by channel, fewer codebooks", "another sample rate, dilated"],
)
def test_other_shapes_equal_moshi(config: CodecConfig) -> None:
    codec = random_codec(config)
    codes = torch.randint(0, config.codebook_size, (40, config.num_codebooks))  # 80 positions: three contexts
    offline = codec.decode(codes)
    assert 0.01 < offline.std() < 1
    torch.testing.assert_close(streamed(codec, codes, [1] * 18 + [2, 4, 8, 8]), offline, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_full_size_past_its_context_equals_moshi() -> None:
    codec = random_codec(MIMI)
    codes = torch.randint(0, 2048, (150, 32))  # 300 positions, attention sees 250
    offline = codec.decode(codes)
    assert 0.01 < offline.std() < 1
    for sizes in ([1] * 70 + [2] * 10 + [4] * 15, [PIECE + 3] * 13 + [7]):
        torch.testing.assert_close(streamed(codec, codes, sizes), offline, rtol=0, atol=1e-5)
    plain = codec.stream(fast=False)
    pieces = [plain.push(piece[None])[0] for piece in codes.split(5)]
    torch.testing.assert_close(torch.cat(pieces), offline, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 5, -1])
def test_a_pass_that_fails_never_was(tiny_codec_state: dict[str, Tensor], tiny_codec: Codec, stage: int) -> None:
    """Out of memory, say, at any place: the next attempt finds what this one found."""
    codec = Codec(tiny_codec.config, tiny_codec_state)
    stream = codec.stream()
    codes = torch.randint(0, 61, (20, 2))
    heard = [stream.push(codes[None, :7])]
    seanet = stream._decoder._weights.seanet
    kept = seanet[stage]

    def fail(x: Tensor, history: History) -> Tensor:
        raise torch.OutOfMemoryError("injected")

    seanet[stage] = fail
    with pytest.raises(torch.OutOfMemoryError):
        stream.push(torch.zeros(1, 3, 2, dtype=torch.int64))
    seanet[stage] = kept
    heard.append(stream.push(codes[None, 7:]))
    torch.testing.assert_close(torch.cat(heard, dim=1)[0], tiny_codec.decode(codes), rtol=0, atol=1e-5)


class Recorder:
    """Does on the CPU what a CUDA graph does: practises, and answers each replay in one and the same tensor."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, play: Play) -> Callable[[], Tensor]:
        self.recordings += 1
        play()
        result = play()

        def replay() -> Tensor:
            return result.copy_(play())

        return replay


def test_each_shape_is_recorded_once_and_practice_leaves_no_trace(tiny_codec: Codec) -> None:
    recorder = Recorder()
    stream = tiny_codec.stream(slots=2, record=recorder)
    codes = torch.randint(0, 61, (2, 60, 2))
    wanted = [tiny_codec.decode(row) for row in codes]
    heard = [stream.push(codes[:, :3]), stream.push(codes[:, 3:4])]
    assert recorder.recordings == 2
    alone = stream.push(codes[:1, 4:7])  # a new shape while the other row waits
    assert recorder.recordings == 3
    other = stream.push(codes[:, 4:7], torch.tensor([False, True]))[1]
    heard.append(torch.stack([alone[0], other]))
    heard += [stream.push(codes[:, i : i + 3]) for i in range(7, 25, 3)]
    assert recorder.recordings == 3
    heard.append(stream.push(codes[:, 25:]))  # pieces of eight and a rest of three: each must outlive the next
    assert recorder.recordings == 4
    for row in range(2):
        torch.testing.assert_close(torch.cat(heard, dim=1)[row], wanted[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        ("", []),
        ("...", []),
        ("xxx", [(0, 3)]),
        ("...x", [(3, 4)]),
        (".xx.x..", [(1, 3), (4, 5)]),
        ("x.xx", [(0, 1), (2, 4)]),
    ],
)
def test_runs_are_the_active_rows(active: str, expected: list[tuple[int, int]]) -> None:
    assert [(at.start, at.stop) for at in runs([row == "x" for row in active])] == expected


def test_rows_that_wait_cost_nothing(tiny_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows each pass has; what they decode to is compared in test_codec.py."""
    stream = tiny_codec.stream(slots=8)
    passes = []
    attend = stream._decoder._attend
    monkeypatch.setattr(stream._decoder, "_attend", lambda x, rows: passes.append(len(x)) or attend(x, rows))
    codes = torch.randint(0, 61, (8, PIECE, 2))
    stream.push(codes)
    stream.push(codes, torch.tensor([False, True, True, False, False, False, False, True]))
    assert passes == [8, 2, 1]
    assert stream.push(codes, torch.zeros(8, dtype=torch.bool)).shape == (8, PIECE * 1920)
    assert passes == [8, 2, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [BUNDLED_CODEC, MIMI], ids=["bundled", "mimi"])
def test_cuda_graphs_equal_the_plain_pass(config: CodecConfig) -> None:
    """As graphs on a stream of their own, as launches, and moshi's modules on the CPU."""
    mimi = random_codec(config)
    state = {**mimi._decoder.state_dict(), **mimi._encoder_state}
    codec = Codec(config, state, "cuda")
    codes = torch.randint(0, config.codebook_size, (3, 150, config.num_codebooks))
    wanted = torch.stack([mimi.decode(row) for row in codes])

    def record(play: Play) -> Play:
        play()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = play()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    for recorder in (record, None):
        stream = codec.stream(slots=4, record=recorder)
        busy = torch.randn(4096, 4096, device="cuda")
        heard = []
        for chunk in codes.split([1] * 60 + [2] * 5 + [4] * 20, dim=1):
            busy = busy @ busy.softmax(dim=-1)  # the default stream has work; it must not matter
            heard.append(stream.push(chunk))
        torch.testing.assert_close(torch.cat(heard, dim=1), wanted, rtol=0, atol=1e-4)
