"""What somebody uploads as the sample of a voice, made fit to be one: trimmed, levelled, and checked for speech.

The checks are arithmetic on levels and pitch, no model: they refuse what cannot become a voice (silence, noise, tones,
distortion), not what merely sounds bad. Knows no files and no voices.
"""

import torch
import torch.nn.functional as F

from csm_core.errors import InvalidInputError

WINDOW_SECONDS = 0.04  # holds two periods of a voice at 60 Hz
HOP_SECONDS = 0.02
PITCH = (60.0, 400.0)  # Hz, of voices

SPEECH_BELOW_PEAK_DB = 35.0  # a window that far below the loudest ones is background
QUIETEST_DB = -60.0  # and below this always
KEPT_SECONDS = 0.15  # around speech: soft first and last sounds are below any threshold

TARGET_DB = -20.0  # RMS of the windows with speech, against full scale; CSM's own speech is near that
PEAK = 0.95

# Measured on 180 clips of two synthetic voices, and on noise, tones, hum, chords and clipped copies of the clips.
MIN_VOICED_SHARE = 0.3  # of the loud windows; speech .58 to .99 (.38 under noise at 10 dB), chords .24, noise .0
MIN_PERIODICITY = 0.6  # normalised autocorrelation at the best pitch lag; above it a window is voiced
MIN_SPREAD_DB = 5.0  # 10th to 90th percentile of the loud windows' levels: syllables 10 to 27, tones and hum 0 to 2.4
# Of the samples that count (above a tenth of the ceiling, which is the 99.5th percentile), how many lie within 15 % of
# it. Speech .013 to .039; cut off at a third of its peak .07 to .5, also after resampling, which rounds flat peaks off.
MAX_CEILING_SHARE = 0.065


def prepare_sample(
    pcm: torch.Tensor, sample_rate: int, min_seconds: float = 1.0, max_seconds: float = 30.0
) -> torch.Tensor:
    """Mono PCM ``[samples]`` -> the same without silence around it, its speech at -20 dBFS RMS, its peak below 0.95.

    The limits are of what is left after trimming. Raises InvalidInputError (param ``audio_sample``) that says why:
    silent, too short, too long, distorted, no speech.
    """
    windows = _windows(pcm.detach().to("cpu", torch.float32), sample_rate)
    levels = _decibels(windows.square().mean(dim=1).sqrt())
    loudest = float(levels.max()) if len(levels) else -torch.inf
    if not loudest > QUIETEST_DB:
        raise _refused("is silent")
    loud = levels > max(loudest - SPEECH_BELOW_PEAK_DB, QUIETEST_DB)
    trimmed = _trim(pcm, loud, sample_rate)
    seconds = len(trimmed) / sample_rate
    if seconds < min_seconds:
        raise _refused(f"has {seconds:.1f} s of sound; at least {min_seconds:g} s are needed")
    if seconds > max_seconds:
        raise _refused(f"is {seconds:.1f} s long; at most {max_seconds:g} s are used")
    if _ceiling_share(windows[loud]) > MAX_CEILING_SHARE:
        raise _refused("is distorted: it was recorded so loud that its peaks are cut off")
    if not _is_speech(windows[loud], levels[loud], sample_rate):
        raise _refused("has no speech in it that can be told from noise or tones")
    rms = float(windows[loud].square().mean().sqrt())
    return trimmed * min(10 ** (TARGET_DB / 20) / rms, PEAK / float(trimmed.abs().max()))


def _refused(why: str) -> InvalidInputError:
    return InvalidInputError(f"The sample {why}: send a few seconds of one person speaking clearly.", "audio_sample")


def _windows(pcm: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Overlapping views ``[windows, samples]``; none of a clip shorter than one."""
    size = round(WINDOW_SECONDS * sample_rate)
    return pcm.unfold(0, size, round(HOP_SECONDS * sample_rate)) if len(pcm) >= size else pcm.new_zeros(0, size)


def _decibels(rms: torch.Tensor) -> torch.Tensor:
    return 20 * rms.clamp_min(1e-9).log10()


def _trim(pcm: torch.Tensor, loud: torch.Tensor, sample_rate: int) -> torch.Tensor:
    hop, size, kept = (round(s * sample_rate) for s in (HOP_SECONDS, WINDOW_SECONDS, KEPT_SECONDS))
    first, last = int(loud.nonzero()[0]), int(loud.nonzero()[-1])
    return pcm[max(0, first * hop - kept) : last * hop + size + kept]


def _ceiling_share(windows: torch.Tensor) -> float:
    size = windows.abs().flatten()
    ceiling = size.kthvalue(max(1, round(0.995 * len(size)))).values  # torch.quantile takes 16 million numbers only
    return float((size > 0.85 * ceiling).sum() / (size > 0.1 * ceiling).sum().clamp_min(1))


def _is_speech(windows: torch.Tensor, levels: torch.Tensor, sample_rate: int) -> bool:
    """Loud ``windows`` ``[n, samples]`` with their levels in dB: does the level move, and is there a pitch?"""
    low, high = torch.quantile(levels, torch.tensor([0.1, 0.9])).tolist()
    voiced = float((_periodicity(windows, sample_rate) > MIN_PERIODICITY).float().mean())
    return high - low >= MIN_SPREAD_DB and voiced >= MIN_VOICED_SHARE


def _periodicity(windows: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """The best normalised autocorrelation of each window at a lag of a voice's pitch: 1 is periodic, 0 is noise."""
    centred = windows - windows.mean(dim=1, keepdim=True)
    size = centred.shape[1]
    correlation = torch.fft.irfft(torch.fft.rfft(centred, 2 * size).abs().square(), 2 * size)[:, :size]
    energy = F.pad(centred.square().cumsum(dim=1), (1, 0))  # [n, size + 1]: of the first k samples
    lags = torch.arange(round(sample_rate / PITCH[1]), min(round(sample_rate / PITCH[0]), size * 3 // 4))
    head, tail = energy[:, size - lags], energy[:, -1:] - energy[:, lags]
    best: torch.Tensor = (correlation[:, lags] / (head * tail).sqrt().clamp_min(1e-9)).amax(dim=1)
    return best
