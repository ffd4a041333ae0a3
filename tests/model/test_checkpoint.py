"""Find, load and save: every layout made from one model gives that model, and what is broken says what and where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from csm_core.codec import build_mimi
from csm_core.config import CSM_1B, MIMI, CodecConfig
from csm_core.errors import (
    CheckpointError,
    CorruptFileError,
    MissingFileError,
    ShapeMismatchError,
    TokenizerMismatchError,
)
from csm_core.model import layouts
from csm_core.model.checkpoint import (
    Description,
    convert,
    find_checkpoint,
    load_codec_state,
    load_model,
    load_tokenizer,
    save_native,
)
from csm_core.model.csm import ABSENT, CSM
from csm_core.model.weights import write_tensors
from tests.model import published


@pytest.fixture(scope="session")
def theirs():
    return published.csm()


@pytest.fixture(scope="session")
def transformers_folder(tmp_path_factory, theirs):
    folder = tmp_path_factory.mktemp("transformers")
    published.write_transformers(folder, theirs)
    return folder


@pytest.fixture(scope="session")
def original_folder(tmp_path_factory, theirs, transformers_folder):
    folder = tmp_path_factory.mktemp("original")
    mimi = load_codec_state(find_checkpoint(str(transformers_folder)))
    published.write_original(folder, theirs, mimi)
    return folder


def tiny_tokenizer(config, size=64, **letters):
    return published.tokenizer(size, bos=config.bos_id, eos=config.eos_id, **letters)


@pytest.fixture
def native_folder(tmp_path, tiny_model, tiny_codec_state, tiny_codec_config):
    tiny_tokenizer(tiny_model.config).save(str(tmp_path / "made.json"))
    description = Description("tiny", tiny_codec_config.to_dict(), {"temperature": 0.6}, tmp_path / "made.json")
    return save_native(tmp_path / "native", tiny_model, tiny_codec_state, description, dtype=torch.float32)


def load(folder, dtype=torch.float32):
    return load_model(find_checkpoint(str(folder)), "cpu", dtype)


@torch.no_grad()
def logits(model):
    """Of all codebooks, for three rows of text then audio."""
    config = model.config
    generator = torch.Generator().manual_seed(5)
    text = torch.full((3, 4, config.num_codebooks + 1), ABSENT)
    text[..., -1] = torch.randint(config.text_vocab_size, (3, 4), generator=generator)
    audio = torch.full((3, 6, config.num_codebooks + 1), ABSENT)
    audio[..., :-1] = torch.randint(config.codebook_size, (3, 6, config.num_codebooks), generator=generator)
    frames = torch.cat((text, audio), dim=1)
    hidden = model.forward_backbone(frames)
    depth = model.depth_logits(hidden[:, 3:-1].flatten(0, 1), audio[..., :-1][:, :6].flatten(0, 1))
    return frames, model.codebook0_logits(hidden), depth


# --- the layouts ------------------------------------------------------------------------------------------------------


def test_transformers_layout_is_the_model_that_transformers_saved(theirs, transformers_folder):
    assert len(list(transformers_folder.glob("*.safetensors"))) > 2
    found = find_checkpoint(str(transformers_folder))
    assert (found.layout, found.defaults) == ("transformers", {"temperature": 0.7, "top_k": 20})
    ours = load_model(found, "cpu", torch.float32)
    frames, first, depth = logits(ours)
    with torch.no_grad():
        hidden = theirs.backbone_model(inputs_embeds=ours.embed(frames)).last_hidden_state
        expected = theirs.lm_head(hidden)
        codes = frames[:, 4:, :-1].flatten(0, 1)
        previous = torch.nn.functional.pad(codes[:, :-1], (1, 0))  # position 0 is the backbone's hidden state
        out = theirs.depth_decoder(previous, backbone_last_hidden_state=hidden[:, 3:-1].flatten(0, 1))
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(depth, out.logits, atol=1e-4, rtol=1e-4)


def test_all_layouts_give_identical_logits(transformers_folder, original_folder, theirs, tmp_path):
    published.write_transformers(tmp_path / "single", theirs, shards=False)
    native = convert(str(original_folder), tmp_path / "native")
    expected = logits(load(transformers_folder))
    for folder in (original_folder, tmp_path / "single"):
        for ours, wanted in zip(logits(load(folder)), expected, strict=True):
            assert torch.equal(ours, wanted)
    expected = logits(load(transformers_folder, torch.bfloat16))
    for ours, wanted in zip(logits(load(native, torch.bfloat16)), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_codec_of_each_layout_speaks_alike(theirs, transformers_folder, original_folder, tmp_path):
    codes = torch.randint(64, (1, 5, 9))
    with torch.no_grad():
        expected = theirs.codec_model.decode(codes).audio_values
        for folder in (transformers_folder, original_folder, convert(str(transformers_folder), tmp_path / "native")):
            found = find_checkpoint(str(folder))
            mimi = build_mimi(CodecConfig.from_dict(found.codec))
            mimi.load_state_dict(load_codec_state(found))
            torch.testing.assert_close(mimi.decode(codes), expected, atol=1e-4, rtol=1e-4)


def test_two_audio_embeddings_that_differ(theirs, tmp_path):
    """Transformers ties them; early 5.x could lose the tie in training, and CSM has one."""
    published.write_transformers(tmp_path, theirs, shards=False)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    names = ["depth_decoder.model.embed_tokens.weight", "backbone_model.embed_tokens.embed_audio_tokens.weight"]
    value = next(state[name] for name in names if name in state)
    save_file({**state, names[0]: value, names[1]: value.clone()}, file)
    load(tmp_path)
    save_file({**state, names[0]: value, names[1]: value + 0.1}, file)
    with pytest.raises(CheckpointError, match="one audio embedding"):
        load(tmp_path)


def test_both_layouts_in_one_folder(theirs, tmp_path):
    """As in sesame/csm-1b: the complete one is taken, Transformers' first because it brings its codec."""
    published.write_transformers(tmp_path, theirs)
    published.write_original(tmp_path, theirs)
    assert find_checkpoint(str(tmp_path)).layout == "transformers"
    expected = logits(load(tmp_path))
    shards = sorted(tmp_path.glob("transformers-*.safetensors"))
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2])
    assert find_checkpoint(str(tmp_path)).layout == "original"
    shards[0].unlink()
    found = find_checkpoint(str(tmp_path))
    assert (found.layout, found.codec_files) == ("original", {})
    assert all(
        torch.equal(a, b) for a, b in zip(logits(load_model(found, "cpu", torch.float32)), expected, strict=True)
    )


# --- native -----------------------------------------------------------------------------------------------------------


def test_native_round_trip(native_folder, tiny_model, tiny_codec_state, tiny_codec_config):
    found = find_checkpoint(str(native_folder))
    assert (found.name, found.layout, found.defaults) == ("tiny", "native", {"temperature": 0.6})
    assert found.config == tiny_model.config
    assert CodecConfig.from_dict(found.codec) == tiny_codec_config
    loaded = load_model(found, "cpu", torch.float32)
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(logits(loaded), logits(tiny_model), strict=True))
    state = load_codec_state(found)
    assert state.keys() == tiny_codec_state.keys()
    assert all(torch.equal(value, tiny_codec_state[name]) for name, value in state.items())
    assert load_tokenizer(found).encode("hello").ids == tiny_tokenizer(found.config).encode("hello").ids


def test_dtypes_of_the_files_and_of_what_is_loaded(native_folder, tiny_model, tiny_codec_state, tmp_path):
    found = find_checkpoint(str(native_folder))
    save_native(tmp_path / "small", tiny_model, tiny_codec_state, found, codec_dtype=torch.float16)
    stored = load_file(tmp_path / "small" / "model.safetensors")  # safetensors' own reader on our writer's file
    assert {value.dtype for name, value in stored.items() if name.startswith("codec.")} == {torch.float16}
    assert {value.dtype for name, value in stored.items() if not name.startswith("codec.")} == {torch.bfloat16}
    assert torch.equal(stored["audio_head"], tiny_model.audio_head.bfloat16())
    small = find_checkpoint(str(tmp_path / "small"))
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(small, "cpu", dtype)
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        assert model.backbone.rotary.cos.dtype == torch.float32
    assert {value.dtype for value in load_codec_state(small).values()} == {torch.float32}


def test_convert_writes_bf16_with_an_fp32_codec(transformers_folder, tmp_path):
    folder = convert(str(transformers_folder), tmp_path / "deep" / "er")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    stored = load_file(folder / "model.safetensors")
    assert {str(v.dtype) for n, v in stored.items() if n.startswith("codec.")} == {"torch.float32"}
    assert {str(v.dtype) for n, v in stored.items() if not n.startswith("codec.")} == {"torch.bfloat16"}
    assert find_checkpoint(str(folder)).defaults == {"temperature": 0.7, "top_k": 20}
    with pytest.raises(CheckpointError, match="choose another folder"):
        convert(str(folder), folder)


def test_a_failed_save_leaves_what_was_there(native_folder, tiny_model, tiny_codec_state):
    found = find_checkpoint(str(native_folder))
    before = {file.name: file.read_bytes() for file in native_folder.iterdir()}
    lost = {**tiny_codec_state, "no_values": torch.empty(2, device="meta")}
    with pytest.raises(NotImplementedError, match="meta"):  # in the middle of writing, as a full disk would be
        save_native(native_folder, tiny_model, lost, found)
    with pytest.raises(CheckpointError, match="cannot be stored"):
        save_native(native_folder, tiny_model, tiny_codec_state, found, codec_dtype=torch.int64)
    assert {file.name: file.read_bytes() for file in native_folder.iterdir()} == before
    save_native(native_folder, tiny_model, tiny_codec_state, found)  # onto itself: its own tokenizer is the source
    assert sorted(file.name for file in native_folder.iterdir()) == sorted(before)


# --- what can be wrong ------------------------------------------------------------------------------------------------


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_no_such_model(tmp_path):
    with pytest.raises(MissingFileError, match="neither a folder"):
        find_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(MissingFileError, match="no CSM weights"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "ckpt.pt").write_bytes(b"\x80\x02")
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(MissingFileError, match="pickle: never read"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file(native_folder, name):
    (native_folder / name).unlink()
    with pytest.raises(MissingFileError, match=name):
        find_checkpoint(str(native_folder))


def test_missing_shard(theirs, tmp_path):
    published.write_transformers(tmp_path, theirs)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MissingFileError, match=f"transformers.safetensors.index.json names {shard.name}"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_truncated_weights(native_folder, kept):
    file = native_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CorruptFileError, match=r"model.safetensors is truncated"):
        find_checkpoint(str(native_folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": []}'])
def test_damaged_json(native_folder, text):
    name = "model.safetensors.index.json" if "weight_map" in text else "config.json"
    (native_folder / name).write_text(text)
    if "weight_map" in text:  # a broken index beside whole weights is not in the way
        assert find_checkpoint(str(native_folder)).layout == "native"
        (native_folder / "model.safetensors").unlink()
    with pytest.raises(CorruptFileError, match=name):
        find_checkpoint(str(native_folder))


@pytest.mark.parametrize("changes", [{"format": "csm-native-9"}, {"model": {"layers": 3}}, {"model": None}])
def test_config_of_another_kind(native_folder, changes):
    edit(native_folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"config.json"):
        find_checkpoint(str(native_folder))


def rewrite(folder, change):
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)


def test_wrong_shape_names_the_tensor_and_both_shapes(native_folder):
    rewrite(native_folder, lambda state: state.update({"audio_head": torch.zeros(1, 16, 65)}))
    with pytest.raises(ShapeMismatchError, match=r"audio_head .*\(1, 16, 65\).*\(1, 16, 64\)"):
        load(native_folder)


def test_a_tensor_too_few_or_too_many(native_folder):
    rewrite(native_folder, lambda state: state.pop("backbone.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, backbone.layers.1.mlp.up_proj.weight"):
        load(native_folder)
    rewrite(native_folder, lambda state: state.update({"backbone.layers.1.mlp.up_proj.weight": torch.zeros(32, 16)}))
    load(native_folder)
    rewrite(native_folder, lambda state: state.update({"lora_a": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="lora_a"):
        load(native_folder)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer_error(folder, tokenizer):
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerMismatchError) as caught:
        load_tokenizer(find_checkpoint(str(folder)))
    return str(caught.value)


def test_tokenizer_with_a_larger_vocabulary(native_folder, tiny_model_config):
    assert "ids up to 64, they end at 63" in tokenizer_error(native_folder, tiny_tokenizer(tiny_model_config, 65))


def test_tokenizer_with_other_ids(native_folder, tiny_model_config):
    other = tiny_tokenizer(tiny_model_config, letters="zyxwvutsrqponmlkjihgfedcbaWH,! ")
    assert "Hello, world!" in tokenizer_error(native_folder, other)


def test_tokenizer_without_the_bos_of_the_weights(native_folder, tiny_model_config):
    model = {**tiny_model_config.to_dict(), "bos_id": 63}
    edit(native_folder / "config.json", model=model)
    assert "no id 63, their BOS" in tokenizer_error(native_folder, tiny_tokenizer(tiny_model_config, 50))


def test_tokenizer_that_frames_with_other_ids(native_folder, tiny_model_config):
    bos, eos = tiny_model_config.bos_id, tiny_model_config.eos_id
    tokenizer = tiny_tokenizer(tiny_model_config)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 3), ("<eos>", eos)]
    )
    assert f"frames a text with the ids [{eos}, 3]" in tokenizer_error(native_folder, tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    tokenizer.save(str(native_folder / "tokenizer.json"))
    load_tokenizer(find_checkpoint(str(native_folder)))


def test_tokenizer_that_is_none(native_folder, tiny_model, tiny_codec_state):
    found = find_checkpoint(str(native_folder))
    found.tokenizer_file.write_text('{"version": "1.0"}')
    with pytest.raises(CorruptFileError, match="not a tokenizer"):
        load_tokenizer(found)
    tiny_tokenizer(found.config, 65).save(str(found.tokenizer_file))
    with pytest.raises(TokenizerMismatchError):  # nor is one saved that does not fit
        save_native(native_folder / "again", tiny_model, tiny_codec_state, found)
    assert not (native_folder / "again").exists()


def test_llama_3_ids_are_asked_of_published_weights_with_its_vocabulary(transformers_folder, theirs, tmp_path):
    assert find_checkpoint(str(transformers_folder)).probe_ids is None
    published.write_original(tmp_path, theirs)
    (tmp_path / "config.json").unlink()  # then it is CSM-1B
    found = find_checkpoint(str(tmp_path))
    assert (found.config, found.codec) == (CSM_1B, MIMI.to_dict())
    assert found.probe_ids == [9906, 11, 1917, 0]
    with pytest.raises(TokenizerMismatchError, match="no id 128000"):
        load_tokenizer(found)
    with pytest.raises(CheckpointError, match="lacks"):
        load_model(found, "cpu", torch.bfloat16)


# --- full size --------------------------------------------------------------------------------------------------------

LOAD_AND_MEASURE = """
import sys, time, torch
from csm_core.model.checkpoint import find_checkpoint, load_model
def peak():  # of this process alone; getrusage would count what the parent had before exec
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, start = peak(), time.perf_counter()
model = load_model(find_checkpoint(sys.argv[1]), "cpu", torch.bfloat16)
seconds = time.perf_counter() - start
weights = sum(weight.nbytes for weight in model.parameters())
print(before, peak(), weights, seconds, model.audio_head.float().abs().sum().item())
assert not {"sympy", "torch._dynamo"} & set(sys.modules), "seconds of imports that loading has no use for"
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_peak_memory_of_loading_csm_1b(tmp_path):
    """3.1 GB of bf16 in the original layout: the peak is the model and its largest tensor (0.5 GB), not two models."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in CSM(CSM_1B).named_parameters()}
    largest = max(shape.numel() for shape in shapes.values())
    noise = torch.randn(2**20).bfloat16().repeat(largest // 2**20 + 1)  # every tensor is a view of it
    names = layouts.lm_names("original", CSM_1B)
    tensors = {name: noise[: shapes[native].numel()].view(shapes[native]) for name, native in names.items()}
    write_tensors(tmp_path / "model.safetensors", tensors, dict.fromkeys(tensors, torch.bfloat16))
    published.tokenizer().save(str(tmp_path / "tokenizer.json"))
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path)], check=True, capture_output=True, text=True
    )
    before, peak, weights, seconds, checksum = (float(field) for field in run.stdout.split())
    print(f"weights {weights / 1e9:.2f} GB, {before / 1e9:.2f} GB before, peak {peak / 1e9:.2f} GB, {seconds:.1f} s")
    assert weights > 3.0e9
    assert checksum == pytest.approx(
        tensors["audio_head"].float().abs().sum().item(), rel=1e-6
    )  # threads sum in any order
    assert peak - before < 1.25 * weights
