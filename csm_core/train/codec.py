"""Train the small codec: moshi's Mimi on the teacher's audio, without a discriminator.

Stage one trains encoder and decoder around the quantiser's projections alone; then the codebooks start at the k-means
of what the encoder says, and stage two trains through them. Checkpoints hold everything; the same command continues.
``--refine`` trains the decoder further once codes are in use elsewhere.

    python -m csm_core.train.codec --audio runs/voice/audio --out runs/voice/codec.pt
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torchaudio
from moshi.models.compression import MimiModel
from torch import Tensor, nn

from csm_core.codec import build_mimi
from csm_core.config import BUNDLED_CODEC
from csm_core.train.data import CELLS, PHONES, Crops, shards, written_whole

RESOLUTIONS = ((2048, 100), (1024, 80), (512, 64), (256, 32), (128, 16))  # window in samples, mel bands
LOUDNESS_FLOOR = 2e-3  # keeps the logarithm from counting what nobody hears


class SpectralLoss(nn.Module):
    """Mel distance at five resolutions: magnitude in linear and logarithmic form, mean absolute."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.mels = nn.ModuleList(
            torchaudio.transforms.MelSpectrogram(
                sample_rate, n_fft, hop_length=n_fft // 4, n_mels=bands, power=1.0, normalized="window", center=False
            )
            for n_fft, bands in RESOLUTIONS
        )

    def forward(self, spoken: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros((), device=spoken.device)
        for mel in self.mels:
            a, b = mel(spoken), mel(target)
            logs = (torch.log(a + LOUDNESS_FLOOR) - torch.log(b + LOUDNESS_FLOOR)).abs().mean()
            total = total + logs + (a - b).abs().mean()
        return total / len(self.mels)


def start_weights(mimi: MimiModel) -> None:
    """Keep the variance through the convolutions: torch's default start stays at the loss of silence for 100 steps."""
    for name, module in [*mimi.encoder.named_modules(), *mimi.decoder.named_modules()]:
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            continue
        weight = module.weight
        if isinstance(module, nn.ConvTranspose1d):
            fan_in = weight.shape[0] * weight.shape[2] / module.stride[0]
        else:
            fan_in = weight.shape[1] * weight.shape[2]
        scale = 0.5 if ".block.3." in name else 1.0  # the second convolution of a residual block
        nn.init.normal_(weight, std=scale * math.sqrt(1.3 / fan_in))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    last = [m for m in mimi.decoder.modules() if isinstance(m, nn.Conv1d)][-1]
    with torch.no_grad():
        last.weight.mul_(0.1)


def latent(mimi: MimiModel, wave: Tensor) -> Tensor:
    """What the quantiser sees: ``[B, 1, S]`` -> ``[B, dim, frames]`` in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        emb = mimi.encoder(wave)
        (emb,) = mimi.encoder_transformer(emb)
        found: Tensor = mimi._to_framerate(emb).float()
    return found


def speak(mimi: MimiModel, emb: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        emb = mimi._to_encoder_framerate(emb)
        (emb,) = mimi.decoder_transformer(emb)
        spoken: Tensor = mimi.decoder(emb).float()
    return spoken


def unquantised(mimi: MimiModel, emb: Tensor) -> tuple[Tensor, Tensor]:
    """The two branches of the quantiser without their codebooks: semantic part and sum."""
    first, rest = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
    semantic = first.output_proj(first.input_proj(emb))
    return semantic, semantic + rest.output_proj(rest.input_proj(emb))


def quantised(mimi: MimiModel, emb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Semantic part, sum and commitment loss, straight through."""
    first = mimi.quantizer.rvq_first(emb, mimi.frame_rate)
    rest = mimi.quantizer.rvq_rest(emb, mimi.frame_rate)
    return first.x, first.x + rest.x, (first.penalty + rest.penalty) / 2


def start_codebooks(mimi: MimiModel, crops: Crops, batch: int) -> None:
    """k-means for every level. moshi starts one level a call, from that call's vectors alone."""
    with torch.no_grad():
        emb = torch.cat([latent(mimi, crops.batch(batch, -1 - i)[0]) for i in range(24)])
        for _ in range(mimi.total_codebooks):
            quantised(mimi, emb)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", type=Path, required=True, help="folder of the teacher's shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=8, help="how many shards to train on")
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=13, help="crop; the first frame has no past and no loss")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--free", type=float, default=0.3, help="share of the steps before the codebooks")
    parser.add_argument("--refine", type=Path, help="a trained codec: go on with its decoder alone, codes stay valid")
    parser.add_argument(
        "--codebooks", type=int, default=BUNDLED_CODEC.num_codebooks, help="with --refine: how many to hear"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)

    mimi = build_mimi(BUNDLED_CODEC)
    start_weights(mimi)
    mimi.quantizer.rvq_rest.q_dropout = True  # any number of codebooks shall decode
    phones = nn.Linear(BUNDLED_CODEC.dim, CELLS * len(PHONES))  # pulls codebook 0 towards phones; training only
    spectral = SpectralLoss(BUNDLED_CODEC.sample_rate)
    crops = Crops(shards(args.audio)[: args.shards], args.frames)
    mimi.train()
    weights = [*mimi.parameters(), *phones.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.8, 0.99), weight_decay=1e-4)
    step, codebooks_at = 0, int(args.free * args.steps)
    if args.refine:
        saved = torch.load(args.refine, weights_only=True)
        mimi.load_state_dict(saved["mimi"])
        phones.load_state_dict(saved["phones"])
        mimi.set_num_codebooks(args.codebooks)
        for part in (mimi.encoder, mimi.encoder_transformer, mimi.downsample, mimi.quantizer):
            part.requires_grad_(False).eval()
        codebooks_at = -1
    if args.out.exists():
        saved = torch.load(args.out, weights_only=True)
        mimi.load_state_dict(saved["mimi"])
        phones.load_state_dict(saved["phones"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]

    hours = sum(len(a) for a in crops.audio) / BUNDLED_CODEC.sample_rate / 3600
    print(
        f"{sum(p.numel() for p in mimi.parameters()) / 1e6:.2f} M parameters, {hours:.1f} h of audio, from step {step}",
        flush=True,
    )
    sums, began = torch.zeros(4), time.time()
    while step < args.steps:
        rate = args.lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step == codebooks_at:
            start_codebooks(mimi, crops, args.batch)
        wave, labels = crops.batch(args.batch, step)
        with torch.set_grad_enabled(args.refine is None):
            emb = latent(mimi, wave)
        commit = torch.zeros(())
        if step < codebooks_at:
            semantic, emb = unquantised(mimi, emb)
        else:
            semantic, emb, commit = quantised(mimi, emb)
        spoken = speak(mimi, emb)
        past = wave.shape[-1] // args.frames
        heard, target = spoken[:, 0, past:], wave[:, 0, past:]
        loss_spectral = spectral(heard, target)
        loss_wave = (heard - target).abs().mean()
        guess = phones(semantic.transpose(1, 2)).view(-1, len(PHONES))
        loss_phone = nn.functional.cross_entropy(guess, labels.view(-1))
        loss = loss_spectral + 8.0 * loss_wave + 0.1 * loss_phone + 0.5 * commit
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
        sums += torch.stack([loss_spectral, loss_wave, loss_phone, commit]).detach()
        if step % 50 == 0:
            spec, wav, phone, com = (sums / 50).tolist()
            print(
                f"step {step} spectral {spec:.3f} wave {wav:.4f} phone {phone:.3f} commit {com:.3f}",
                f"{50 / (time.time() - began):.2f} steps/s",
                flush=True,
            )
            sums, began = torch.zeros(4), time.time()
        if step % 200 == 0 or step == args.steps:
            state = {
                "mimi": mimi.state_dict(),
                "phones": phones.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
            }
            with written_whole(args.out) as handle:
                torch.save(state, handle)


if __name__ == "__main__":
    main()
