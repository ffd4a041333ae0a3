"""The teacher before the judge: the ceiling for the voice that learnt from it. Needs flite and the extra ``train``.

python -m csm_core.train.judge_teacher
"""

import numpy as np
from torch import from_numpy

from csm_core.train import teacher
from csm_core.train.data import SAMPLE_RATE
from csm_core.train.judge import SENTENCES, Judge, show


def main() -> None:
    judge = Judge(SENTENCES.read_text().splitlines())
    table = {}
    for speaker in range(len(teacher.SPEAKERS)):
        clips = [from_numpy(teacher.speak(s, speaker)[0].astype(np.float32) / 32768) for s in judge.sentences]
        table[f"teacher of speaker {speaker}"] = judge.score(clips, SAMPLE_RATE)
    show(table, len(judge.sentences))


if __name__ == "__main__":
    main()
