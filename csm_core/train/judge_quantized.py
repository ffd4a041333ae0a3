"""What each quantisation costs a voice: error of its logits, codes that change, and the judge before and after.

Logits and greedy codes are those for the frames that the unquantised model spoke, so one changed code does not change
all that follow; the judge hears what each model says by itself. A mode whose voice it understands as well goes into
``quantize`` of the checkpoint's defaults. Needs the extra ``judge``.

    python -m csm_core.train.judge_quantized --model bundled --modes off int8 int4 int4:depth
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from csm_core.codec import Codec
from csm_core.config import Quantization
from csm_core.generator import Generator
from csm_core.loading import read_parts
from csm_core.model.checkpoint import Checkpoint, find_checkpoint, load_codec_state, load_model
from csm_core.model.csm import ABSENT, CSM
from csm_core.model.quantize import layers_for, quantize
from csm_core.prompt import build_prompt
from csm_core.spelling import spell_out
from csm_core.text import clean
from csm_core.train.judge import SENTENCES, Judge, spoken

PROBED = 8  # sentences whose logits are compared


def network(checkpoint: Checkpoint, mode: str) -> CSM:
    model = load_model(checkpoint, "cpu", torch.float32)
    return model if mode == "off" else quantize(model, Quantization.parse(mode))


def generator_of(checkpoint: Checkpoint, model: CSM) -> Generator:
    """As csm_core.load, without asking whether the voice survives what was done to the model: that is the question."""
    parts = read_parts(checkpoint)
    return Generator(model, Codec(parts.codec, load_codec_state(checkpoint)), parts.tokenizer, parts.profile)


@torch.no_grad()
def forced_logits(model: CSM, prompt: Tensor, codes: Tensor) -> Tensor:
    """Logits [n, K, V] that ``model`` gives the n frames ``codes`` [n, K] when they are what was said so far."""
    frames = torch.cat((prompt, F.pad(codes, (0, 1), value=ABSENT)))
    hidden = model.forward_backbone(frames.unsqueeze(0))[0, len(prompt) - 1 : -1]
    logits: list[Tensor] = []

    def pick(scores: Tensor, codebook: int) -> Tensor:
        logits.append(scores.float())
        return codes[:, codebook]

    model.decode_frame(hidden, pick)
    return torch.stack(logits, dim=1)


def speeches(checkpoint: Checkpoint, sentences: list[str], speaker: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompt and codes of what the unquantised model says."""
    parts = read_parts(checkpoint)
    with generator_of(checkpoint, network(checkpoint, "off")) as generator:
        for sentence in sentences:
            text = clean(sentence)
            text = spell_out(text) if parts.profile.spell_out else text
            prompt = build_prompt([], parts.tokenizer.encode(text, speaker), checkpoint.config.num_codebooks)
            yield prompt, generator.generate_codes(sentence, speaker, seed=0)


def compare(checkpoint: Checkpoint, modes: list[str], speaker: int) -> dict[str, dict[str, float]]:
    """Mode -> relative error of the logits (in norm) and share of greedy codes that stay, against fp32."""
    said = list(speeches(checkpoint, SENTENCES.read_text().splitlines()[:PROBED], speaker))
    exact = [forced_logits(network(checkpoint, "off"), *one) for one in said]
    table = {}
    for mode in modes:
        model = network(checkpoint, mode)
        logits = torch.cat([forced_logits(model, *one) for one in said])
        truth = torch.cat(exact)
        table[mode] = {
            "logit_error": ((logits - truth).norm() / truth.norm()).item(),
            "same_codes": (logits.argmax(-1) == truth.argmax(-1)).float().mean().item(),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--modes", nargs="+", default=["off", *layers_for(torch.device("cpu"))])
    parser.add_argument("--sentences", type=int, default=24, help="how many of them the judge hears; 0: only compare")
    parser.add_argument("--speakers", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = find_checkpoint(args.model)
    table = compare(checkpoint, args.modes, args.speakers[0])
    for mode, row in table.items():
        print(f"{mode:12} logit error {row['logit_error']:.4f}  same codes {row['same_codes']:.4f}", flush=True)
    if args.sentences:
        judge = Judge(SENTENCES.read_text().splitlines()[: args.sentences])
        for mode, row in table.items():
            with generator_of(checkpoint, network(checkpoint, mode)) as generator:
                for speaker in args.speakers:
                    score = judge.score(spoken(generator, judge.sentences, speaker, 0), generator.sample_rate)
                    row.update({f"identified_{speaker}": score.identified, f"word_error_{speaker}": score.word_error})
                    print(f"{mode:12} speaker {speaker}: {score}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
