"""The network against an independent implementation: the same random weights in transformers' CSM say the same frames.

Greedy decoding in fp32, rows of different lengths: transformers pads them on the left, ours not at all. The sounds of a
context go into transformers as PCM; what its codec makes of them goes into ours as codes.
"""

import pytest
import torch

from csm_core.config import CSM_1B, ModelConfig, StackConfig
from csm_core.model.csm import ABSENT, CSM, rotary_frequencies
from csm_core.model.kv_cache import KVCache
from csm_core.model.layouts import lm_names

transformers = pytest.importorskip("transformers")
from transformers.models.csm.modeling_csm import CsmRotaryEmbedding  # noqa: E402  (only with transformers)

AUDIO, AUDIO_EOS, PAD = 57, 58, 59  # placeholders that transformers keeps in the text vocabulary
SMALL = ModelConfig(
    backbone=StackConfig(layers=3, dim=64, heads=4, kv_heads=2, head_dim=16, ffn_dim=96),
    depth=StackConfig(layers=2, dim=48, heads=6, kv_heads=2, head_dim=8, ffn_dim=80),
    num_codebooks=6,
    codebook_size=64,
    audio_vocab_size=67,
    text_vocab_size=60,
    max_seq_len=128,
    bos_id=1,
    eos_id=2,
)
# Transformers' own numbers for CSM-1B. They differ between the stacks and from the original's; the angles do not.
BACKBONE_ROPE = {"low_freq_factor": 0.125, "high_freq_factor": 0.5, "original_max_position_embeddings": 1024}
DEPTH_ROPE = {"low_freq_factor": 0.001953125, "high_freq_factor": 0.0078125, "original_max_position_embeddings": 16}


def stack_settings(stack, rope):
    return {
        "hidden_size": stack.dim,
        "intermediate_size": stack.ffn_dim,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": stack.head_dim,
        "rope_theta": 500_000,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **rope},
    }


def transformers_config(config):
    depth = transformers.CsmDepthDecoderConfig(
        num_codebooks=config.num_codebooks,
        backbone_hidden_size=config.backbone.dim,
        vocab_size=config.audio_vocab_size,
        max_position_embeddings=config.num_codebooks + 1,
        **stack_settings(config.depth, DEPTH_ROPE),
    )
    codec = transformers.MimiConfig(
        hidden_size=16,
        num_filters=4,
        upsampling_ratios=[4, 2],
        codebook_size=config.codebook_size,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=config.num_codebooks,
        upsample_groups=16,
        num_hidden_layers=1,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.CsmConfig(
        num_codebooks=config.num_codebooks,
        vocab_size=config.audio_vocab_size,
        text_vocab_size=config.text_vocab_size,
        max_position_embeddings=config.max_seq_len,
        bos_token_id=config.bos_id,
        pad_token_id=PAD,
        audio_token_id=AUDIO,
        audio_eos_token_id=AUDIO_EOS,
        codebook_pad_token_id=config.audio_vocab_size - 1,
        depth_decoder_config=depth,
        codec_config=codec,
        **stack_settings(config.backbone, BACKBONE_ROPE),
    )


def make_pair(config, std):
    """Our model and transformers' with the same weight tensors: the 1B pair takes the memory of one."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        ours = CSM(config)
        theirs = transformers.CsmForConditionalGeneration(transformers_config(config))
    weights = {}
    for name, empty in ours.state_dict().items():
        spread = 0.3 if name.endswith("norm.weight") else std
        weights[name] = torch.empty(empty.shape).normal_(std=spread, generator=generator)
        if name.endswith("norm.weight"):
            weights[name] += 1.0
    ours.load_state_dict(weights, assign=True)
    named = {theirs_name: weights[name] for theirs_name, name in lm_names("transformers", config).items()}
    left = theirs.load_state_dict(named, strict=False, assign=True)
    assert left.unexpected_keys == []
    assert all(name.startswith("codec_model.") for name in left.missing_keys)
    # What transformers computes at construction is still on the meta device.
    for stack in (theirs.backbone_model, theirs.depth_decoder.model):
        stack.rotary_emb = CsmRotaryEmbedding(stack.config)
    offsets = torch.arange(config.num_codebooks) * config.audio_vocab_size
    theirs.backbone_model.embed_tokens.register_buffer("audio_tokens_offsets", offsets, persistent=False)
    theirs.codec_model = make_codec(theirs.config.codec_config)
    return ours.eval(), theirs.eval()


def make_codec(config):
    """Transformers' Mimi with random codebooks: it creates them empty, and would encode every sound as zeros."""
    torch.manual_seed(0)
    codec = transformers.MimiModel(config)
    for name, buffer in codec.named_buffers():
        if name.endswith("codebook.embed_sum"):
            buffer.normal_()
    return codec


@pytest.fixture(scope="module")
def pair():
    return make_pair(SMALL, std=0.15)


def text_frames(ids, num_codebooks):
    codes = torch.full((len(ids), num_codebooks), ABSENT)
    return torch.cat((codes, torch.tensor(ids).unsqueeze(1)), dim=1)


def audio_frames(codes):
    """Codes [T, K] and the end frame of zeros."""
    codes = torch.cat((codes, torch.zeros_like(codes[:1])))
    return torch.nn.functional.pad(codes, (0, 1), value=ABSENT)


@torch.inference_mode()
def our_greedy(model, prompts, count):
    """Codes [B, count, K] and codebook 0's logits [B, count, V], prompts padded on the right."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    frames = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=ABSENT)
    cache = KVCache(model.config.backbone, len(prompts), int(lengths.max()) + count, torch.float32, "cpu")
    hidden = model.forward_backbone(frames, cache=cache)[torch.arange(len(prompts)), lengths - 1]
    codes, logits = [], []
    for step in range(count):
        logits.append(model.codebook0_logits(hidden))
        codes.append(model.decode_frame(hidden, lambda now, _codebook: now.argmax(-1)))
        frame = torch.nn.functional.pad(codes[-1], (0, 1), value=ABSENT).unsqueeze(1)
        hidden = model.forward_backbone(frame, (lengths + step).unsqueeze(1), cache)[:, 0]
    return torch.stack(codes, 1), torch.stack(logits, 1)


@torch.inference_mode()
def their_greedy(model, rows, count, **audio):
    """The same from transformers, for text ids with placeholders, which it pads on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    attend = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        ids,
        attention_mask=attend,
        max_new_tokens=count,
        do_sample=False,
        depth_decoder_do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **audio,
    )
    # It stops when every row has met the end frame (in all but the last codebook), so an early end would be shorter.
    assert out.sequences.shape[1] == count
    return out.sequences, torch.stack(out.logits, 1)


def assert_same(ours, theirs, atol):
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=atol)
    assert torch.equal(ours[0], theirs[0])
    codes = ours[0].flatten(0, 1)
    assert len(codes.unique(dim=0)) > len(codes) // 2, "a fixed point compares little"


def random_ids(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, AUDIO, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(("stack", "rope"), [("backbone", BACKBONE_ROPE), ("depth", DEPTH_ROPE)])
def test_one_rotary_scaling_gives_the_angles_of_both_stacks(stack, rope):
    shape = getattr(CSM_1B, stack)
    settings = stack_settings(shape, rope)
    config = transformers.CsmDepthDecoderConfig(**settings) if stack == "depth" else transformers.CsmConfig(**settings)
    ours = rotary_frequencies(shape.head_dim, CSM_1B.rope_theta, CSM_1B.rope_scaling)
    torch.testing.assert_close(ours, CsmRotaryEmbedding(config).inv_freq, rtol=1e-6, atol=0)


def test_text_only_rows_of_different_lengths(pair):
    ours, theirs = pair
    rows = random_ids(9, 17, 3)
    prompts = [text_frames(row, SMALL.num_codebooks) for row in rows]
    assert_same(our_greedy(ours, prompts, 12), their_greedy(theirs, rows, 12), atol=1e-4)


def context_of_sounds(model):
    """Two turns with audio and a third to speak, beside a longer text without any; as transformers' and our input.

    Returns (rows of ids, what goes with them into transformers' ``generate``, our prompts).
    """
    codec, num_codebooks = model.codec_model, model.config.num_codebooks
    frame_size = codec.config.frame_size
    generator = torch.Generator().manual_seed(7)
    sounds = [torch.randn(1, count * frame_size, generator=generator) for count in (5, 3)]
    with torch.inference_mode():
        codes = [codec.encode(sound.unsqueeze(0)).audio_codes[0].T for sound in sounds]
    assert [len(heard.unique(dim=0)) for heard in codes] == [5, 3], "equal frames would hide their order"
    assert all(len(column.unique()) > 2 for column in torch.cat(codes).T), "equal codes would hide their codebook"
    turns = random_ids(4, 6, 5, 23)

    first = [*turns[0], *[AUDIO] * 5, AUDIO_EOS, *turns[1], *[AUDIO] * 3, AUDIO_EOS, *turns[2]]
    values = torch.zeros(2, 1, 8 * frame_size)
    values[0] = torch.cat(sounds, dim=-1)
    cutoffs = torch.tensor([[5 * frame_size, 8 * frame_size], [-1, -1]])
    texts = [text_frames(turn, num_codebooks) for turn in turns]
    spoken = torch.cat((texts[0], audio_frames(codes[0]), texts[1], audio_frames(codes[1]), texts[2]))
    return [first, turns[3]], {"input_values": values, "input_values_cutoffs": cutoffs}, [spoken, texts[3]]


def test_text_and_audio_context(pair):
    ours, theirs = pair
    rows, audio, prompts = context_of_sounds(theirs)
    assert_same(our_greedy(ours, prompts, 12), their_greedy(theirs, rows, 12, **audio), atol=1e-4)


def test_depth_logits_under_teacher_forcing(pair):
    ours, theirs = pair
    hidden, codes = torch.randn(5, SMALL.backbone.dim), torch.randint(0, SMALL.codebook_size, (5, SMALL.num_codebooks))
    with torch.inference_mode():
        ids = torch.nn.functional.pad(codes[:, :-1], (1, 0))  # position 0 is replaced by the hidden state
        expected = theirs.depth_decoder(input_ids=ids, backbone_last_hidden_state=hidden).logits
        torch.testing.assert_close(ours.depth_logits(hidden, codes), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_full_csm_1b_shape():
    """Sesame's own sizes with random weights: 6.2 GB of them, shared by both implementations. The codec stays tiny."""
    ours, theirs = make_pair(CSM_1B, std=0.02)
    rows = random_ids(6, 13)
    prompts = [text_frames(row, CSM_1B.num_codebooks) for row in rows]
    assert_same(our_greedy(ours, prompts, 3), their_greedy(theirs, rows, 3), atol=1e-3)
    rows, audio, prompts = context_of_sounds(theirs)
    assert_same(our_greedy(ours, prompts, 3), their_greedy(theirs, rows, 3, **audio), atol=1e-3)
