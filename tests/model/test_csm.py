"""The network against its own definition: causal, the same with and without caches, faithful to its dtypes."""

import math
from dataclasses import replace

import pytest
import torch

from csm_core.config import CSM_1B, ModelConfig, RopeScaling, StackConfig
from csm_core.model.csm import ABSENT, CSM, Scratch, rotary_frequencies, rotate
from csm_core.model.kv_cache import KVCache

CONFIG = ModelConfig(
    backbone=StackConfig(layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48),
    depth=StackConfig(layers=2, dim=24, heads=4, kv_heads=1, head_dim=6, ffn_dim=40),
    num_codebooks=4,
    codebook_size=20,
    audio_vocab_size=23,
    text_vocab_size=40,
    max_seq_len=32,
    bos_id=1,
    eos_id=2,
    # Short original length, so that among 3 or 4 frequencies some are kept, some stretched, some between.
    rope_theta=100.0,
    rope_scaling=RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=32),
)
NATIVE_NAMES = {
    "text_embedding.weight": (40, 32),
    "audio_embedding.weight": (92, 32),
    "backbone.norm.weight": (32,),
    "depth.norm.weight": (24,),
    "projection.weight": (24, 32),
    "codebook0_head.weight": (23, 32),
    "audio_head": (3, 24, 23),
}
BLOCK_NAMES = {"attn_norm", "mlp_norm"} | {f"attn.{name}_proj" for name in "qkvo"}
BLOCK_NAMES |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def make_model(config=CONFIG):
    """Weights large enough that attention and norms matter: with the usual 0.02 a model this small is almost linear."""
    torch.manual_seed(0)
    model = CSM(config).eval()
    model.init_weights(std=0.3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_frames(*shape, seed=1):
    """Random text frames and audio frames in turn of four."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, CONFIG.codebook_size, (*shape, CONFIG.num_codebooks + 1), generator=generator)
    is_text = torch.arange(shape[-1]) % 4 == 0
    frames[..., :-1].masked_fill_(is_text.unsqueeze(-1), ABSENT)
    frames[..., -1].masked_fill_(~is_text, ABSENT)
    return frames


def make_cache(rows, max_len=CONFIG.max_seq_len):
    return KVCache(CONFIG.backbone, rows, max_len, torch.float32, "cpu")


def argmax(logits, _codebook):
    return logits.argmax(-1)


# ---- shapes and names


def test_parameters_have_the_native_names_and_shapes(model):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    blocks = {
        f"{stack}.layers.{layer}.{name}.weight"
        for stack in ("backbone", "depth")
        for layer in range(2)
        for name in BLOCK_NAMES
    }
    assert set(shapes) == set(NATIVE_NAMES) | blocks
    assert {name: shapes[name] for name in NATIVE_NAMES} == NATIVE_NAMES
    assert shapes["backbone.layers.0.attn.q_proj.weight"] == (32, 32)
    assert shapes["depth.layers.1.attn.k_proj.weight"] == (6, 24)


def test_csm_1b_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = CSM(CSM_1B)
    # The fp32 checkpoint of the original layout has 187 tensors; this one splits none and joins none.
    assert len(model.state_dict()) == 187
    assert sum(weight.numel() * 4 for weight in model.parameters()) == pytest.approx(6_211_186_784, abs=32_768)


def test_logits_are_as_wide_as_the_vocabulary_with_nothing_masked(model):
    hidden = model.forward_backbone(make_frames(2, 5))
    assert hidden.shape == (2, 5, 32)
    logits = model.codebook0_logits(hidden)
    assert logits.shape == (2, 5, 23)
    depth = model.depth_logits(hidden[:, -1], make_frames(2, 2)[:, 1, :-1])
    assert depth.shape == (2, 3, 23)
    assert logits.isfinite().all()
    assert depth.isfinite().all()


def test_fresh_weights_are_normal_with_quieter_residual_projections():
    torch.manual_seed(0)
    wide = replace(CONFIG.backbone, dim=128, ffn_dim=256, heads=16)
    model = CSM(replace(CONFIG, backbone=wide))
    block = model.backbone.layers[0]
    expected = [
        (block.attn.q_proj.weight, 0.02),
        (model.audio_embedding.weight, 0.02),
        (model.text_embedding.weight, 0.02),
        (model.audio_head, 0.02),
        (block.attn.o_proj.weight, 0.02 / math.sqrt(4)),
        (block.mlp.down_proj.weight, 0.02 / math.sqrt(4)),
    ]
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.attn_norm.weight.eq(1).all()


# ---- embedding


def test_a_frame_is_the_sum_of_its_present_columns(model):
    audio, text = model.audio_embedding.weight, model.text_embedding.weight
    text_frame = [ABSENT, ABSENT, ABSENT, ABSENT, 7]
    frames = torch.tensor([[text_frame, [3, 5, 19, 0, ABSENT], [0, 0, 0, 0, ABSENT], [ABSENT, 2, ABSENT, 1, 9]]])
    expected = torch.stack(
        [
            text[7],
            audio[3] + audio[23 + 5] + audio[46 + 19] + audio[69],
            audio[0] + audio[23] + audio[46] + audio[69],  # the EOS frame is present: code 0 has an embedding
            audio[23 + 2] + audio[69 + 1] + text[9],
        ]
    )
    torch.testing.assert_close(model.embed(frames)[0], expected)


# ---- rotary


def test_plain_rotary_is_powers_of_theta():
    assert rotary_frequencies(8, 10_000.0, None).tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])


def test_scaled_rotary_keeps_fast_pairs_stretches_slow_ones_and_blends_between():
    plain = rotary_frequencies(128, 500_000.0, None)
    ratio = plain / rotary_frequencies(128, 500_000.0, RopeScaling())
    wavelength = 2 * math.pi / plain
    assert torch.allclose(ratio[wavelength < 8192 / 4], torch.tensor(1.0))
    assert torch.allclose(ratio[wavelength > 8192], torch.tensor(32.0))
    between = ratio[(wavelength > 8192 / 4) & (wavelength < 8192)]
    assert len(between) > 2
    assert (between.diff() > 0).all()


def test_rotated_scores_depend_on_distance_only(model):
    q, k = torch.randn(2, 1, 1, 1, 8)
    rotary = model.backbone.rotary

    def score(query_at, key_at):
        turned_q = rotate(q, rotary(torch.tensor([[query_at]])))
        turned_k = rotate(k, rotary(torch.tensor([[key_at]])))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(score(9, 4), score(9, 5))


# ---- causality


@pytest.mark.parametrize("name", ["backbone", "depth"])
def test_causal_by_gradient(model, name):
    stack, dim = getattr(model, name), getattr(CONFIG, name).dim
    x = torch.randn(1, 4, dim, requires_grad=True)
    out = stack(x, torch.arange(4).unsqueeze(0))
    for t in range(4):
        (gradient,) = torch.autograd.grad(out[0, t].square().sum(), x, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached.tolist() == [position <= t for position in range(4)]


@pytest.mark.parametrize("k", range(4))
def test_a_code_changes_the_logits_of_later_codebooks_only(model, k):
    hidden, codes = torch.randn(1, 32), torch.tensor([[3, 1, 4, 1]])
    changed = codes.clone()
    changed[0, k] = 15
    differs = (model.depth_logits(hidden, codes) != model.depth_logits(hidden, changed)).any(-1)[0]
    assert differs.tolist() == [codebook > k for codebook in (1, 2, 3)]


def test_training_reaches_every_parameter():
    model = make_model()
    frames = make_frames(2, 12)
    hidden = model.forward_backbone(frames[:, :-1])
    is_audio = frames[:, 1:, -1] == ABSENT
    codes = frames[:, 1:, :-1][is_audio]
    first = torch.nn.functional.cross_entropy(model.codebook0_logits(hidden[is_audio]), codes[:, 0])
    rest = model.depth_logits(hidden[is_audio], codes)
    (first + torch.nn.functional.cross_entropy(rest.flatten(0, 1), codes[:, 1:].flatten())).backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


# ---- cached = uncached


@torch.inference_mode()
@pytest.mark.parametrize("chunks", [[1] * 12, [12], [5, 4, 3], [1, 10, 1]])
def test_cached_in_chunks_equals_uncached(model, chunks):
    frames = make_frames(2, 12)
    cache, start, parts = make_cache(2), 0, []
    for length in chunks:
        positions = torch.arange(start, start + length).expand(2, -1)
        parts.append(model.forward_backbone(frames[:, start : start + length], positions, cache))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), model.forward_backbone(frames), rtol=0, atol=1e-5)


def test_positions_default_to_the_start_of_the_rows(model):
    with torch.inference_mode():
        frames, cache = make_frames(2, 6), make_cache(3)
        hidden = model.forward_backbone(frames, cache=cache)
        torch.testing.assert_close(hidden, model.forward_backbone(frames), rtol=0, atol=1e-5)
        assert not cache.keys[:, 2].any()


@torch.inference_mode()
@pytest.mark.parametrize("window", [None, 20])
def test_rows_of_different_lengths_with_right_padding(model, window):
    """Prefill three rows padded to one length, then step them at their own positions, out of order in the cache."""
    frames, lengths, rows = make_frames(3, 16), [9, 4, 6], torch.tensor([3, 0, 2])
    cache = make_cache(4)
    cache.keys.normal_()  # an earlier request's leftovers
    cache.values.normal_()
    cache = cache if window is None else cache.upto(window)
    padded = torch.full((3, 9, 5), ABSENT)
    for row, length in enumerate(lengths):
        padded[row, :length] = frames[row, :length]
    hidden = model.forward_backbone(padded, torch.arange(9).expand(3, -1), cache, rows)
    steps = [torch.stack([hidden[row, length - 1] for row, length in enumerate(lengths)])]
    for step in range(6):
        positions = torch.tensor(lengths).unsqueeze(1) + step
        current = frames[torch.arange(3), positions[:, 0]].unsqueeze(1)
        steps.append(model.forward_backbone(current, positions, cache, rows)[:, 0])
    stepped = torch.stack(steps, 1)
    for row, length in enumerate(lengths):
        alone = model.forward_backbone(frames[row : row + 1, : length + 6])[0, length - 1 :]
        torch.testing.assert_close(stepped[row], alone, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_copied_prefix_continues_like_its_source(model):
    frames, cache = make_frames(1, 12), make_cache(2)
    model.forward_backbone(frames[:, :8], cache=cache)
    cache.copy_prefix(source=0, target=1, length=6)
    rest = model.forward_backbone(frames[:, 6:], torch.arange(6, 12).unsqueeze(0), cache, torch.tensor([1]))
    torch.testing.assert_close(rest, model.forward_backbone(frames)[:, 6:], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_reset_recovers_a_row_that_a_nan_had_reached(model):
    frames, cache = make_frames(1, 6), make_cache(1)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    assert model.forward_backbone(frames, cache=cache).isnan().any()
    cache.reset(0)
    torch.testing.assert_close(model.forward_backbone(frames, cache=cache), model.forward_backbone(frames))


# ---- depth decoder


@torch.inference_mode()
def test_decode_frame_sees_the_logits_of_teacher_forcing(model):
    hidden, seen = torch.randn(3, 32), []

    def pick(logits, codebook):
        assert codebook == len(seen)
        seen.append(logits)
        return logits.argmax(-1)

    codes = model.decode_frame(hidden, pick)
    assert codes.shape == (3, 4)
    assert codes.dtype == torch.int64
    torch.testing.assert_close(seen[0], model.codebook0_logits(hidden))
    torch.testing.assert_close(torch.stack(seen[1:], 1), model.depth_logits(hidden, codes), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_decode_frame_takes_whatever_was_picked_and_keeps_rows_apart(model):
    hidden = torch.randn(2, 32)
    forced = torch.tensor([[5, 0, 19, 7], [2, 2, 2, 2]])
    logits = []
    codes = model.decode_frame(hidden, lambda now, k: logits.append(now) or forced[:, k])
    assert torch.equal(codes, forced)
    torch.testing.assert_close(torch.stack(logits[1:], 1), model.depth_logits(hidden, forced), rtol=0, atol=1e-5)
    alone = model.decode_frame(hidden[1:], argmax)
    assert torch.equal(model.decode_frame(hidden, argmax)[1:], alone)


@torch.inference_mode()
def test_a_frame_does_not_see_the_scratch_of_the_last(model):
    hidden, scratch = torch.randn(2, 32), Scratch(model, 3)
    model.decode_frame(hidden * torch.nan, argmax, scratch)
    assert torch.equal(model.decode_frame(hidden, argmax, scratch), model.decode_frame(hidden, argmax))


def test_a_step_reads_no_value_on_the_host():
    """On the meta device there are no values: whatever would wait for one (.item(), bool(), nonzero) raises."""
    model = make_model().to("meta")
    cache = KVCache(CONFIG.backbone, 3, 32, torch.float32, "meta")
    frames = make_frames(2, 1).to("meta")
    positions = torch.zeros(2, 1, dtype=torch.int64, device="meta")
    for rows in (None, positions[:, 0]):
        hidden = model.forward_backbone(frames, positions, cache, rows)
        assert model.decode_frame(hidden[:, -1], argmax).shape == (2, 4)


# ---- dtypes and devices


def test_bf16_weights_keep_fp32_rotary_and_stay_close(model):
    low = make_model().to(torch.bfloat16)
    assert torch.equal(low.backbone.rotary.cos, model.backbone.rotary.cos)
    with torch.inference_mode():
        frames = make_frames(2, 12)
        hidden, reference = low.forward_backbone(frames), model.forward_backbone(frames)
        codes = low.decode_frame(hidden[:, -1], argmax)
        depth, depth_reference = low.depth_logits(hidden[:, -1], codes), model.depth_logits(reference[:, -1], codes)
    assert hidden.dtype == depth.dtype == torch.bfloat16
    # bf16 has 8 bits of mantissa; two layers of them leave errors of some 2 % of the spread.
    assert (hidden.float() - reference).square().mean().sqrt() < 0.03 * reference.std()
    assert (depth.float() - depth_reference).square().mean().sqrt() < 0.05 * depth_reference.std()


@pytest.mark.parametrize("path", ["autocast", "full"])
def test_autocast_keeps_the_residual_and_the_gradients_in_fp32(path):
    """Warnings are errors here, and RMSNorm warns when it leaves its fused path for mixed dtypes."""
    model = make_model()
    residuals = []
    for stack in (model.backbone, model.depth):
        stack.layers[-1].register_forward_hook(lambda _module, _args, out: residuals.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=path == "autocast"):
        hidden = model.forward_backbone(make_frames(2, 12))
        logits = model.depth_logits(hidden[:, -1], make_frames(2, 2)[:, 1, :-1])
    logits.float().square().sum().backward()
    assert residuals == [torch.float32] * 2
    assert hidden.dtype == torch.float32
    assert logits.dtype == (torch.bfloat16 if path == "autocast" else torch.float32)
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("path", ["assign", "to_empty"])
def test_a_model_built_on_meta_is_right_once_it_has_weights(model, path):
    with torch.device("meta"):
        late = CSM(CONFIG)
    assert all(weight.is_meta for weight in late.parameters())
    if path == "to_empty":
        late.to_empty(device="cpu")
    late.load_state_dict(model.state_dict(), assign=path == "assign")
    late.to("cpu")
    frames = make_frames(2, 12)
    assert torch.equal(late.forward_backbone(frames), model.forward_backbone(frames))


def test_a_plain_rotary_model_works_too():
    model = make_model(replace(CONFIG, rope_scaling=None))
    assert not torch.equal(model.backbone.rotary.cos, make_model().backbone.rotary.cos)
    assert model.forward_backbone(make_frames(1, 8)).isfinite().all()
