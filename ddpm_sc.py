"""DDAE++ with DDPM and UNets in pixel space, in one file: network, loss, training, data.

Paper     DDAE++ (arXiv 2505.10999v1): Sec. 4.1, Fig. 1(a); Tables 2, 7a, settings in Tables 8-11.
Idea      A diffusion model learns features that classify well. DDAE++ hands one back to the layers
          that decode: f, the best layer's output averaged over positions. Instead of e, the time
          embedding, all later layers read e + s(t) W f; s(t) is a learned vector. [SC] marks it.
Cost      460,288 parameters (1.3 % of ddpm, 0.8 % of ddpmpp), 1 to 2 % of a step.
Maths     x_t = alpha_t x_0 + sigma_t eps       Eq. (1); alpha_t^2 + sigma_t^2 = 1, t = 1..1000
          loss = || eps_theta(x_t, t) - eps ||^2
          sample = Euler on Eq. (2) = DDIM      100 network evaluations
Careful   Self-conditioning hands the network its own *features*. The method of that name in Analog
          Bits (Chen et al. 2022) hands it its previous estimate of x_0: something else.
Run       python ddpm_sc.py                                                  # glyphs: a first run
          torchrun --nproc_per_node=4 ddpm_sc.py --dataset cifar100          # the paper's setting
          torchrun ... ddpm_sc.py --dataset cifar100 --self_cond none        # its baseline
          torchrun ... ddpm_sc.py --dataset cifar100 --aug 0.12 --cl 0.01    # all of Sec. 4.2
          torchrun ... ddpm_sc.py --dataset cifar100 --backbone ddpmpp       # 56.5M parameters
          python ddpm_sc.py --sample runs/.../last.pt --n 80                 # a grid of images
Expect    Table 2, FID after 1400 to 2000, accuracy after 800 to 1200 epochs (baseline):
          CIFAR-10  ddpm 3.67, 90.94 % (3.60, 90.34 %); ddpmpp 2.75, 94.34 % (2.98, 94.02 %)
          CIFAR-100 ddpm 5.77, 63.55 % (5.97, 62.06 %); ddpmpp 4.01, 71.11 % (4.43, 69.35 %)
"""
import argparse, concurrent.futures, contextlib, copy, dataclasses, datetime, functools, gzip
import hashlib, inspect, json, math, os, re, signal, socket, sys, tarfile, time, zipfile, zlib
from pathlib import Path

# OpenMP threads that wait are to sleep soon: where cores are shared, spinning costs most speed.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm


# ---- 1. Settings: Tables 8 to 11 as data ---------------------------------------------------------

@dataclasses.dataclass
class Config:
    """Every field is a command-line flag and its comment the help text."""
    dataset: str = "glyphs"      # a name in RECIPES: glyphs, cifar100, folder, ...
    data_dir: str = "data"       # downloads go here; files and class folders found here are used
    size: int = 0                # pixels a side; 0: the data set's own, for folders 64
    out: str = ""                # run folder; default: runs/SCRIPT-DATASET-SELFCOND-...-sSEED
    init: str = ""               # start from these weights: official, or a checkpoint's ema
    seed: int = 0                # all that is random in a step is a function of (seed, step)
    # network
    backbone: str = "ddpm"       # a name in UNet.sizes (Table 9)
    dropout: float = 0.1         # as in the public implementations (Table 8)
    time_scale: float = 0.001    # c_noise = time_scale * t: 1 in U-ViT, 0.001 in DDAE
    self_cond: str = "adaptive"  # e + s(t) W f | add: no s | none | adaptive1: ours, s = 1 first
    layer: str = "out_6"         # its mean is f; later layers read it (Table 10)
    t_probe: float = 11          # best time for linear probing, and the teacher's (Table 10)
    # optimisation
    epochs: float = 2000         # passes over the training images (Table 11)
    steps: int = 0               # if > 0: optimizer steps, whatever epochs says
    batch: int = 512             # images per optimizer step, of all processes (Table 11)
    accum: int = 1               # forward passes for a process's share; each has its own negatives
    lr: float = 4e-4             # learning rate after warm-up, for any number of processes
    warmup: float = 13.0         # epochs of linear warm-up; constant afterwards (Table 11)
    lr_decay: float = 0.0        # share of the run, at its end, in which the rate falls to 0
    beta1: float = 0.9           # of AdamW
    beta2: float = 0.999         # of AdamW
    weight_decay: float = 0.0    # of AdamW, none on biases and positions (Appendix A)
    clip: float = 1.0            # largest norm of the gradient; 0: any
    ema: float = 0.9999          # decay rate of the averaged weights (Table 8)
    ema_ramp: bool = True        # average over fewer steps at first (see update_ema)
    flip: bool = True            # mirror half of the images (Table 11)
    # augmentation and contrast (Table 3)
    aug: float = 0.0             # probability of each transformation (EDM: 0.12)
    cl: float = 0.0              # weight gamma of the contrastive loss; 0.01 is best (Table 7d)
    cl_head: str = "time"        # projector is told the time | plain, as MoCo v3 (Table 7b)
    cl_target: str = "probe"     # teacher's time: t_probe | min, t = 1 (Table 7c)
    cl_hidden: int = 4096        # hidden units of projector and predictor
    # sampling
    nfe: int = 100               # network evaluations per image (Table 8)
    # machine
    device: str = "auto"         # auto | cuda | cpu | mps
    amp: str = "auto"            # auto: bf16, else fp16, on CUDA | off: float32 | bf16 | fp16
    compile: bool = False        # torch.compile the network
    save_every: int = 200        # epochs between ckpt_EPOCH.pt; 0: never
    sample_every: int = 50       # epochs between samples_EPOCH.png, 0: never


TINY_DDPM = dict(backbone="unet_tiny", dropout=0.0, batch=16, lr=2e-3, warmup=0.1, lr_decay=0.9,
                 layer="out_2", cl_hidden=512, time_scale=1.0)
RECIPES = {  # fields of Config by data set; under a backbone's name, what differs with that one
    "glyphs": dict(TINY_DDPM, nfe=50, epochs=2.4, flip=False, save_every=1, sample_every=4),
    "fashion_mnist": dict(TINY_DDPM, epochs=1, save_every=1, sample_every=1),
    "cifar10": dict(unet_tiny=TINY_DDPM, ddpmpp=dict(batch=256, layer="out_7")),
    "cifar100": dict(unet_tiny=TINY_DDPM, ddpmpp=dict(batch=256, layer="out_8")),
    # 64 x 64: Table 10 has EDM with ddpm, whose layer we take, and DDPM with U-ViT: its time.
    **dict.fromkeys(("tiny_imagenet", "imagenet100", "imagenet", "folder"),
                    dict(layer="out_5", t_probe=66, unet_tiny=TINY_DDPM,
                         ddpmpp=dict(batch=256))),
}


# ---- 2. The network: the UNets of DDAE (Table 9) with the public parameter names -----------------

class TimeEmbedding(nn.Module):
    """c_noise (B,) -> sinusoids (B, width), sines first -> linear, SiLU, linear -> (B, E). Labels
    `aug` (B, 9) are projected and added to the sinusoids: no bias, so that zeros change nothing."""

    def __init__(self, width, E, aug=False):
        super().__init__()
        self.frequencies = width // 2
        if aug:
            self.aug_emb = nn.Linear(9, width, bias=False)
        self.lin1 = nn.Linear(width, E)
        self.lin2 = nn.Linear(E, E)

    def forward(self, c_noise, aug=None):
        # Frequencies from 1 to 1 / 10000.
        powers = torch.arange(self.frequencies, device=c_noise.device) / (self.frequencies - 1)
        angles = c_noise.float()[:, None] * torch.exp(-math.log(10000) * powers)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        if aug is not None and hasattr(self, "aug_emb"):
            waves = waves + self.aug_emb(aug)
        return self.lin2(F.silu(self.lin1(waves)))


def group_norm(C):
    return nn.GroupNorm(min(32, C // 4), C)


class ResBlock(nn.Module):
    """norm, SiLU, conv, + conditioning e, norm, SiLU, dropout, conv; + the input. With `resize`
    between the first SiLU and convolution it is a BigGAN block."""

    def __init__(self, C_in, C_out, E, dropout, resize=nn.Identity()):
        super().__init__()
        self.norm1 = group_norm(C_in)
        self.resize = resize
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(E, C_out))   # acts on e; public name
        self.norm2 = group_norm(C_out)
        self.conv2 = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(C_out, C_out, 3, padding=1))
        self.shortcut = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        h = h + self.time_emb(e)[:, :, None, None]              # a shift of channels, no scale
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(self.resize(x)) + h


class SpatialAttention(nn.Module):
    """Attention between positions of a map, one head as wide as it has channels; + the input."""

    def __init__(self, C):
        super().__init__()
        self.norm = group_norm(C)
        self.projection = nn.Linear(C, 3 * C)
        self.output = nn.Linear(C, C)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.projection(self.norm(x).flatten(2).transpose(1, 2))[:, None]     # (B, 1, HW, 3C)
        h = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))[:, 0]
        return x + self.output(h).transpose(1, 2).view(B, C, H, W)


class UNetBlock(nn.Module):
    """A residual block, and attention where the map has the right size. Those on the way up are
    the layers out_1, out_2, ... of Table 10."""

    def __init__(self, C_in, C_out, E, dropout, attention):
        super().__init__()
        self.res = ResBlock(C_in, C_out, E, dropout)
        self.attn = SpatialAttention(C_out) if attention else nn.Identity()

    def forward(self, x, e):
        return self.attn(self.res(x, e))


class Resample(nn.Module):
    """Half or twice the resolution: by a convolution (ddpm) or a residual block (ddpmpp)."""

    def __init__(self, C, E, dropout, up, biggan):
        super().__init__()
        self.biggan = biggan
        if biggan:
            resize = nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2)
            self.op = ResBlock(C, C, E, dropout, resize)
        else:
            self.resize = nn.Upsample(scale_factor=2) if up else nn.Identity()
            self.conv = nn.Conv2d(C, C, 3, stride=1 if up else 2, padding=1)

    def forward(self, x, e):
        return self.op(x, e) if self.biggan else self.conv(self.resize(x))


class UNet(nn.Module):
    """Down through the levels, a middle, up again with skips; the decoder reads its own feature."""
    sizes = {  # base width, multiples of it by level, blocks per level, BigGAN, side of attention
        "unet_tiny": (32, (1, 1, 4), 1, False, 8),
        "ddpm": (128, (1, 2, 2, 2), 2, False, 16),
        "ddpmpp": (128, (2, 2, 2), 4, True, 16),
    }

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        base, multiples, depth, biggan, wanted = self.sizes[cfg.backbone]
        C, E = DATASETS[cfg.dataset][0], 4 * base
        sides = [cfg.size >> level for level in range(len(multiples))]
        attended = min(sides, key=lambda s: abs(s - wanted))        # other image sizes: the nearest
        self.image_proj = nn.Conv2d(C, base, 3, padding=1)
        self.time_emb = TimeEmbedding(base, E, cfg.aug > 0)
        self.down, self.up, self.middle = nn.ModuleList(), nn.ModuleList(), nn.Module()
        width, skips = base, [base]                             # channels now, and of the skips
        for level, multiple in enumerate(multiples):
            C_out, attention = base * multiple, sides[level] == attended
            if level:
                self.down.append(Resample(width, E, cfg.dropout, up=False, biggan=biggan))
                skips.append(width)
            for _ in range(depth):
                self.down.append(UNetBlock(width, C_out, E, cfg.dropout, attention))
                width = C_out
                skips.append(width)
        self.middle.res1 = ResBlock(width, width, E, cfg.dropout)
        self.middle.attn = SpatialAttention(width)
        self.middle.res2 = ResBlock(width, width, E, cfg.dropout)
        for level, multiple in reversed(list(enumerate(multiples))):
            C_out, attention = base * multiple, sides[level] == attended
            for _ in range(depth + 1):
                self.up.append(UNetBlock(width + skips.pop(), C_out, E, cfg.dropout, attention))
                width = C_out
            if level:
                self.up.append(Resample(width, E, cfg.dropout, up=True, biggan=biggan))
        self.blocks = [block for block in self.up if isinstance(block, UNetBlock)]  # out_1, ...
        self.norm = nn.GroupNorm(8, width)                      # 8, as in DDAE's code
        self.final = nn.Conv2d(width, C, 3, padding=1)
        self.f_name, self.f_layer = cfg.layer, int(cfg.layer.removeprefix("out_"))      # Table 10
        self.D = self.blocks[self.f_layer - 1].res.conv1.out_channels       # width of f
        self.E = E                                              # of e
        self.sc_proj = self.sc_time = None
        if cfg.self_cond != "none":                             # [SC]
            self.sc_proj = nn.Linear(self.D, E)                 # [SC] W, and a bias
        if cfg.self_cond.startswith("adaptive"):                # [SC] `add` has no s(t): Table 7a
            self.sc_time = TimeEmbedding(base, E)               # [SC] s(t)
        if cfg.self_cond == "adaptive1":                        # [SC] s(t) = 1 at first
            nn.init.zeros_(self.sc_time.lin2.weight)            # [SC]
            nn.init.ones_(self.sc_time.lin2.bias)               # [SC]
        self.to(memory_format=torch.channels_last)              # what convolutions like best

    def forward(self, x, c_noise, y=None, aug=None):
        """x (B, C, H, W), c_noise (B,) -> prediction like x, f (B, D) float32. aug (B, 9): labels
        of the augmentation, None for zeros. y: classes, which these networks are not told."""
        e = self.time_emb(c_noise, aug)                         # (B, E), the conditioning
        h = self.image_proj(x)
        skips, k = [h], 0
        for block in self.down:
            h = block(h, e)
            skips.append(h)
        h = self.middle.res2(self.middle.attn(self.middle.res1(h, e)), e)
        for block in self.up:
            if isinstance(block, Resample):
                h = block(h, e)
                continue
            h = block(torch.cat([h, skips.pop()], dim=1), e)    # (B, C_k, H_k, W_k)
            k += 1
            if k == self.f_layer:
                f = h.float().mean(dim=(2, 3))                  # [SC] (B, D), Sec. 4.1
                if self.sc_proj:                                # [SC] later blocks read it in e:
                    s = self.sc_time(c_noise) if self.sc_time else 1        # [SC] (B, E)
                    e = e + s * self.sc_proj(f)                 # [SC] e + s(t) W f
        return self.final(F.silu(self.norm(h))), f

    def pooled(self, k, h):
        return {f"out_{k}": h.float().mean(dim=(2, 3))}         # (B, C_k)

    def positions(self, h):
        return h.flatten(2).transpose(1, 2)                     # (B, H_k W_k, C_k)


# ---- 3. The formulation: DDPM (Sec. 3.1, Table 8) ------------------------------------------------

class DDPM:
    """t is a whole number 1..T, 0 is the data; x_0 is in [-1, 1], to which `sample` clips."""
    T = 1000
    probe_times = (1, 11, 21, 41, 66, 101)
    t_range = (1, T)
    uncertainty = None                              # EDM alone learns a weight for each noise level

    def __init__(self, cfg):
        beta = torch.linspace(1e-4, 0.02, self.T, dtype=torch.float64)              # Table 8
        # Ho et al.'s alpha_bar, for t = 0..T; the paper's alpha_t is its square root.
        alpha_bar = torch.cat([torch.ones(1), (1 - beta).cumprod(0)])
        self.alpha = alpha_bar.sqrt().float()
        self.sigma = (1 - alpha_bar).sqrt().float()
        self.time_scale, self.nfe = cfg.time_scale, cfg.nfe

    def draw_t(self, n, generator):
        """Training times (n,) int64: uniform on 1..T."""
        return torch.randint(1, self.T + 1, (n,), generator=generator, device=generator.device)

    def add_noise(self, x_0, t, eps):
        """x_t = alpha_t x_0 + sigma_t eps, Eq. (1). x_0 and eps (B, C, H, W), t (B,)."""
        alpha = self.alpha.to(t.device, non_blocking=t.is_cuda)[t.long()].view(-1, 1, 1, 1)
        sigma = self.sigma.to(t.device, non_blocking=t.is_cuda)[t.long()].view(-1, 1, 1, 1)
        return alpha * x_0 + sigma * eps

    def inputs(self, x_t, t):
        """What the network is given: x_t, and c_noise = time_scale * t."""
        return x_t, t * self.time_scale

    def loss(self, prediction, x_0, eps, t):
        """|| eps_theta(x_t, t) - eps ||^2 (Sec. 3.1), the mean over pixels: (B,) float32."""
        return (prediction.float() - eps).square().mean(dim=(1, 2, 3))

    def times(self):
        """The sampler's times; nfe = 5: 801, 601, 401, 201, 1, 0. Pure noise passes for x_801."""
        return [1 + (i * self.T) // self.nfe for i in range(self.nfe)][::-1] + [0]

    @torch.no_grad()
    def sample(self, net, noise):
        """DDIM (eta = 0): Euler's method on Eq. (2) for x / alpha, with sigma / alpha as the time.
        net returns (prediction, f). noise (B, C, H, W) ~ N(0, I) -> images in [-1, 1], network
        evaluations per image."""
        x, times = noise, self.times()
        for t, s in zip(times, times[1:]):                          # from t to the next time s < t
            at = torch.full((len(x),), t, device=x.device)
            eps = net(*self.inputs(x, at))[0].float()
            x_0 = ((x - self.sigma[t] * eps) / self.alpha[t]).clamp(-1, 1)  # Eq. (1), in range
            eps = (x - self.alpha[t] * x_0) / self.sigma[t]         # the noise it implies
            x = self.alpha[s] * x_0 + self.sigma[s] * eps           # Eq. (1) at s; s = 0 gives x_0
        return x, self.nfe


Network, build_net, Diffusion = UNet, UNet, DDPM


# ---- 4. Non-leaky augmentation (Sec. 4.2; Karras et al. 2020, 2022) ------------------------------

SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
        0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
        -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148)


def draw_view(cfg, generator):
    """How each image of a global batch is seen: (batch, 9) on the CPU, 0 leaves it as it is. Column
    flip is the data's own mirroring (Table 11), of which the network is not told. All others have
    probability cfg.aug, yflip half of it; flip, xflip and aniso_angle have 1/2. Without cfg.flip
    nothing is mirrored."""
    n, p = cfg.batch, cfg.aug
    uniform = functools.partial(torch.rand, n, generator=generator)
    normal = functools.partial(torch.randn, n, generator=generator)

    def gated(values, p):
        return values * (uniform() < p)                             # else 0

    flip = uniform() < 0.5 * cfg.flip
    if not p:
        return F.pad(flip.float()[:, None], (0, 8))
    xflip = gated(uniform() < 0.5, 1.0 * cfg.flip)
    yflip = gated(uniform() < 0.5, p * cfg.flip)
    scale = gated(normal(), p)
    rotate = gated((uniform() * 2 - 1) * math.pi, p)
    aniso = gated(normal(), p)
    aniso_angle = gated((uniform() * 2 - 1) * math.pi, 0.5)         # 0: along x
    move_x = gated(normal(), p)
    move_y = normal() * (move_x != 0)                               # one gate for both
    view = [flip, xflip, yflip, scale, rotate, aniso, aniso_angle, move_x, move_y]
    return torch.stack(view, dim=1).float()


@functools.lru_cache
def resampling(S, device):
    """Two matrices that filter with SYM6, the low-pass filter of the wavelet: up (6S - 4, S)
    continues S pixels by reflection to 3S - 2 and doubles them, down (S, 2S + 12) halves a canvas.
    Down after up, cut to the canvas, is the identity."""
    reflect = torch.eye(S)[np.pad(np.arange(S), S - 1, mode="reflect")]     # (3S - 2, S)
    taps = torch.tensor(SYM6).view(1, 1, 12)
    up = F.conv_transpose1d(torch.eye(3 * S - 2)[:, None], taps, stride=2, padding=5)[:, 0].T
    down = F.conv1d(torch.eye(2 * S + 12)[:, None], taps, stride=2, padding=5)[:, 0, 3:-3].T
    return (up @ reflect).to(device), down.contiguous().to(device)


def rotation(a):
    """Angles (B,) -> matrices (B, 2, 2)."""
    return torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], dim=1).view(-1, 2, 2)


def transform(x, scale, rotate, aniso, aniso_angle, move_x, move_y):
    """Images x (B, C, S, S), in one resampling: enlarged by 2^(0.2 scale), rotated, stretched by
    2^(0.2 aniso) along aniso_angle and shrunk as much across, moved by move * S / 8 pixels."""
    S = x.shape[-1]
    stretch = torch.diag_embed(2 ** (0.2 * torch.stack([-aniso, aniso], dim=1)))
    # The output at z = (x, y), in pixels from the middle, shows the input at M z + v: so M undoes
    # what was asked for, and stretch shrinks.
    M = rotation(rotate) @ rotation(-aniso_angle) @ stretch @ rotation(aniso_angle)
    M = M * 2 ** (-0.2 * scale).view(-1, 1, 1)
    v = M @ torch.stack([move_x, move_y], dim=1)[:, :, None] * (-S / 8)
    # SYM6's weight is at its sixth tap of twelve: `up` moves images back by half a (small) pixel.
    up, down = resampling(S, x.device)
    canvas, source = down.shape[1], up.shape[0]                     # pixels a side
    half = torch.full((2, 1), 0.5)
    offset = (M @ half + 2 * v - half) * (2 / source)               # grid_sample: -1 to 1
    theta = torch.cat([M * (canvas / source), offset], dim=2).to(x.device, non_blocking=x.is_cuda)
    grid = F.affine_grid(theta, (len(x), 1, canvas, canvas), align_corners=False)
    return down @ F.grid_sample(up @ x @ up.T, grid, align_corners=False) @ down.T


def make_view(images, view):
    """uint8 images (B, C, S, S) seen as `view` (B, 9) says: x_0 float32 in [-1, 1] (the filter
    overshoots), and aug (B, 9): other nine columns, the view without flip, its angles as cos and
    sin. By them the network tells transformations from traits of the data. view is on the CPU, so
    that no GPU is waited for."""
    flip, xflip, yflip, scale, rotate, aniso, aniso_angle, move_x, move_y = view.unbind(dim=1)
    aug = torch.stack([xflip, yflip, scale, rotate.cos() - 1, rotate.sin(),
                       aniso * aniso_angle.cos(), aniso * aniso_angle.sin(), move_x, move_y], dim=1)
    x_0 = to_float(images)
    cuda = x_0.is_cuda              # MPS would read a copy before it is there: PyTorch 189690
    for mirrored, axis in (flip, -1), (xflip, -1), (yflip, -2):
        mirrored = mirrored.to(x_0.device, non_blocking=cuda).view(-1, 1, 1, 1) > 0
        x_0 = torch.where(mirrored, x_0.flip(axis), x_0)
    rows = (aug[:, 2:] != 0).any(dim=1).nonzero()[:, 0]             # more than mirrored
    if len(rows):
        there = rows.to(x_0.device, non_blocking=cuda)
        x_0[there] = transform(x_0[there], *view[rows, 3:].unbind(dim=1))
    return x_0, aug.to(x_0.device, non_blocking=cuda)


# ---- 5. Contrastive self-distillation (Sec. 4.2): MoCo v3 with the averaged network --------------

class BatchNorm(nn.Module):
    """(B, D) -> (B, D) float32, over the batches of all processes, so that N compute what one does.
    In eval mode too, as in MoCo v3's teacher: no running averages."""

    def __init__(self, D, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D)) if affine else 1.0
        self.bias = nn.Parameter(torch.zeros(D)) if affine else 0.0

    def mean(self, x):
        x = x.mean(dim=0)                                           # all_reduce has a gradient
        return torch.distributed.nn.functional.all_reduce(x) / WORLD if WORLD > 1 else x

    def forward(self, x):
        x = x.float()
        x = x - self.mean(x)
        return x * (self.mean(x.square()) + 1e-5).rsqrt() * self.weight + self.bias


def mlp(*widths):
    """Linear, BatchNorm, ReLU, ..., Linear, BatchNorm without weights: the heads of MoCo v3."""
    layers = []
    for C_in, C_out in zip(widths, widths[1:]):
        layers += [nn.Linear(C_in, C_out, bias=False), BatchNorm(C_out), nn.ReLU()]
    return nn.Sequential(*layers[:-2], BatchNorm(widths[-1], affine=False))


class Projector(nn.Module):
    """MoCo v3's projector, told the time (Table 7b): f (B, D), e (B, E) -> (B, 256). e is time_emb
    alone, and gets no gradient. f is scaled by 1 + r(e), r = 0 at first: a shift would be constant
    over the keys, which all have one time, and BatchNorm would remove it."""

    def __init__(self, D, hidden, E):
        super().__init__()
        self.mlp = mlp(D, hidden, hidden, 256)
        self.time = nn.Linear(E, D) if E else None                  # None: cl_head plain
        if E:
            nn.init.zeros_(self.time.weight)
            nn.init.zeros_(self.time.bias)

    def forward(self, f, e):
        if self.time:
            f = f * (1 + self.time(e.detach()))
        return self.mlp(f)


class Student(nn.Module):
    """All that is trained: the network and the heads, in one forward, as DistributedDataParallel
    wants it. A copy with averaged weights is the teacher and the result. net has cfg, f_name, the
    widths D of f and E of e = time_emb(c_noise), and what `features` needs."""

    def __init__(self, net, cfg):
        super().__init__()
        self.net = net
        self.heads = nn.ModuleDict()
        if cfg.cl:
            E = net.E if cfg.cl_head == "time" else None
            self.heads["projector"] = Projector(net.D, cfg.cl_hidden, E)
            self.heads["predictor"] = mlp(256, cfg.cl_hidden, 256)
        if cfg.aug and Diffusion.uncertainty:
            self.heads["uncertainty"] = Diffusion.uncertainty()

    def forward(self, x_in, c_noise, y, aug):
        """-> prediction, query q (B, 256) or None, uncertainty u (B,) or None."""
        prediction, f = self.net(x_in, c_noise, y, aug)
        q = u = None
        if "projector" in self.heads:
            q = self.heads["predictor"](self.heads["projector"](f, self.net.time_emb(c_noise)))
        if "uncertainty" in self.heads:
            u = self.heads["uncertainty"](c_noise)
        return prediction, q, u

    @torch.no_grad()
    def keys(self, x_0, aug, eps):
        """Called on the teacher: features of the other view, at the time where they classify best
        (Tables 7c, 10), projected; of all processes (B * WORLD, 256). Not told the classes."""
        cfg, name = self.net.cfg, self.net.f_name
        t = cfg.t_probe if cfg.cl_target == "probe" else Diffusion.t_range[0]
        f = features(self.net, x_0, t, eps, last=name, aug=aug)[name]
        at = torch.full((len(x_0),), t, device=x_0.device)
        c_noise = Diffusion(cfg).inputs(x_0, at)[1]
        k = self.heads["projector"](f, self.net.time_emb(c_noise))
        parts = [k.clone() for _ in range(WORLD)]
        if WORLD > 1:
            dist.all_gather(parts, k)
        return torch.cat(parts)


def info_nce(q, k, T=0.2):
    """MoCo v3's loss in one of its two directions: each query q (B, D) is to find its image's key
    among k (B * WORLD, D). T and the factor 2 T, which undoes 1 / T, are MoCo v3's for ViTs."""
    logits = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T / T
    own = torch.arange(len(q), device=q.device) + len(q) * RANK
    return 2 * T * F.cross_entropy(logits, own)


# ---- 6. Training, samples, features --------------------------------------------------------------

def draw_random(cfg, diffusion, step, shape, device):
    """Times, noise and views of a step, for the global batch of images of `shape` (C, H, W). The
    third number for rng is the use: 0 times and noise, 1 order, 2 dropout, 3 and 4 views."""
    gen = rng(cfg.seed, step, 0, device=device)
    shape = (cfg.batch, *shape)
    drawn = dict(t=diffusion.draw_t(cfg.batch, gen),
                 eps=torch.randn(shape, generator=gen, device=device),
                 view=draw_view(cfg, rng(cfg.seed, step, 3)))
    if cfg.cl:
        drawn["other_view"] = draw_view(cfg, rng(cfg.seed, step, 4))
        drawn["other_eps"] = torch.randn(shape, generator=gen, device=device)
    return drawn


def training_step(cfg, diffusion, model, teacher, images, y, t, eps, view,
                  other_view=None, other_eps=None):
    """Images (B, ...) with classes y (B,) -> the objective to be minimised, and for the log (2,):
    diffusion loss and contrastive loss."""
    x_0, aug = make_view(images, view)                              # float32, augmented
    x_t = diffusion.add_noise(x_0, t, eps)                          # Eq. (1)
    with autocast(cfg, images.device):                              # network and heads
        prediction, q, u = model(*diffusion.inputs(x_t, t), y, aug)
    loss = diffusion.loss(prediction, x_0, eps, t)                  # (B,), Sec. 3.1
    objective = loss.mean() if u is None else (loss / u.exp() + u).mean()
    contrast = torch.zeros_like(objective)
    if cfg.cl:                                                      # Sec. 4.2
        other_x_0, other_aug = make_view(images, other_view)
        with autocast(cfg, images.device):
            k = teacher.keys(other_x_0, other_aug, other_eps)
        contrast = info_nce(q, k)
        objective = objective + cfg.cl * contrast
    return objective, torch.stack([loss.mean(), contrast]).detach()


def due(every, epoch, before, last):
    """Whether a multiple of `every` epochs was just passed, or the run ends. 0: never."""
    return every and (last or epoch // every > before // every)


def make_parts(cfg, device):
    """Student, teacher (its average over the steps), optimizer and scaler at the start of a run."""
    torch.manual_seed(cfg.seed)
    student = Student(build_net(cfg), cfg).to(device).train()
    if cfg.init and not Path(cfg.out, "last.pt").exists():
        load_weights(student.net, cfg.init, start=True)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    fp16 = autocast(cfg, device).fast_dtype == torch.float16        # gradients would underflow
    scaler = torch.amp.GradScaler(device.type, enabled=fp16)
    return student, teacher, make_optimizer(student, cfg), scaler


def train(cfg):
    """Returns 0, or the signal that ended it: the same command resumes there. All processes draw
    the random numbers of the *global* batch from (seed, step) and use their own rows: so a resumed
    run equals an unbroken one, two processes with 4 images each one with 8 (but for dropout)."""
    device, diffusion, out = start(cfg), Diffusion(cfg), Path(cfg.out)
    per_pass, rest = divmod(cfg.batch, WORLD * cfg.accum)           # images of a process at a time
    if rest:
        raise UserError(f"--batch {cfg.batch} does not divide by {WORLD} processes x --accum "
                        f"{cfg.accum}; use {cfg.batch - rest + WORLD * cfg.accum}")
    with one_process_first():
        images, labels = load_data(cfg, train=True)
    data_id, N = fingerprint(images, labels), len(images)
    if images.nbytes < 4e9:         # ImageNet-100: 1.6e9 of pixels; 4.2e9 of latents stay
        images = images.to(device)
    total = cfg.steps or math.ceil(cfg.epochs * N / cfg.batch)
    student, teacher, optimizer, scaler = make_parts(cfg, device)
    parts = dict(model=student.net, heads=student.heads, ema=teacher.net, ema_heads=teacher.heads,
                 optimizer=optimizer, scaler=scaler)
    step = resume(cfg, data_id, parts)
    if cfg.compile:
        student.net.compile()
    model = nn.parallel.DistributedDataParallel(student) if WORLD > 1 else student
    if RANK == 0:
        count = sum(p.numel() for p in student.net.parameters())
        print(f"{cfg.out}: {N} x {tuple(images.shape[1:])}, {count:,} parameters, {WORLD} x "
              f"{device}\n{'resumed at' if step else 'from'} step {step} to {total}", flush=True)
    own = slice(RANK * cfg.accum * per_pass, (RANK + 1) * cfg.accum * per_pass)     # of a batch
    batches = read_batches(images, labels, cfg, step, own, device)
    sums, logged = torch.zeros(2, device=device), step              # of losses since a log line
    stop, saved, clock = 0, time.time(), time.time()
    bar = tqdm(total=total, initial=step, disable=RANK > 0,
               mininterval=0.1 if sys.stderr.isatty() else 20)      # seconds between its lines
    with open_log(out, step) as log, bar, signals() as caught:
        while step < total and not stop:
            batch, y = next(batches)
            drawn = draw_random(cfg, diffusion, step, batch.shape[-3:], device)
            for i in range(cfg.accum):                              # one forward per backward
                part = slice(i * per_pass, (i + 1) * per_pass)      # of this process's images
                some = {name: values[own][part] for name, values in drawn.items()}
                # Seeds dropout, by step and first image: all else is drawn already.
                torch.manual_seed(rng(cfg.seed, step, 2, own.start + part.start).initial_seed())
                model.require_backward_grad_sync = i + 1 == cfg.accum   # DDP: at the last pass
                objective, numbers = training_step(cfg, diffusion, model, teacher,
                                                   batch[part], y[part], **some)
                scaler.scale(objective / cfg.accum).backward()
                sums += numbers / cfg.accum
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip or math.inf)
            warm_up = (step + 1) * cfg.batch / (cfg.warmup * N + 1e-9)
            fall = (total - step) / (cfg.lr_decay * total + 1e-9)   # to 0 at the end, if asked for
            lr = cfg.lr * min(1, warm_up, fall)
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            update_ema(teacher, student, cfg.ema, step + 1, cfg.ema_ramp)
            step += 1
            bar.update()
            epoch, last = step * cfg.batch // N, step == total
            save_due = due(cfg.save_every, epoch, (step - 1) * cfg.batch // N, last)
            sample_due = due(cfg.sample_every, epoch, (step - 1) * cfg.batch // N, last)
            log_due = step <= 50 or step % 10 == 0                  # all processes agree on this
            if log_due or save_due or last or (WORLD == 1 and caught):
                stop = torch.tensor(max(caught, default=0), device=device)
                if WORLD > 1:
                    dist.all_reduce(sums)
                    dist.all_reduce(stop, dist.ReduceOp.MAX)        # one's signal stops all
                stop = stop.item()                                  # here the CPU waits for the GPU
                loss, contrast = (sums / (step - logged) / WORLD).tolist()
                speed = (step - logged) * cfg.batch / (time.time() - clock)
                broken = not norm.isfinite() and not scaler.is_enabled()    # a scaler skips it
                if broken or not math.isfinite(loss):
                    raise UserError(f"the loss or a gradient is not finite at step {step}; {out} "
                                    "is left as last saved; try a lower --lr or --amp off")
                line = dict(step=step, epoch=step * cfg.batch / N, loss=loss, contrast=contrast,
                            lr=lr, grad_norm=norm.item(), images_per_second=speed)
                print(json.dumps(line), file=log, flush=True)
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.0f} images/s", refresh=False)
                sums.zero_()
                logged, clock = step, time.time()
            if save_due:
                save(cfg, data_id, f"ckpt_{epoch:04d}.pt", step, dict(ema=teacher.net))
            if save_due or last or stop or (log_due and time.time() - saved > 600):
                save(cfg, data_id, "last.pt", step, parts)
                saved = time.time()
            if sample_due and (last or not stop):
                grid = sample(teacher.net, cfg, range(80))          # by all processes together
                save_grid(grid, out / f"samples_{epoch:04d}.png")
    return stop if step < total else 0


def draw_images(net, cfg, seeds):
    """Images uint8 (n, C, S, S) on the network's device, and network evaluations for each."""
    shape = (DATASETS[cfg.dataset][0], cfg.size, cfg.size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    noise = torch.stack(noise).to(next(net.parameters()).device)
    with autocast(cfg, noise.device):
        x, nfe = Diffusion(cfg).sample(net, noise)
    return to_uint8(x), nfe


def sample(net, cfg, seeds, progress=False):
    """Images uint8 (n, C, S, S) on the CPU, on all processes, which share the work. Image i is a
    function of seeds[i] alone: the net always sees the same number of rows, as other sizes have
    other kernels, which round differently. Sets net.nfe, the mean number of network evaluations per
    image."""
    device = next(net.parameters()).device
    shape = (len(seeds), DATASETS[cfg.dataset][0], cfg.size, cfg.size)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    evaluations = torch.zeros(len(seeds), device=device)
    mine = list(range(RANK, len(seeds), WORLD))
    group = 64 if device.type == "cuda" else 16                     # seeds at a time
    quiet = None if progress and RANK == 0 else True                # None: on terminals
    for i in tqdm(range(0, len(mine), group), desc=f"sampling {group} at a time", disable=quiet):
        rows = (mine[i:i + group] * group)[:group]                  # the last repeats its images
        images[rows], evaluations[rows] = draw_images(net, cfg, [seeds[row] for row in rows])
    if WORLD > 1:
        dist.all_reduce(images)                                     # the others' rows are zero
        dist.all_reduce(evaluations)
    net.nfe = evaluations.mean().item()
    return images.cpu()


@torch.no_grad()
def features(net, x_0, t, eps, last=None, aug=None, pool=None):
    """Pooled features {layer: (B, D) float32} of images x_0 (B, C, H, W) noised by eps to time t, a
    number; up to the layer `last`, where the network is left. Hooks on net.blocks read them, by
    pool(k, h) or else net.pooled. The network is not told classes; in train mode it drops out."""
    found, diffusion = {}, Diffusion(net.cfg)

    def hook(k, block, inputs, h):
        found.update((pool or net.pooled)(k, h))
        if last in found:
            raise StopIteration                                     # the rest need not run

    at = torch.full((len(x_0),), t, device=x_0.device)
    with contextlib.ExitStack() as hooks, contextlib.suppress(StopIteration):
        for k, block in enumerate(net.blocks, 1):
            hooks.enter_context(block.register_forward_hook(functools.partial(hook, k)))
        net(*diffusion.inputs(diffusion.add_noise(x_0, at, eps), at), aug=aug)
    return found


# ---- 7. Data: uint8 images (N, C, H, W) and int64 labels (N,), in memory or mapped ---------------

DATASETS = {  # channels, side in pixels, classes (0: as many as there are folders)
    "glyphs": (3, 16, 10), "fashion_mnist": (1, 32, 10), "cifar10": (3, 32, 10),
    "cifar100": (3, 32, 100), "tiny_imagenet": (3, 64, 200), "imagenet100": (3, 64, 100),
    "imagenet": (3, 64, 1000), "folder": (3, 64, 0),
}

# The lines of the ten digits on a seven-segment display: "1070" goes from (1, 0) to (7, 0), y down.
DIGITS = ["1070 7078 7818 1810", "7078", "1070 7074 7414 1418 1878", "1070 7078 7818 1474",
          "1014 1474 7078", "7010 1014 1474 7478 7818", "7010 1018 1878 7874 7414", "1070 7078",
          "1070 7078 7818 1810 1474", "7414 1410 1070 7078 7818"]


def draw_glyphs(n, seed):
    """n digits in random pose and colour, lighter or darker than the ground: uint8 (n, 3, 16, 16),
    labels (n,) = 0..9 in turn. The same bytes everywhere: RandomState's streams are frozen, and
    + - * / sqrt are exact; no sin, no font."""
    random, labels = np.random.RandomState(seed), np.arange(n) % 10

    def uniform(low, high, size=1):
        return (low + (high - low) * random.random_sample((n, size))).astype(np.float32)

    grid = np.arange(-7.5, 8, dtype=np.float32)
    x0, y0 = np.tile(grid, 16), np.repeat(grid, 16)                 # pixel centres (256,)
    x, y = x0 - uniform(-0.3, 0.3), y0 - uniform(-0.3, 0.3)         # to the digit's axes (n, 256):
    u = uniform(-0.14, 0.14)                                        # shift, turn by 2 atan(u),
    cos, sin, norm = 1 - u * u, 2 * u, 1 + u * u
    x, y = (cos * x + sin * y) / norm, (cos * y - sin * x) / norm
    x = (x + uniform(-0.05, 0.05) * y) / uniform(1.1, 1.35) + 4     # shear and scale
    y = y / uniform(1.1, 1.35) + 4
    distance = np.full((n, 256), 99, np.float32)                    # to the nearest line
    for digit, lines in enumerate(DIGITS):
        for line in lines.split():
            x1, y1, x2, y2 = map(int, line)
            px, py = x[digit::10] - x1, y[digit::10] - y1
            dx, dy = x2 - x1, y2 - y1
            along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
            off = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2)
            distance[digit::10] = np.minimum(distance[digit::10], off)
    ink = np.clip(uniform(1.2, 1.6) - distance, 0, 1)               # one pixel of blur
    front = np.where(uniform(0, 1) < 0.5, uniform(0, 0.25), uniform(0.75, 1))
    front = front + uniform(-0.04, 0.04, 3)                         # a tint (n, 3)
    back = uniform(0.4, 0.6) + uniform(-0.04, 0.04, 3)
    slope = uniform(-0.005, 0.005) * x0 + uniform(-0.005, 0.005) * y0
    back = back[:, :, None] + slope[:, None]                        # a gradient (n, 3, 256)
    image = np.clip(back + (front[:, :, None] - back) * ink[:, None], 0, 1) * np.float32(255)
    image = np.clip(image + random.randint(-2, 3, (n, 3, 256)) + 0.5, 0, 255)
    return image.astype(np.uint8).reshape(n, 3, 16, 16), labels


KRIZ = "https://www.cs.toronto.edu/~kriz/"
MIRROR = "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"
FASHION = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
DOWNLOADS = {  # file: how its SHA-256 begins, then the folders that serve it, in order of trial
    "cifar-10-binary.tar.gz": ("c4a38c50a1bc5f3a", KRIZ, MIRROR),
    "cifar-100-binary.tar.gz": ("58a81ae192c23a4b", KRIZ),
    "train-images-idx3-ubyte.gz": ("3aede38d61863908", FASHION),
    "train-labels-idx1-ubyte.gz": ("a04f17134ac03560", FASHION),
    "t10k-images-idx3-ubyte.gz": ("346e55b948d973a9", FASHION),
    "t10k-labels-idx1-ubyte.gz": ("67da17c76eaffca5", FASHION),
    "tiny-imagenet-200.zip": ("6198c8ae015e2b3e", "https://cs231n.stanford.edu/"),
}


def fetch(name, folder):
    """Path of a file of DOWNLOADS: the one in `folder`, or else a download with that SHA-256."""
    (sha256, *mirrors), path, faults = DOWNLOADS[name], Path(folder, name), []
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(30)                                    # download_url_to_file has none
    for mirror in mirrors:
        try:
            torch.hub.download_url_to_file(mirror + name, path, sha256, sys.stderr.isatty())
            return path
        except (OSError, RuntimeError) as error:
            faults.append(f"{mirror + name}: {error}")
    raise UserError(f"cannot download {name} ({'; '.join(faults)}); put it in --data_dir {folder}")


def read_cifar(cfg, train):
    """The binary archives, read in place: a label (or: coarse, fine), then 3 x 32 x 32 pixels."""
    archive, folder, head = "cifar-100-binary.tar.gz", "cifar-100-binary", 2
    names = ["train.bin" if train else "test.bin"]
    if cfg.dataset == "cifar10":
        archive, folder, head = "cifar-10-binary.tar.gz", "cifar-10-batches-bin", 1
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    with tarfile.open(fetch(archive, cfg.data_dir)) as tar:
        # A bytearray can be written to, as PyTorch wants it.
        data = bytearray().join(tar.extractfile(f"{folder}/{name}").read() for name in names)
    records = np.frombuffer(data, np.uint8).reshape(-1, head + 3072)
    return records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1]


def read_fashion_mnist(cfg, train):
    """IDX files, 4 bytes, the sizes, the data: in data_dir, of Debian's package, or downloaded."""
    arrays = []
    for kind, shape in ("images-idx3", (-1, 28, 28)), ("labels-idx1", (-1,)):
        name = f"{'train' if train else 't10k'}-{kind}-ubyte.gz"
        path = Path("/usr/share/datasets/fashion-mnist", name)
        if not path.exists() or Path(cfg.data_dir, name).exists():
            path = fetch(name, cfg.data_dir)
        data = gzip.decompress(path.read_bytes())
        arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape))
    images = np.pad(arrays[0], ((0, 0), (2, 2), (2, 2)))[:, None]               # 28 in 32 pixels
    if cfg.size == 16:
        images = (images.reshape(-1, 1, 16, 2, 16, 2).sum(axis=(3, 5)) + 2) // 4
    return images.astype(np.uint8), arrays[1]


def read_tiny_imagenet(cfg, train):
    """The published zip, read in place; a text file has the classes of the test (val) images."""
    top = "tiny-imagenet-200/"
    with zipfile.ZipFile(fetch("tiny-imagenet-200.zip", cfg.data_dir)) as archive:
        names = [n for n in sorted(archive.namelist()) if re.match(f"{top}train/.*JPEG$", n)]
        folders = [name.split("/")[2] for name in names]
        classes = sorted(set(folders))
        if not train:
            lines = archive.read(f"{top}val/val_annotations.txt").decode().splitlines()
            names = [f"{top}val/images/{line.split()[0]}" for line in lines]
            folders = [line.split()[1] for line in lines]
        labels = [classes.index(folder) for folder in folders]
        stamps = [archive.getinfo(name).CRC for name in names]
        return decode_once(cfg, train, names, labels, stamps, archive.open)


TRAIN, TEST = ("train", "training"), ("val", "valid", "validation", "test", "testing")
KINDS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def visible(folder):
    """What is in a folder, by name, but for hidden files and folders and what a Mac adds."""
    entries = os.scandir(folder) if os.path.isdir(folder) else []
    kept = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
    return sorted(kept, key=lambda entry: entry.name)


def subfolders(folder):
    return [entry.name for entry in visible(folder) if entry.is_dir()]


def walk(folder, seen):
    """Paths of all files in a folder, at any depth. Links are followed, a folder is read once."""
    if os.path.realpath(folder) not in seen:
        seen.add(os.path.realpath(folder))
        for entry in visible(folder):
            if entry.is_dir():
                yield from walk(entry.path, seen)
            elif entry.is_file():
                yield entry.path


def list_folders(cfg, train):
    """Pictures of train/CLASS/** or val/CLASS/**, in data_dir/DATASET or data_dir: paths, labels,
    and what changes with a file. --dataset folder may have CLASS/** there, without any split."""
    here, root = f"--data_dir {cfg.data_dir}", Path(cfg.data_dir, cfg.dataset)
    root = root if root.is_dir() else Path(cfg.data_dir)
    found = {name.lower(): root / name for name in subfolders(root)}
    homes = [found[name] for name in TRAIN if name in found]
    tests = [found[name] for name in TEST if name in found]
    there = ", ".join(path.name for path in homes + tests) or "no split"
    if cfg.dataset == "folder" and there == "no split":
        homes = [root]
    if not homes or not (train or tests):
        raise UserError(f"{here}: {root} has {there}; --dataset {cfg.dataset} reads train/CLASS "
                        "and val/CLASS, or CLASS alone where nothing is named like a split")
    split, classes = (homes if train else tests)[0], subfolders(homes[0])
    files, labels, seen = [], [], {os.path.realpath(split)}
    others = sum(entry.name.lower().endswith(KINDS) for entry in visible(split))
    for name in subfolders(split):
        paths = list(walk(split / name, seen))
        pictures = [path for path in paths if path.lower().endswith(KINDS)]
        if name not in classes or (train and not pictures):
            fault = "has no pictures" if name in classes else f"is no class of {homes[0]}"
            raise UserError(f"{here}: {split / name} {fault}; remove it, or mend that")
        files += pictures
        labels += [classes.index(name)] * len(pictures)
        others += len(paths) - len(pictures)
    wanted = DATASETS[cfg.dataset][2] or len(classes)
    if len(classes) != wanted or not files:
        raise UserError(f"{here}: {homes[0]} has {len(classes)} class folders and {split} has "
                        f"{len(files)} pictures in such folders; --dataset {cfg.dataset} needs "
                        f"{wanted or 'some'}")
    if RANK == 0:
        names = ", ".join(classes if len(classes) < 3 else [classes[0], "...", classes[-1]])
        note = f"; {others} other files are left out" if others else ""
        print(f"{split}: {len(classes)} classes ({names}), {len(files)} images{note}", flush=True)
    return files, labels, [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]


def read_image(file):
    """A picture, path or open file, as RGB: the first frame, upright, transparency on white, 16-bit
    grey scaled to 8. Formats that start another program, as PostScript does, are not read."""
    formats = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
    with Image.open(file, formats=formats) as image:
        deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF")
        if image.mode in ("I", "F") and not deep:
            raise ValueError(f"32-bit numbers, mode {image.mode}, whose range is unknown")
        image = ImageOps.exif_transpose(image)
        if deep:
            grey = np.asarray(image, np.float32) / 257
            image = Image.fromarray(grey.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def centre_crop(image, size):
    """RGB pixels (3, size, size), as by ADM (Dhariwal & Nichol 2021): halved by box filters while
    twice too large, resized by a bicubic one to the shorter side; the middle is kept."""
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.BICUBIC)
    left, top = [(side - size) // 2 for side in image.size]
    return np.asarray(image)[top:top + size, left:left + size].transpose(2, 0, 1)


def decode_once(cfg, train, names, labels, stamps, open_file=Path):
    """Images (N, 3, S, S), mapped from a file in data_dir, and labels (N,). The first run decodes
    and writes it, record by record. Its name has a hash of what it was made from."""
    split, S, N, bad = "train" if train else "test", cfg.size, len(names), []
    record = np.dtype([("image", np.uint8, (3, S, S)), ("label", np.uint16)])
    key = hashlib.sha256(repr((record, labels, stamps)).encode()).hexdigest()[:12]
    path = Path(cfg.data_dir, f"{cfg.dataset}{S}-{split}-{key}.u8")

    def decode(name, label):
        try:
            image = centre_crop(read_image(open_file(name)), S)
            return np.array((image, label), record).tobytes()
        except Exception as error:                                  # Pillow fails in many ways
            bad.append(f"{name} ({error})")
            return b""

    if not path.exists():
        with new_file(path) as file, concurrent.futures.ThreadPoolExecutor() as pool:
            for i in tqdm(range(0, N, 256), desc=f"decoding {cfg.dataset}", disable=None):
                file.writelines(pool.map(decode, names[i:i + 256], labels[i:i + 256]))
            if bad:
                text = f"{len(bad)} of {N} pictures cannot be decoded, the first is {min(bad)}"
                if 100 * len(bad) > N:
                    raise UserError(f"--data_dir {cfg.data_dir}: {text}; remove or mend them")
                print(f"note: {text}; they are left out", file=sys.stderr)
    data = np.memmap(path, record, "c")                             # changes stay in memory
    return data["image"], data["label"]


def load_data(cfg, train):
    """The training or test images uint8 (N, C, S, S) and labels int64 (N,), CPU tensors."""
    readers = dict(fashion_mnist=read_fashion_mnist, cifar10=read_cifar, cifar100=read_cifar,
                   tiny_imagenet=read_tiny_imagenet)
    try:
        if cfg.dataset == "glyphs":
            images, labels = draw_glyphs(20000, seed=0) if train else draw_glyphs(4000, seed=1)
        elif cfg.dataset in readers:
            images, labels = readers[cfg.dataset](cfg, train)
        else:
            images, labels = decode_once(cfg, train, *list_folders(cfg, train))
    except UserError:
        raise
    except Exception as error:                                      # damage shows in many ways
        raise UserError(f"--data_dir {cfg.data_dir}: {cfg.dataset} cannot be read "
                        f"({' '.join(str(error).split())}); delete what is damaged")
    if images.shape[2] != cfg.size:
        raise UserError(f"--size {cfg.size}: {cfg.dataset} has {images.shape[2]} pixels a side")
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def fingerprint(images, labels):
    """What tells one data set from another: counts, a CRC of the labels and of some images."""
    some = images[::max(1, len(images) // 64)].numpy()
    crc = zlib.crc32(np.ascontiguousarray(some), zlib.crc32(labels.numpy()))
    return f"{len(images)} images of {len(labels.unique())} classes, CRC {crc:08x}"


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """And back: rounded to the nearest, clipped."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def read_batches(images, labels, cfg, step, own, device):
    """From a step on, images and labels of this process's rows of each batch, on the device."""
    cuda = device.type == "cuda"
    while True:
        rows = batch_indices(len(images), cfg.batch, cfg.seed, step)[own]
        batch = images[rows.to(images.device, non_blocking=cuda)]
        if cuda and not batch.is_cuda:
            batch = batch.pin_memory()                              # else the CPU waits for a copy
        yield batch.to(device, non_blocking=cuda), labels[rows].to(device, non_blocking=cuda)
        step += 1


# ---- 8. Plumbing: randomness, processes, precision, averaging, files -----------------------------

# As torchrun sets them: a process started in another way takes itself for the only one.
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
SCRIPT = Path(__file__).stem


class UserError(ValueError):
    """What the user can mend. The command line prints it as one line and ends with status 2."""


def rng(*key, device="cpu"):
    """A generator whose stream is a function of the integers `key`; in training the third is the
    use. Hashed to 32 bits, all that CPU generators keep of a seed: sums of keys would collide."""
    seed = int(hashlib.sha256(str(key).encode()).hexdigest()[:8], 16)
    return torch.Generator(device).manual_seed(seed)


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=rng(seed, epoch, 1))


def batch_indices(n, batch, seed, step):
    """Which of n images form the global batch of a step, int64 (batch,). Shuffled epochs, end to
    end, are cut into batches: each image comes once an epoch, and a step is all one needs."""
    place = torch.arange(step * batch, (step + 1) * batch)
    epochs = (place // n).unique().tolist()
    return torch.cat([epoch_order(n, seed, e)[place[place // n == e] % n] for e in epochs])


def start(cfg):
    """The device of this process, which joins the others if torchrun has started several."""
    best = (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")).type
    kind = best if cfg.device == "auto" else cfg.device
    if kind != "cpu" and (kind != best or LOCAL_RANK >= torch.accelerator.device_count()):
        raise UserError(f"--device {kind}: there is none for process {LOCAL_RANK} on this machine; "
                        "use --device cpu, or as many processes as there are")
    if WORLD > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE={WORLD} without MASTER_ADDR: use torchrun, or unset it")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, LOCAL_RANK)
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" and dist.is_nccl_available() else "gloo")
    return device


@contextlib.contextmanager
def signals():
    """A list of signals that came: Ctrl-C and a scheduler's SIGTERM wait until a step is done."""
    caught, kinds = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: caught.append(number)) for kind in kinds]
    try:
        yield caught
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)


@contextlib.contextmanager
def one_process_first():
    """The first process of each machine runs the block, as it may decode all of ImageNet; then the
    others do. NCCL would give up after ten minutes, so gloo it is."""
    if WORLD > 1:
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=6))
        if LOCAL_RANK > 0:
            dist.barrier(group)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # leaves no half a file
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if WORLD > 1 and LOCAL_RANK == 0:
            dist.barrier(group)


def autocast(cfg, device):
    """Matrix products in the precision of --amp; auto: on CUDA bf16, or fp16 (scaled) where the GPU
    has no bf16, else float32. Weights stay float32."""
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(cfg.amp, torch.float32)
    if cfg.amp == "auto" and device.type == "cuda":
        good = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if good else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_optimizer(net, cfg):
    """AdamW, without decay for biases and positions but with it for [CLS] (Appendix A)."""
    decayed, free = [], []
    for name, p in net.named_parameters():
        group = free if name.endswith(("bias", "pos_embed")) else decayed
        group.append(p)
    groups = [dict(params=decayed), dict(params=free, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2),
                             weight_decay=cfg.weight_decay, fused=True)


@torch.no_grad()
def update_ema(ema, net, decay, n, ramp=True):
    """Averages the weights, not buffers, after the n-th step, n = 1, 2, ..., in place. With
    `ramp` the decay is at most 1 - n^(-2/3), as by ema_pytorch in the authors' DDAE code: the first
    call copies, short runs forget their random start; 0.9999 comes after a million steps only."""
    if ramp:
        decay = min(decay, 1 - n ** (-2 / 3))
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


@contextlib.contextmanager
def new_file(path):
    """A file that gets its name when it is complete: a crash leaves the old one or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{RANK}-{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(cfg, data_id, name, step, parts):
    """Plain types and tensors, read with weights_only. One process writes, none waits."""
    if RANK == 0:
        state = {part: value.state_dict() for part, value in parts.items()}
        state.update(script=SCRIPT, config=dataclasses.asdict(cfg), data=data_id, step=step)
        with new_file(Path(cfg.out, name)) as file:
            torch.save(state, file)


def read_checkpoint(path):
    """The contents of a checkpoint, on the CPU. Code in it is refused, not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run folder has last.pt and ckpt_EPOCH.pt")
    except Exception as error:                                      # torch.load fails in many ways
        text = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} is damaged or no checkpoint ({text})")


# What may change in mid-run.
FREE = "data_dir vae out epochs steps accum device compile save_every sample_every".split()


def resume(cfg, data_id, parts):
    """The step at which a run goes on: that of last.pt, from which parts are loaded, or 0."""
    path = Path(cfg.out, "last.pt")
    if not path.exists():
        return 0
    state = read_checkpoint(path)
    there = dict(state["config"], script=state["script"], data=state["data"])
    here = dict(dataclasses.asdict(cfg), script=SCRIPT, data=data_id)
    other = [f"{name}: {there.get(name)} there, {value} now" for name, value in here.items()
             if name not in FREE and there.get(name) != value]
    if other:
        raise UserError(f"--out {cfg.out} holds another run ({'; '.join(other)}); choose another "
                        f"folder; --init {path} starts one anew from its averaged weights")
    for name, part in parts.items():
        if state[name]:                                             # {}: a scaler without fp16
            part.load_state_dict(state[name])
    return state["step"]


def open_log(out, step):
    """log.jsonl, to append to; lines of steps that are done again are dropped."""
    path = out / "log.jsonl" if RANK == 0 else Path(os.devnull)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept))
    return open(path, "a")


def save_grid(images, path, columns=10):
    """Images uint8 (n, C, S, S) as one PNG on white, small ones enlarged."""
    zoom = max(1, 64 // images.shape[2])
    images = F.interpolate(images.expand(-1, 3, -1, -1), scale_factor=zoom)
    images = F.pad(images, (1, 1, 1, 1, 0, 0, 0, -len(images) % columns), value=255)
    rows = images.unflatten(0, (-1, columns))                       # (rows, columns, 3, S, S)
    grid = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    if RANK == 0:
        Image.fromarray(grid.contiguous().numpy()).save(path)


# ---- 9. Settings, weights, command line ----------------------------------------------------------

FIELDS = [f.name for f in dataclasses.fields(Config)]


def make_config(dataset="glyphs", **overrides):
    """The recipe of a data set, with changes. UserError says what is wrong and what would do."""
    for name in overrides:
        if name not in FIELDS:
            raise UserError(f"unknown field {name}; there are {', '.join(FIELDS)}")
    check("dataset", dataset, RECIPES)
    recipe = {**RECIPES[dataset], **overrides}
    backbone = recipe.get("backbone", Config.backbone)
    check("backbone", backbone, Network.sizes)
    recipe.update(recipe.get(backbone, {}))                         # what differs with it
    if recipe.get("uncond"):
        recipe.update(recipe.get("unconditional", {}))
    recipe.update(overrides)
    cfg = Config(dataset, **{name: recipe[name] for name in FIELDS if name in recipe})
    cfg.size = cfg.size or DATASETS[dataset][1]
    common = dict(cl_head=("time", "plain"), cl_target=("probe", "min"),
                  device=("auto", "cuda", "cpu", "mps"), amp=("auto", "off", "bf16", "fp16"))
    for name, values in {**common, **choices(cfg)}.items():
        check(name, getattr(cfg, name), values)
    named = Path(cfg.data_dir).resolve().name if dataset == "folder" else dataset
    other = [k for k in FIELDS if k in overrides and k not in (*FREE, "self_cond", "seed")]
    words = [SCRIPT, named, cfg.self_cond, *(f"{name}_{overrides[name]}" for name in other)]
    name = re.sub(r"[^\w.-]+", "-", "-".join(words))               # --init is a path
    cfg.out = cfg.out or f"runs/{name}-s{cfg.seed}"
    return cfg


def check(name, value, values):
    if value not in values:
        words = [str(v) for v in values]
        more = ", ..." if len(words) > 20 else ""
        raise UserError(f"--{name} {value}: must be one of {', '.join(words[:20])}{more}")


def unet_layers(cfg):
    """The names of the features, in order of computation."""
    _, multiples, depth, _, _ = UNet.sizes[cfg.backbone]
    return [f"out_{k}" for k in range(1, len(multiples) * (depth + 1) + 1)]


def unet_choices(cfg):
    """The values that some fields may take, given the others."""
    multiple = 2 ** (len(UNet.sizes[cfg.backbone][1]) - 1)
    end = None if cfg.self_cond == "none" else -1                   # the last could condition none
    return dict(size=range(multiple, 1025, multiple), layer=unet_layers(cfg)[:end],
                self_cond=("adaptive", "adaptive1", "add", "none"))


def unet_from_official(net, state, start):
    """Ours, or the averaged weights of the public DDAE code: {MODEL, EMA, opt}."""
    prefix = "ema_model.nn_model."
    if "EMA" in state:
        state = {k: v for k, v in state["EMA"].items() if k.startswith(prefix)}
    return {k.removeprefix(prefix).removeprefix("nn_model."): v for k, v in state.items()}


layers, choices, from_official = unet_layers, unet_choices, unet_from_official


def load_weights(net, path, weights="ema", start=False):
    """Fills net from a checkpoint, or from a state_dict with the official names. All must be there
    and fit, but for what self-conditioning adds to a network that was trained without it: that
    begins with W and its bias 0, and is named. start: buffers, which describe the data, stay."""
    state, own = read_checkpoint(path), net.state_dict()
    try:
        state = from_official(net, state.get(weights, state), start)
        added = [k for k in own if k.startswith(("sc_", "cls_token"))]
        added = [] if any(k in state for k in added) else added
        for name in added:                                          # [SC]
            idle = name.startswith(("sc_proj", "cls_token"))
            state[name] = torch.zeros_like(own[name]) if idle else own[name]
        kept = {k: v for k, v in net.named_buffers() if start and k in own}
        net.load_state_dict({**state, **kept})
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not fit this network: {' '.join(str(error).split())[:300]}")
    if added and RANK == 0:
        print(f"{path} has no {', '.join(added)}: new, with little or no effect at first")


def load_checkpoint(path, weights="ema", **changes):
    """(cfg, net in eval mode) of a checkpoint of this script; weights: 'ema', or 'model', the raw
    ones in last.pt. changes: fields to be set otherwise."""
    state = read_checkpoint(path)
    if not isinstance(state, dict) or state.get("script") != SCRIPT or weights not in state:
        raise UserError(f"{path} is no checkpoint of {SCRIPT} with {weights} weights")
    cfg = make_config(**{**state["config"], **changes})
    net = build_net(cfg)
    load_weights(net, path, weights)
    return cfg, net.eval()


def parse_command_line(argv):
    """Every field of Config is a flag, its comment the help. -> (the fields given, all options)."""
    helps = dict(re.findall(r"^    (\w+): \w+ = .*?# (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for f in dataclasses.fields(Config):
        kind = dict(type=f.type, metavar=f.type.__name__)
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS,
                            help=helps[f.name].replace("%", "%%"), **kind)
    parser.add_argument("--sample", metavar="CKPT", help="draw images, of the seeds from --seed on")
    parser.add_argument("--n", "--images", type=int, default=80, help="how many (80)")
    args = parser.parse_args(argv)
    return {name: value for name, value in vars(args).items() if name in FIELDS}, args


def sample_command(given, args):
    """--sample CKPT: a PNG beside the checkpoint."""
    cfg, net = load_checkpoint(args.sample, **{"seed": 0, **given})
    images = sample(net.to(start(cfg)), cfg, range(cfg.seed, cfg.seed + args.n), progress=True)
    words = [f"{name}_{value}" for name, value in given.items() if name not in (*FREE, "seed")]
    words.append(f"seeds{cfg.seed}-{cfg.seed + args.n - 1}.png")
    path = f"{Path(args.sample).with_suffix('')}_{'_'.join(words)}"
    save_grid(images, path)
    if RANK == 0:
        print(f"{path}: {args.n} images from the ema weights, {net.nfe:g} network evaluations each")


def fail(error):
    """Ends the run for something that the user can mend: one line, status 2."""
    time.sleep(5 if LOCAL_RANK > 0 else 0)                          # the first process says it
    tqdm.write(f"{SCRIPT}: {' '.join(str(error).split())}", file=sys.stderr)
    leave(2)


def leave(status):
    """Ends the process. One of several goes at once: gloo's threads outlive its group, and to take
    leave of the others would be to wait for those who wait for this one."""
    sys.stdout.flush()
    os._exit(status) if WORLD > 1 else sys.exit(status)


def main(argv=None):
    given, args = parse_command_line(argv)
    try:
        if args.sample:
            return sample_command(given, args)
        cfg = make_config(**given)
        number = train(cfg)
    except UserError as error:
        fail(error)
    if RANK == 0 and number:
        print(f"saved {cfg.out}/last.pt; the same command goes on from there")
    elif RANK == 0:
        tiny = " --detector tiny" if cfg.dataset in ("glyphs", "fashion_mnist") else ""
        print(f"done: {cfg.out} is complete; next\n  python probe.py {cfg.out}/last.pt\n"
              f"  python fid.py {cfg.out}/last.pt{tiny}")
    return 128 + number if number else 0


if __name__ == "__main__":
    leave(main() or 0)
