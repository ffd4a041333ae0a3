"""Small checkpoints in the layouts in which CSM is published, written without the package's own tables.

Transformers' layout is written by transformers itself. The original's names are spelled out here, and its rotary rows
are interleaved one by one: a mistake in csm_core/model/layouts.py cannot cancel out.
"""

import json
import math
import re
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

MIMI_FILE = "tokenizer-e351c8d8-checkpoint125.safetensors"
BOS, EOS, TEXT_VOCAB = 1, 2, 60
ROPE = {"rope_type": "llama3", "factor": 32.0}
# Transformers' numbers for CSM-1B: both mean the original's 8192, 1 and 4
BACKBONE_ROPE = {**ROPE, "low_freq_factor": 0.125, "high_freq_factor": 0.5, "original_max_position_embeddings": 1024}
DEPTH_ROPE = {**ROPE, "low_freq_factor": 2**-9, "high_freq_factor": 2**-7, "original_max_position_embeddings": 16}


def tokenizer(size=TEXT_VOCAB, letters="abcdefghijklmnopqrstuvwxyz HW,!.[]0123456789", bos=BOS, eos=EOS):
    """One id per character after four for <bos>, <eos>, <unk> and what is left of them; filled up to ``size``."""
    words = ["<spare>", "<spare1>", "<spare2>", "<unk>", *letters]
    words[bos], words[eos] = "<bos>", "<eos>"
    words += [f"<more{i}>" for i in range(size - len(words))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["<bos>", "<eos>"])
    return made


def mimi_config(**changes):
    settings = {
        "hidden_size": 32,
        "num_filters": 4,
        "upsampling_ratios": [4, 3, 2],
        "sampling_rate": 2400,
        "codebook_size": 64,
        "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16,
        "num_quantizers": 5,
        "upsample_groups": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "sliding_window": 40,
    }
    return transformers.MimiConfig(**{**settings, **changes})


def csm_config():
    depth = transformers.CsmDepthDecoderConfig(
        num_codebooks=4,
        backbone_hidden_size=64,
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=5,
        rope_scaling=DEPTH_ROPE,
    )
    return transformers.CsmConfig(
        num_codebooks=4,
        vocab_size=67,
        text_vocab_size=TEXT_VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        audio_token_id=57,
        audio_eos_token_id=58,
        rope_scaling=BACKBONE_ROPE,
        depth_decoder_config=depth,
        codec_config=mimi_config(),
    )


@torch.no_grad()
def randomise(module):
    """Every weight another one, norms and scales too, at sizes that keep activations alive through the layers."""
    for name, value in module.state_dict().items():
        if name.endswith(("norm.weight", "layernorm.weight", "scale", "cluster_usage")):
            value.uniform_(0.5, 1.5)
        elif name.endswith((".bias", "embed_sum")):
            value.normal_(std=0.2)
        elif value.is_floating_point() and not name.endswith("initialized"):
            value.normal_(std=1 / math.sqrt(value[0].numel()))
    return module.eval()


def csm():
    torch.manual_seed(0)
    return randomise(transformers.CsmForConditionalGeneration(csm_config()))


def mimi(**changes):
    torch.manual_seed(1)
    return randomise(transformers.MimiModel(mimi_config(**changes)))


def saved_state(model, folder: Path):
    """A model's weights under the names that files have: transformers 5 renames modules, not what it saves."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def write_transformers(folder: Path, model, shards=True):
    """As transformers saves it; with ``shards`` in several files, under the names that sesame/csm-1b gives them."""
    model.save_pretrained(folder, max_shard_size="150KB" if shards else "1GB")
    if shards:
        index = folder / "model.safetensors.index.json"
        text = index.read_text().replace('"model-', '"transformers-')
        index.unlink()
        (folder / "transformers.safetensors.index.json").write_text(text)
        for shard in folder.glob("model-*.safetensors"):
            shard.rename(folder / shard.name.replace("model-", "transformers-"))
        config = json.loads((folder / "config.json").read_text())
        config["transformers_weights"] = "transformers.safetensors.index.json"
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 20, "max_new_tokens": 125}')
    tokenizer().save(str(folder / "tokenizer.json"))


ORIGINAL_NAMES = [
    (r"^backbone_model\.layers", "backbone.layers"),
    (r"^depth_decoder\.model\.layers", "decoder.layers"),
    (r"^backbone_model\.norm\.weight", "backbone.norm.scale"),
    (r"^depth_decoder\.model\.norm\.weight", "decoder.norm.scale"),
    (r"^embed_text_tokens\.weight", "text_embeddings.weight"),
    (r"^backbone_model\.embed_tokens\.embed_audio_tokens\.weight", "audio_embeddings.weight"),
    (r"^lm_head\.weight", "codebook0_head.weight"),
    (r"^depth_decoder\.codebooks_head\.weight", "audio_head"),
    (r"^depth_decoder\.model\.inputs_embeds_projector", "projection"),
    (r"self_attn\.o_proj", "attn.output_proj"),
    (r"self_attn\.", "attn."),
    (r"mlp\.gate_proj", "mlp.w1"),
    (r"mlp\.down_proj", "mlp.w2"),
    (r"mlp\.up_proj", "mlp.w3"),
    (r"input_layernorm\.weight", "sa_norm.scale"),
    (r"post_attention_layernorm\.weight", "mlp_norm.scale"),
]


def interleave(weight, head_dim):
    """Row i of a head's first half goes to row 2i, row i of its second half to 2i + 1."""
    out = torch.empty_like(weight)
    for start in range(0, weight.shape[0], head_dim):
        for i in range(head_dim // 2):
            out[start + 2 * i] = weight[start + i]
            out[start + 2 * i + 1] = weight[start + head_dim // 2 + i]
    return out


def original_name(name):
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def original_state(model):
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("codec_model.") or name == "depth_decoder.model.embed_tokens.weight":
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[original_name(name)] = interleave(value, 8 if name.startswith("depth") else 16)
        else:
            state[original_name(name)] = value.clone()
    return state


def write_original(folder: Path, model, mimi_state=None):
    """model.safetensors in torchtune's names, a tokenizer, and Mimi's own file beside them when there is one."""
    folder.mkdir(exist_ok=True)
    save_file(original_state(model), folder / "model.safetensors")
    if not (folder / "config.json").exists():
        model.config.save_pretrained(folder)
    if mimi_state is not None:
        save_file(mimi_state, folder / MIMI_FILE)
    tokenizer().save(str(folder / "tokenizer.json"))
