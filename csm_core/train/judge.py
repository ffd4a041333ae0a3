"""An independent judge of speech: CMU pocketsphinx with its English model. It knows nothing of how the speech was made.

Two figures per set of clips: identification (the recogniser may only answer with one of the judged sentences; chance is
1 in their number) and open word error (full dictionary and language model). Controls that must fail beside the voice:
noise, the audio of another sentence, and an untrained model's audio. The extra ``judge`` brings pocketsphinx.

    python -m csm_core.train.judge --model bundled [--json judge.json]
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchaudio.functional as AF
from pocketsphinx import Decoder
from torch import Tensor, from_numpy, zeros

import csm_core
from csm_core.codec import Codec
from csm_core.errors import SilentOutputError
from csm_core.generator import Generator

SENTENCES = Path(__file__).with_name("judge_sentences.txt")
RATE = 16_000  # of the recogniser's acoustic model
GOOD = 0.9  # identified at least, of what the voice says
MARGIN = 0.4  # seconds of near-silence around a clip: without it the recogniser drops last words


@dataclass(frozen=True)
class Score:
    """Share of clips identified, and word errors per word of the reference."""

    clips: int
    identified: float
    word_error: float


def words_of(sentence: str) -> list[str]:
    return re.sub(r"[^a-z' ]", " ", sentence.lower()).split()


def edit_distance(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def as_pcm16(audio: Tensor, sample_rate: int) -> bytes:
    """Mono float audio as the recogniser wants it: 16 kHz, level 0.7, margins of faint noise."""
    wave = AF.resample(audio.float(), sample_rate, RATE).numpy()
    wave = wave / max(1e-6, float(np.abs(wave).max())) * 0.7
    wave = np.pad(wave, round(MARGIN * RATE))
    wave += np.random.default_rng(0).normal(0, 1e-4, len(wave))
    return (wave * 32767).clip(-32768, 32767).astype(np.int16).tobytes()


class Judge:
    """Recognises clips, once among the given sentences and once freely."""

    def __init__(self, sentences: Sequence[str]) -> None:
        self.sentences = list(sentences)
        self.free = Decoder(loglevel="FATAL")
        self.closed = Decoder(lm=None, loglevel="FATAL")
        unknown = {w for s in sentences for w in words_of(s) if self.closed.lookup_word(w) is None}
        if unknown:
            raise ValueError(f"the recogniser's dictionary lacks {sorted(unknown)}: choose other words")
        rule = " | ".join(" ".join(words_of(s)) for s in sentences)
        self.closed.add_jsgf_string("sentences", f"#JSGF V1.0; grammar sentences; public <sentence> = {rule};")
        self.closed.activate_search("sentences")

    def score(self, clips: Iterable[Tensor], sample_rate: int) -> Score:
        """Judge clips that should say the sentences, in their order; an empty clip counts as wrong."""
        right = errors = words = count = 0
        for sentence, clip in zip(self.sentences, clips, strict=True):
            pcm = as_pcm16(clip, sample_rate)
            reference = words_of(sentence)
            right += recognise(self.closed, pcm) == reference
            errors += edit_distance(reference, recognise(self.free, pcm))
            words += len(reference)
            count += 1
        return Score(count, right / count, errors / words)


def recognise(decoder: Decoder, pcm: bytes) -> list[str]:
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    return words_of(hypothesis.hypstr) if hypothesis else []


def spoken(generator: Generator, sentences: Sequence[str], speaker: int, seed: int) -> list[Tensor]:
    """The sentences as the model says them; where it stays silent, an empty clip."""
    clips = []
    for number, sentence in enumerate(sentences):
        try:
            clips.append(generator.generate(sentence, speaker, seed=seed + number))
        except SilentOutputError:
            clips.append(zeros(1))
    return clips


def babble(codec: Codec, clips: Sequence[Tensor]) -> list[Tensor]:
    """An untrained model of the same shape: uniform codes through the same codec, as long as the given clips."""
    rng = np.random.default_rng(0)
    size = codec.config.codebook_size
    return [
        codec.decode(from_numpy(rng.integers(0, size, (max(1, len(c) // codec.frame_size), codec.num_codebooks))))
        for c in clips
    ]


def noise(clips: Sequence[Tensor]) -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [from_numpy(rng.normal(0, 0.1, len(c)).astype(np.float32)) for c in clips]


def controls(judge: Judge, generator: Generator, clips: list[Tensor]) -> dict[str, Score]:
    """What the judge must not believe."""
    rate = generator.sample_rate
    return {
        "another sentence": judge.score(clips[1:] + clips[:1], rate),
        "untrained model": judge.score(babble(generator.codec, clips), rate),
        "noise": judge.score(noise(clips), rate),
    }


def show(table: dict[str, Score], choices: int) -> None:
    print(f"{'':22} clips  identified  word error    (chance {1 / choices:.3f})")
    for name, score in table.items():
        print(f"{name:22} {score.clips:5}  {score.identified:10.3f}  {score.word_error:10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--sentences", type=Path, default=SENTENCES)
    parser.add_argument("--speakers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    judge = Judge(args.sentences.read_text().splitlines())
    generator = csm_core.load(args.model)
    table: dict[str, Score] = {}
    for speaker in args.speakers:
        clips = spoken(generator, judge.sentences, speaker, args.seed)
        table[f"model, speaker {speaker}"] = judge.score(clips, generator.sample_rate)
    table.update(controls(judge, generator, clips))
    show(table, len(judge.sentences))
    if args.json:
        args.json.write_text(json.dumps({name: vars(score) for name, score in table.items()}, indent=1) + "\n")
    worst = min(score.identified for name, score in table.items() if name.startswith("model"))
    sys.exit(0 if worst >= GOOD else 1)


if __name__ == "__main__":
    main()
