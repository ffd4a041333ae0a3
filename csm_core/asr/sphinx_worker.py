"""The process behind ``sphinx``: reads clips on stdin, writes the words in them on stdout.

A clip is its number of bytes on a line, then that many of 16 kHz 16-bit PCM; an answer is a line of JSON, a list of
[word, start, end] in seconds. Imports nothing but pocketsphinx, so that it starts at once. Its end is that of stdin.
"""

import json
import re
import sys

from pocketsphinx import Decoder

FRAME_SECONDS = 0.01
# Noise and music keep tens of thousands of hypotheses alive; a tenth of that changes little on speech.
SEARCH = {"maxhmmpf": 3000, "maxwpf": 20}


def load(phrases: list[str]) -> Decoder:
    if not phrases:
        return Decoder(loglevel="FATAL", **SEARCH)
    decoder = Decoder(lm=None, loglevel="FATAL")
    rule = " | ".join(re.sub(r"[^a-z' ]", " ", phrase.lower()) for phrase in phrases)
    decoder.add_jsgf_string("phrases", f"#JSGF V1.0; grammar phrases; public <phrase> = {rule};")
    decoder.activate_search("phrases")
    return decoder


def recognise(decoder: Decoder, pcm: bytes) -> list[tuple[str, float, float]]:
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()
    if decoder.hyp() is None:
        return []
    words = (
        # "read(2)" is another pronunciation of "read"; "<sil>" and "[NOISE]" are no words.
        (re.sub(r"\(\d+\)$", "", part.word), part.start_frame * FRAME_SECONDS, (part.end_frame + 1) * FRAME_SECONDS)
        for part in decoder.seg()
        if part.word[0] not in "<["
    )
    return [(text, round(start, 2), round(end, 2)) for text, start, end in words]


def main() -> None:
    decoder = load(json.loads(sys.argv[1]))
    for line in iter(sys.stdin.buffer.readline, b""):
        pcm = sys.stdin.buffer.read(int(line))
        sys.stdout.write(json.dumps(recognise(decoder, pcm)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
