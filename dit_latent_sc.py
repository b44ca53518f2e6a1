"""DDAE++ with DiT in the latent space of VA-VAE, in one file: network, loss, training, latents.

Paper     DDAE++ (arXiv 2505.10999v1): Sec. 4.1, Fig. 1(b); Tables 5, 6, settings in Tables 8-11.
Idea      A diffusion model learns features that classify well. DDAE++ hands one back to the layers
          that decode: f, the best block's output averaged over tokens. Instead of e, which tells
          t and y, all later layers read e + s(t) W f; s(t) is a learned vector. [SC] marks it.
Cost      1,378,560 parameters (1.1 % of dit_b), about 2 % of a step.
Maths     x_t = (1 - t) x_0 + t eps             Eq. (1), alpha = 1 - t, sigma = t; t in [0, 1]
          loss = || v - (eps - x_0) ||^2 + 1 - cos(v, eps - x_0), v = v_theta(x_t, t, y)
          sample = Euler's method on dx/dt = v  250 steps; with classes y also guided
Careful   Self-conditioning hands the network its own *features*. The method of that name in Analog
          Bits (Chen et al. 2022) hands it its previous estimate of x_0: something else.
Run       python dit_latent_sc.py                                        # glyphs: a first run
          python dit_latent_sc.py --encode --dataset imagenet100         # once: its latents
          torchrun --nproc_per_node=8 dit_latent_sc.py --dataset imagenet100          # with classes
          torchrun ... dit_latent_sc.py --dataset imagenet100 --uncond                # without
          torchrun ... dit_latent_sc.py --dataset imagenet100 --self_cond none        # baseline
          python dit_latent_sc.py --sample runs/.../last.pt --guidance 1.5            # images
Expect    Table 6 (ImageNet, 90 epochs, baseline in brackets): unconditional FID 28.85, accuracy
          64.42 % (29.69, 63.25 %); conditional, not guided, 15.30, 62.46 % (16.01, 62.03 %).
"""
import argparse, concurrent.futures, contextlib, copy, dataclasses, datetime, functools, hashlib
import http.client, inspect, json, math, os, re, shutil, signal, sys, time, urllib.request
import warnings, zlib
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
    dataset: str = "glyphs"      # a name in RECIPES: glyphs, imagenet, folder, ...
    data_dir: str = "data"       # downloads go here; files and class folders found here are used
    size: int = 0                # pixels a side; 0: the data set's own, 256 for folders
    tokenizer: str = "vavae"     # makes latents | unshuffle: without parameters, for trials
    cell: int = 16               # side in pixels of one position of the latents (Table 9)
    vae: str = ""                # weights of VA-VAE; default: in data_dir, or downloaded to it
    out: str = ""                # run folder; default: runs/SCRIPT-DATASET-SELFCOND-...-sSEED
    init: str = ""               # start from these weights: official, or a checkpoint's ema
    seed: int = 0                # all that is random in a step is a function of (seed, step)
    # network
    backbone: str = "dit_b"      # a name in DiT.sizes (Table 9)
    dropout: float = 0.0         # as in LightningDiT; Table 8 names none for latents
    uncond: bool = False         # do not tell the network the classes (Tables 5 and 6)
    class_drop: float = 0.1      # probability with which a class is hidden, for guidance
    self_cond: str = "adaptive"  # e + s(t) W f | add: no s | none | adaptive1: ours, s = 1 first
    layer: str = "block_8"       # its mean is f; later layers read it (Table 10)
    t_probe: float = 0.25        # best time for linear probing, and the teacher's (Table 10)
    # optimisation
    epochs: float = 1000         # passes over the training images (Appendix A, Table 11)
    steps: int = 0               # if > 0: optimizer steps, whatever epochs says
    batch: int = 1024            # images per optimizer step, of all processes (Table 11)
    accum: int = 1               # forward passes for a process's share; each has its own negatives
    lr: float = 2e-4             # learning rate after warm-up, for any number of processes
    warmup: float = 0.0          # epochs of linear warm-up; constant afterwards (Table 11)
    lr_decay: float = 0.0        # share of the run, at its end, in which the rate falls to 0
    beta1: float = 0.9           # of AdamW
    beta2: float = 0.95          # of AdamW
    weight_decay: float = 0.0    # of AdamW, none on biases and positions (Appendix A)
    clip: float = 0.0            # largest norm of the gradient; 0: any
    ema: float = 0.9999          # decay rate of the averaged weights (Table 8)
    ema_ramp: bool = True        # average over fewer steps at first (see update_ema)
    flip: bool = True            # mirror half of the images (Table 11)
    # augmentation and contrast: the paper has neither on latents
    aug: float = 0.0             # probability of a shifted crop of the latents
    cl: float = 0.0              # weight gamma of the contrastive loss; for pixels 0.01 (Table 7d)
    cl_head: str = "time"        # projector is told the time | plain, as MoCo v3 (Table 7b)
    cl_target: str = "probe"     # teacher's time: t_probe | min, t = 0 (Table 7c)
    cl_hidden: int = 4096        # hidden units of projector and predictor
    # sampling
    nfe: int = 250               # network evaluations per image (Table 8)
    shift: float = 3.3           # of the sampler's times towards the noise (Table 8); 1: even
    guidance: float = 1.5        # scale of classifier-free guidance (Table 8); 1: none
    guide_until: float = 0.89    # guidance for times in [0, guide_until] alone (Table 8)
    # machine
    device: str = "auto"         # auto | cuda | cpu | mps
    amp: str = "auto"            # auto: bf16, else fp16, on CUDA | off: float32 | bf16 | fp16
    compile: bool = False        # torch.compile the network
    save_every: int = 200        # epochs between ckpt_EPOCH.pt; 0: never
    sample_every: int = 50       # epochs between samples_EPOCH.png, 0: never


TINY_DIT = dict(backbone="dit_tiny", tokenizer="unshuffle", cell=4, batch=32, lr=1.5e-3, warmup=0.3,
                lr_decay=0.8, beta2=0.999, layer="block_4", cl_hidden=512, nfe=50, clip=1.0)
RECIPES = {  # fields of Config by data set, and those that differ with a backbone or --uncond
    "glyphs": dict(TINY_DIT, epochs=5, flip=False, guidance=1.0, save_every=1, sample_every=4),
    "imagenet100": dict(size=256, ema_ramp=False, unconditional=dict(epochs=1400)),
    "imagenet": dict(size=256, ema_ramp=False, epochs=90, save_every=10, sample_every=10,
                     layer="block_10", unconditional=dict(layer="block_9")),
    "folder": dict(size=256, dit_tiny=dict(TINY_DIT, size=64)),
}


# ---- 2. The network: Lightning-DiT (Yao et al. 2025, Table 9) with the official parameter names --

class TimestepEmbedder(nn.Module):
    """Times t (B,) in [0, 1] -> 256 sinusoids, cosines first -> linear, SiLU, linear -> (B, D)."""

    def __init__(self, D):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t):
        powers = torch.arange(128, device=t.device) / 128
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * powers)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def rotate(x, turn):
    """RoPE: each pair of neighbouring channels of x (B, heads, N, d), as a complex number, turns by
    the angle of its position: turn (N, d/2) = exp(i angle)."""
    x = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(x * turn).flatten(-2)


class DiTAttention(nn.Module):
    def __init__(self, D, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x, turn):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, turn).to(v.dtype), rotate(k, turn).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v)             # all (B, heads, N, D / heads)
        return self.dropout(self.proj(x.transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    def __init__(self, D, hidden, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.w12 = nn.Linear(D, 2 * hidden)
        self.w3 = nn.Linear(hidden, D)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.dropout(self.w3(F.silu(a) * b))


class DiTBlock(nn.Module):
    """A pre-norm Transformer block; the conditioning e shifts, scales and gates its two halves."""

    def __init__(self, D, heads, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.attn = DiTAttention(D, heads, dropout)
        self.mlp = SwiGLU(D, int(2 / 3 * 4 * D), dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, e, turn):
        modulation = self.adaLN_modulation(e)[:, None]          # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, turn)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, D, C):
        super().__init__()
        self.norm_final = nn.RMSNorm(D, eps=1e-6)
        self.linear = nn.Linear(D, C)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, e):
        shift, scale = self.adaLN_modulation(e)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


def position_embedding(S, D):
    """Fixed, of S x S positions, (1, S * S, D): half of the channels for columns, half for rows."""
    angles = torch.arange(S)[:, None] * 10000 ** -(torch.arange(D // 4).double() / (D // 4))
    place = torch.cat([angles.sin(), angles.cos()], dim=1).float()                  # (S, D/2)
    return torch.cat([place.repeat(S, 1), place.repeat_interleave(S, dim=0)], dim=1)[None]


def rope_angles(S, d):
    """Angles (S * S, d/2) of RoPE: the first half for rows, the second for columns."""
    angles = torch.arange(S)[:, None] * 10000 ** -(torch.arange(d // 4) * 4 / d)    # (S, d/4)
    return torch.cat([angles.repeat_interleave(S, dim=0), angles.repeat(S, 1)], dim=1)


class DiT(nn.Module):
    """A token for each position of the latents; later blocks read the network's own feature."""
    sizes = {"dit_tiny": (6, 160, 4), "dit_b": (12, 768, 12), "dit_l": (24, 1024, 16),
             "dit_xl": (28, 1152, 16)}                          # blocks, width, heads

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        (depth, D, heads), (C, S, _) = self.sizes[cfg.backbone], latent_shape(cfg)
        self.shape, self.D, self.E = (C, S, S), D, D            # of latents; widths of f and e
        self.null = None if cfg.uncond else count_classes(cfg)  # K; class K is "not told"
        self.pos_embed = nn.Parameter(position_embedding(S, D), requires_grad=False)
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(C, D, 1)))
        self.t_embedder = TimestepEmbedder(D)
        if self.null:
            self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(self.null + 1, D)))
        angles = rope_angles(S, D // heads).repeat_interleave(2, dim=1) # official: each twice
        self.feat_rope = nn.Module()
        self.feat_rope.register_buffer("freqs_cos", angles.cos())
        self.feat_rope.register_buffer("freqs_sin", angles.sin())
        self.blocks = nn.ModuleList(DiTBlock(D, heads, cfg.dropout) for _ in range(depth))
        self.final_layer = FinalLayer(D, C)
        if cfg.aug:
            self.aug_emb = nn.Linear(2, D, bias=False)
        self.f_name, self.f_layer = cfg.layer, int(cfg.layer.removeprefix("block_"))    # Table 10
        self.sc_proj = self.sc_time = None
        if cfg.self_cond != "none":                             # [SC]
            self.sc_proj = nn.Linear(D, D)                      # [SC] W, and a bias
        if cfg.self_cond.startswith("adaptive"):                # [SC] `add` has no s(t): Table 7a
            self.sc_time = TimestepEmbedder(D)                  # [SC] s(t)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))       # convolutions as matrices
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and ("embedder" in name or name.startswith("sc_time")):
                nn.init.normal_(weight, std=0.02)
        for module in (*self.blocks, self.final_layer):         # at first no block does anything,
            nn.init.zeros_(module.adaLN_modulation[1].weight)   # and the output is 0
        nn.init.zeros_(self.final_layer.linear.weight)
        if cfg.self_cond == "adaptive1":                        # [SC] s(t) = 1 at first
            nn.init.zeros_(self.sc_time.mlp[2].weight)          # [SC]
            nn.init.ones_(self.sc_time.mlp[2].bias)             # [SC]
        mean, std = latent_statistics(cfg)                      # which latents were normalised by
        self.register_buffer("latent_mean", mean.view(-1, 1, 1))
        self.register_buffer("latent_std", std.view(-1, 1, 1))

    def time_emb(self, c_noise):
        return self.t_embedder(c_noise)                         # (B, D)

    def forward(self, x, c_noise, y=None, aug=None):
        """x (B, C, S, S), c_noise (B,) -> prediction like x, f (B, D) float32. y: classes (B,),
        None or self.null for not told. aug (B, 3): 1 to hide the class, and the crop's shifts."""
        e = self.time_emb(c_noise)                              # (B, D), the conditioning
        if self.null:
            if y is None:
                y = torch.full(c_noise.shape, self.null, device=x.device)
            elif aug is not None:
                y = torch.where(aug[:, 0] > 0, self.null, y)
            e = e + self.y_embedder.embedding_table(y)
        if aug is not None and hasattr(self, "aug_emb"):
            e = e + self.aug_emb(aug[:, 1:])
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed     # (B, N, D)
        turn = torch.complex(self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)[:, ::2]
        for k, block in enumerate(self.blocks, 1):
            h = block(h, e, turn)
            if k == self.f_layer:
                f = h.float().mean(dim=1)                       # [SC] (B, D), Sec. 4.1
                if self.sc_proj:                                # [SC] later blocks read it in e:
                    s = self.sc_time(c_noise) if self.sc_time else 1        # [SC] (B, D)
                    e = e + s * self.sc_proj(f)                 # [SC] e + s(t) W f
        return self.final_layer(h, e).transpose(1, 2).reshape(x.shape), f

    def pooled(self, k, h):
        return {f"block_{k}": h.float().mean(dim=1)}            # (B, D)

    def positions(self, h):
        return h                                                # (B, N, D)


# ---- 3. The formulation: rectified flow on latents (Table 8) -------------------------------------

class LatentRF:
    """t in [0, 1], 0 is the data (in LightningDiT's code it is 1)."""
    probe_times = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
    t_range = (0, 1)
    uncertainty = None                              # EDM alone learns a weight for each noise level

    def __init__(self, cfg):
        self.nfe, self.shift = cfg.nfe, cfg.shift
        self.guidance, self.guide_until = cfg.guidance, cfg.guide_until

    def draw_t(self, n, generator):
        """Training times (n,) float32: the sigmoid of N(0, 1), logit-normal (Table 8: lognorm)."""
        return torch.randn(n, generator=generator, device=generator.device).sigmoid()

    def add_noise(self, x_0, t, eps):
        """x_t = (1 - t) x_0 + t eps, Eq. (1). x_0 and eps (B, C, H, W), t (B,)."""
        return (1 - t).view(-1, 1, 1, 1) * x_0 + t.view(-1, 1, 1, 1) * eps

    def inputs(self, x_t, t):
        """What the network is given: x_t, and c_noise = t."""
        return x_t, t

    def loss(self, prediction, x_0, eps, t):
        """|| v - target ||^2, target = eps - x_0, the mean over channels and positions, + the mean
        over positions of 1 - cos(v, target), LightningDiT's: (B,) float32. At first v is 0: with
        PyTorch's default, 1e-8 instead of 0.1, gradients there are so large that fp16 overflows."""
        v, target = prediction.float(), eps - x_0
        away = 1 - F.cosine_similarity(v, target, dim=1, eps=0.1)                   # (B, H, W)
        return (v - target).square().mean(dim=(1, 2, 3)) + away.mean(dim=(1, 2))

    def times(self):
        """The sampler's times from 1 to 0: even s, mapped to shift s / (1 + (shift - 1) s), which
        for shift > 1 puts more of them near the noise (Esser et al. 2024)."""
        s = torch.linspace(1, 0, self.nfe + 1, dtype=torch.float64)
        return (self.shift * s / (1 + (self.shift - 1) * s)).tolist()

    @torch.no_grad()
    def sample(self, net, noise, y=None):
        """Euler's method from t = 1 to 0: noise (B, C, H, W) ~ N(0, I) -> latents, and evaluations
        of the network per image, where one with guidance counts once, as in Table 8. net returns
        (prediction, f). With classes y (B,) guided: v = v_null + guidance (v_y - v_null) for
        t <= guide_until, in all channels (DiT's code guides three: Appendix A)."""
        x, times = noise, self.times()
        for t, s in zip(times, times[1:]):                          # from t to the next time s < t
            at = torch.full((len(x),), t, device=x.device)
            if y is None or self.guidance == 1 or t > self.guide_until:
                v = net(*self.inputs(x, at), y)[0].float()
            else:
                both = torch.cat([y, torch.full_like(y, net.null)])
                x_in, c_noise = self.inputs(x.repeat(2, 1, 1, 1), at.repeat(2))
                v_y, v_null = net(x_in, c_noise, both)[0].float().chunk(2)
                v = v_null + self.guidance * (v_y - v_null)
            x = x + (s - t) * v
        return x, self.nfe


Network, build_net, Diffusion = DiT, DiT, LatentRF


# ---- 4. Views: the mirrored latent, and a shifted crop of it -------------------------------------

def draw_latent_view(cfg, generator):
    """How each latent of a global batch is seen: (batch, 4) on the CPU. Columns: flip; hide, 1
    where the class is not told; the shift of a crop, up to an eighth, 0 without --aug."""
    n, far = cfg.batch, max(1, cfg.size // cfg.cell // 8)
    flip = torch.rand(n, generator=generator) < 0.5 * cfg.flip
    hide = torch.rand(n, generator=generator) < cfg.class_drop
    shift = torch.randint(-far, far + 1, (n, 2), generator=generator)
    shift = shift * (torch.rand(n, 1, generator=generator) < cfg.aug)
    return torch.cat([flip[:, None], hide[:, None], shift], dim=1).float()


def make_latent_view(latents, view):
    """Latents (B, 2, C, S, S) seen as `view` (B, 4) says: x_0 float32 (B, C, S, S), and aug (B, 3):
    hide, and the shift. A latent cannot be mirrored, as an image can: that of the mirrored image is
    read instead. A crop goes on beyond the border by reflection."""
    cropped = bool(view[:, 2:4].any())                              # view is on the CPU
    view = view.to(latents.device, non_blocking=latents.is_cuda)
    rows, S = torch.arange(len(latents), device=latents.device), latents.shape[-1]
    x_0 = latents[rows, view[:, 0].long()].float()
    if cropped:
        place = torch.arange(S, device=x_0.device) - view[:, 2:4, None].long()      # (B, 2, S)
        place = (S - 1) - ((S - 1) - place.abs()).abs()
        y, x = place[:, 0, :, None], place[:, 1, None]
        x_0 = x_0[rows[:, None, None], :, y, x].permute(0, 3, 1, 2)
    return x_0, view[:, 1:4]


draw_view, make_view = draw_latent_view, make_latent_view


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


def draw_from_latents(net, cfg, seeds):
    """Images uint8 (n, C, S, S) on the network's device, network evaluations for each. The class of
    each is its seed modulo the number of classes."""
    noise = [torch.randn(net.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    noise = torch.stack(noise).to(net.latent_mean.device)
    y = torch.tensor([s % net.null for s in seeds], device=noise.device) if net.null else None
    with autocast(cfg, noise.device):
        x, nfe = Diffusion(cfg).sample(net, noise, y)
    return to_images(cfg, x * net.latent_std + net.latent_mean), nfe


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


# ---- 7. Data: latents float16 (N, 2, C, h, w) of images and their mirror images, from a file -----

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


class VAEBlock(nn.Module):
    """norm, SiLU, conv, twice; + the input."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, C_in, eps=1e-6)
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, C_out, eps=1e-6)
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VAEAttention(nn.Module):
    """Attention between all positions, one head; + the input."""

    def __init__(self, C):
        super().__init__()
        self.norm = nn.GroupNorm(32, C, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(C, C, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)                 # (B, 1, HW, C)
        return x + self.proj_out(h[:, 0].mT.reshape(x.shape))


class VAEStage(nn.Module):
    """Blocks at one resolution, attention after each at the lowest, then another resolution."""

    def __init__(self, C_in, C_out, blocks, attention, resample):
        super().__init__()
        inputs = [C_in] + [C_out] * (blocks - 1)
        self.block = nn.ModuleList(VAEBlock(C, C_out) for C in inputs)
        self.attn = nn.ModuleList(VAEAttention(C_out) for _ in range(blocks * attention))
        if resample == "down":
            self.downsample = nn.ModuleDict(dict(conv=nn.Conv2d(C_out, C_out, 3, stride=2)))
        elif resample == "up":
            self.upsample = nn.ModuleDict(dict(conv=nn.Conv2d(C_out, C_out, 3, padding=1)))

    def forward(self, h):
        for i, block in enumerate(self.block):
            h = block(h)
            h = self.attn[i](h) if self.attn else h
        if hasattr(self, "downsample"):
            h = self.downsample.conv(F.pad(h, (0, 1, 0, 1)))        # zeros at right and bottom
        elif hasattr(self, "upsample"):
            h = self.upsample.conv(F.interpolate(h, scale_factor=2.0))
        return h


class VAE(nn.Module):
    """The autoencoder of VA-VAE f16d32 (Yao et al. 2025) with the official parameter names: images
    (B, 3, S, S) in [-1, 1] to mean and log-variance of latents (B, 32, S/16, S/16), and back."""
    widths = (128, 128, 256, 256, 512)

    def __init__(self):
        super().__init__()
        widths, high, low = self.widths, self.widths[0], self.widths[4]     # resolutions
        self.encoder, self.decoder = self.half(3, high, low, 64), self.half(32, low, high, 3)
        self.encoder.down, self.decoder.up = nn.Sequential(), nn.ModuleList()
        for k, C in enumerate(widths):
            before, after = widths[max(k - 1, 0)], widths[min(k + 1, 4)]
            self.encoder.down.append(VAEStage(before, C, 2, k == 4, "down" if k < 4 else ""))
            self.decoder.up.append(VAEStage(after, C, 3, k == 4, "up" if k > 0 else ""))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(64, 64, 1), nn.Conv2d(32, 32, 1)

    def half(self, C_in, C_first, C_last, C_out):
        """What encoder and decoder have in common, beside their stages."""
        half = nn.Module()
        half.conv_in = nn.Conv2d(C_in, C_first, 3, padding=1)
        half.mid, C = nn.Sequential(), self.widths[4]
        half.mid.block_1, half.mid.attn_1 = VAEBlock(C, C), VAEAttention(C)
        half.mid.block_2 = VAEBlock(C, C)
        half.norm_out = nn.GroupNorm(32, C_last, eps=1e-6)
        half.conv_out = nn.Conv2d(C_last, C_out, 3, padding=1)
        return half

    def encode(self, x):
        h = self.encoder.mid(self.encoder.down(self.encoder.conv_in(x)))
        h = self.encoder.conv_out(F.silu(self.encoder.norm_out(h)))
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        h = self.decoder.mid(self.decoder.conv_in(self.post_quant_conv(z)))
        for stage in reversed(self.decoder.up):
            h = stage(h)
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(h)))


VAVAE = "vavae-imagenet256-f16d32-dinov2.pt"
VAVAE_URL = "https://huggingface.co/hustvl/vavae-imagenet256-f16d32-dinov2/resolve/main/"


def find_vae(cfg):
    """Path of VA-VAE's weights: --vae, or a file in data_dir, which is downloaded if need be."""
    path = Path(cfg.vae or Path(cfg.data_dir, VAVAE))
    if cfg.vae and not path.exists():
        raise UserError(f"--vae {cfg.vae}: no such file")
    if not path.exists():
        try:
            with urllib.request.urlopen(VAVAE_URL + VAVAE, timeout=30) as reply:
                bar = tqdm.wrapattr(reply, "read", total=reply.length, desc=VAVAE, disable=None)
                with bar as body, new_file(path) as file:
                    shutil.copyfileobj(body, file)
                    if reply.length:
                        raise OSError(f"the last {reply.length} bytes did not come")
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"cannot download {VAVAE_URL}{VAVAE} ({error}); put the file into "
                            f"{cfg.data_dir}, name it with --vae, or try --tokenizer unshuffle")
    return path


@functools.lru_cache
def file_hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tokenizer_hash(cfg):
    """What tells one tokenizer from another."""
    return file_hash(find_vae(cfg))[:12] if cfg.tokenizer == "vavae" else f"unshuffle{cfg.cell}"


@functools.lru_cache(maxsize=1)
def load_vae(path, device):
    """The official file: a state_dict, or a checkpoint with one, which has other networks too."""
    state, net = read_checkpoint(path), VAE()
    state = state.get("state_dict", state)
    try:
        net.load_state_dict({name: state[name] for name in net.state_dict()})
    except (RuntimeError, KeyError) as error:
        raise UserError(f"--vae {path} is no VA-VAE f16d32 ({' '.join(str(error).split())[:200]})")
    return net.to(device).eval().requires_grad_(False)


def latent_shape(cfg):
    """(C, h, w) of a latent: 32 channels of VA-VAE, or the pixels of a cell."""
    channels = 32 if cfg.tokenizer == "vavae" else DATASETS[cfg.dataset][0] * cfg.cell ** 2
    return channels, cfg.size // cfg.cell, cfg.size // cfg.cell


@torch.no_grad()
def to_latents(cfg, images, seeds, device):
    """uint8 images (B, C, S, S) -> latents (B, ...) float32, not normalised. As by LightningDiT, a
    draw from VA-VAE's posterior, with noise from a seed for each; or the pixels of each cell."""
    x = to_float(images.to(device))
    if cfg.tokenizer == "unshuffle":
        return F.pixel_unshuffle(x, cfg.cell)
    mean, logvar = load_vae(find_vae(cfg), device).encode(x)
    noise = [torch.randn(mean.shape[1:], generator=rng(*seed)) for seed in seeds]
    return mean + (logvar / 2).exp() * torch.stack(noise).to(device)


@torch.no_grad()
def to_images(cfg, x):
    """Latents as to_latents makes them -> uint8 images (B, C, S, S)."""
    if cfg.tokenizer == "unshuffle":
        return to_uint8(F.pixel_shuffle(x, cfg.cell))
    vae = load_vae(find_vae(cfg), x.device)
    return torch.cat([to_uint8(vae.decode(part)) for part in x.split(8)])       # 0.3 GB an image


def list_images(cfg, train):
    """What there is to encode: labels, a hash (folders: names, sizes, labels), read(i): image i as
    uint8 (3, S, S), or a text if it cannot be decoded."""
    if cfg.dataset == "glyphs":
        images, labels = draw_glyphs(20000, seed=0) if train else draw_glyphs(4000, seed=1)
        return labels.tolist(), hashlib.sha256(images).hexdigest()[:12], images.__getitem__
    files, labels, stamps = list_folders(cfg, train)

    def read(i):
        try:
            return centre_crop(read_image(files[i]), cfg.size)
        except Exception as error:                                  # Pillow fails in many ways
            return f"{files[i]} ({error})"

    facts = [(os.path.basename(file), size) for file, (size, _) in zip(files, stamps)]
    return labels, hashlib.sha256(repr((facts, labels)).encode()).hexdigest()[:12], read


def encode_rows(cfg, read, rows, pool, device):
    """Latents (n, 2, C, h, w) of images and their mirror images, and {row: fault} of the others."""
    images = dict(zip(rows, pool.map(read, rows)))
    bad = {row: image for row, image in images.items() if isinstance(image, str)}
    good = [row for row in rows if row not in bad]
    if not good:
        return torch.zeros(0, 2, *latent_shape(cfg), device=device), bad
    x = torch.from_numpy(np.stack([images[row] for row in good]))
    x = torch.stack([x, x.flip(-1)], dim=1).flatten(0, 1)
    seeds = [(row, mirror, 5) for row in good for mirror in (0, 1)]
    return to_latents(cfg, x, seeds, device).unflatten(0, (-1, 2)), bad


def channel_statistics(cfg, read, N, batch, pool, device):
    """Mean and standard deviation of each channel, of as many images as LightningDiT takes."""
    sums, n = torch.zeros(2, latent_shape(cfg)[0], dtype=torch.float64), 0
    some = torch.randperm(N, generator=rng(0))[:10000].split(batch)
    for rows in tqdm(some, desc="statistics", disable=None):
        x, _ = encode_rows(cfg, read, rows.tolist(), pool, device)
        x = x[:, 0].cpu().double().contiguous()                     # without mirror images
        sums += torch.stack([x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))])
        n += x[:, 0].numel()
    mean, square = sums / n
    std = (square - mean ** 2).clamp(min=1e-8).sqrt()
    return dict(mean=mean.tolist(), std=std.tolist())


def latents_path(cfg, train):
    cell, split = f"{cfg.tokenizer}{cfg.cell}", "train" if train else "test"
    return Path(cfg.data_dir, f"{cfg.dataset}{cfg.size}-{cell}-{split}.latents")


def read_facts(path):
    """The JSON file beside latents, or beside the part that was made; {} where there is none."""
    path = Path(f"{path}.json")
    return json.loads(path.read_text()) if path.exists() else {}


def write_facts(path, facts):
    with new_file(Path(f"{path}.json")) as file:
        file.write(json.dumps(facts).encode())


def encode(cfg, train, device):
    """Makes the latents of the training or test images, one file of float16 (N, 2, C, h, w), and a
    JSON file with what they are. A run that is killed goes on where it was, and the file ends up
    the same, byte by byte: work comes in the same batches, noise from a seed for each image."""
    path, (labels, listing, read) = latents_path(cfg, train), list_images(cfg, train)
    N, size = len(labels), 4 * math.prod(latent_shape(cfg))         # bytes of an image's latents
    batch = 500 if cfg.tokenizer == "unshuffle" else 2 if device.type == "cpu" else 16
    origin = dict(tokenizer=tokenizer_hash(cfg), images=listing, batch=batch)
    part, pool = Path(f"{path}.part"), concurrent.futures.ThreadPoolExecutor()
    facts = read_facts(part)
    if facts.get("origin") != origin or not part.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free / 1e9
        print(f"{path}: {N} images, {N * size / 1e9:.2f} GB to write, {free:.0f} GB free")
        found = read_facts(latents_path(cfg, True))                 # the training latents'
        if train:
            found = channel_statistics(cfg, read, N, batch, pool, device)
        facts = dict(origin=origin, done=0, bad={}, mean=found["mean"], std=found["std"])
        write_facts(part, facts)                                    # first: `done` is 0 again
        part.write_bytes(b"")
    mean, std = (torch.tensor(facts[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))
    bad = facts["bad"]                                              # {row: fault}, over all batches
    with pool, open(part, "r+b") as file, tqdm(total=N, initial=facts["done"], disable=None) as bar:
        file.truncate(size * (facts["done"] - len(bad)))            # a batch that was not finished
        file.seek(0, 2)
        while facts["done"] < N:
            rows = range(N)[facts["done"]:facts["done"] + batch]
            x, faults = encode_rows(cfg, read, rows, pool, device)
            file.write(((x - mean) / std).half().cpu().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())                                 # before the facts say so
            facts["done"] += len(rows)
            bad.update((str(row), fault) for row, fault in faults.items())
            write_facts(part, facts)
            bar.update(len(rows))
    if bad:
        text = f"{len(bad)} of {N} pictures cannot be decoded, the first is {min(bad.values())}"
        if 100 * len(bad) > N:
            raise UserError(f"--data_dir {cfg.data_dir}: {text}; remove or mend them")
        print(f"note: {text}; they are left out", file=sys.stderr)
    labels = [label for row, label in enumerate(labels) if str(row) not in bad]
    write_facts(path, dict(facts, labels=labels))
    os.replace(part, path)
    Path(f"{part}.json").unlink()


def latent_statistics(cfg):
    """Mean and standard deviation of each channel of the training latents; 0 and 1 where there are
    none: then a checkpoint will tell."""
    facts, C = read_facts(latents_path(cfg, True)), latent_shape(cfg)[0]
    return torch.tensor(facts.get("mean", [0.0] * C)), torch.tensor(facts.get("std", [1.0] * C))


def count_classes(cfg):
    """Of the data set, or of the folders from which the latents were made."""
    labels = read_facts(latents_path(cfg, True)).get("labels", [0])
    return DATASETS[cfg.dataset][2] or max(labels) + 1


def load_latents(cfg, train):
    """Latents float16 (N, 2, C, h, w) of training or test images and their mirror images, mapped
    from the file that --encode made, not to be written to, and labels int64 (N,). Those of other
    images, of another tokenizer or normalised by other statistics are refused."""
    for split in (True, train):
        if cfg.tokenizer == "unshuffle" and not latents_path(cfg, split).exists():
            encode(cfg, split, torch.device("cpu"))
    path, home = latents_path(cfg, train), latents_path(cfg, True)
    facts = read_facts(path)
    if not facts or not path.exists():
        fields = ("dataset", "data_dir", "size", "tokenizer", "cell", "vae")
        flags = [f"--{name} {getattr(cfg, name)}" for name in fields if getattr(cfg, name)]
        raise UserError(f"no latents {path}; make them: {SCRIPT}.py --encode {' '.join(flags)}")
    there = {**facts, **facts.get("origin", {}), "bytes": path.stat().st_size}
    shape = (len(facts["labels"]), 2, *latent_shape(cfg))
    now = dict(there, tokenizer=tokenizer_hash(cfg), bytes=2 * math.prod(shape))
    now.update((k, read_facts(home).get(k)) for k in ("mean", "std"))
    with contextlib.suppress(UserError):                            # images may be gone by now
        now["images"] = list_images(cfg, train)[1]
    other = [name for name in now if there.get(name) != now[name]]
    if other:
        raise UserError(f"{path} has other {', '.join(other)} than {home} and what is here; delete "
                        "both and what lies beside them, and encode again")
    warnings.filterwarnings("ignore", ".*not writable")             # they are only read
    latents = np.memmap(path, np.float16, "r", shape=shape)         # "c" would need as much memory
    return torch.from_numpy(latents), torch.tensor(facts["labels"])


def read_ahead(images, labels, cfg, step, own, device):
    """From a step on, latents and labels of this process's rows of each global batch, on the
    device. For CUDA a thread reads one step ahead, as latents come from a disk; on a CPU that would
    nearly halve the speed, as two teams of OpenMP threads do not fit the cores, and MPS has neither
    threads nor copies that are safe (PyTorch 197805, 189690)."""
    def read(step):
        rows = batch_indices(len(images), cfg.batch, cfg.seed, step)[own]
        batch = images[rows.to(images.device, non_blocking=images.is_cuda)]
        pin = device.type == "cuda" and not batch.is_cuda
        return batch.pin_memory() if pin else batch, labels[rows]

    while device.type != "cuda":
        batch, y = read(step)
        yield batch.to(device), y.to(device)
        step += 1
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, step)
        while True:
            batch, y = ahead.result()
            step += 1
            ahead = pool.submit(read, step)
            yield batch.to(device, non_blocking=True), y.to(device, non_blocking=True)


load_data, read_batches, draw_images = load_latents, read_ahead, draw_from_latents


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


def dit_layers(cfg):
    """The names of the features, in order of computation."""
    return [f"block_{k}" for k in range(1, DiT.sizes[cfg.backbone][0] + 1)]


def dit_choices(cfg):
    """The values that some fields may take, given the others."""
    cells = [16] if cfg.tokenizer == "vavae" else range(1, cfg.size + 1)
    return dict(tokenizer=("vavae", "unshuffle"), layer=dit_layers(cfg), cell=cells,
                size=range(cfg.cell, 4097, cfg.cell),
                self_cond=("adaptive", "adaptive1", "add", "none"))


def dit_from_official(net, state, start):
    """LightningDiT's weights for our clock. Its time is 1 - t and its prediction -v: the signs
    of the last layer change; cos((1 - t) w), sin((1 - t) w) are linear in cos t w, sin t w."""
    table = state.get("y_embedder.embedding_table.weight")
    if net.null and table is not None and not start and len(table) != net.null + 1:
        net.null = len(table) - 1                           # a folder that is gone or has changed
        net.y_embedder.embedding_table = nn.Embedding(*table.shape)
    if "latent_mean" in state:                              # ours
        return state
    state = {k.removeprefix("module."): v.clone() for k, v in state.get("model", state).items()}
    w = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    cosines, sines = state["t_embedder.mlp.0.weight"].chunk(2, dim=1)
    turned = [cosines * w.cos() + sines * w.sin(), cosines * w.sin() - sines * w.cos()]
    state["t_embedder.mlp.0.weight"] = torch.cat(turned, dim=1)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name]
    return {**state, "latent_mean": net.latent_mean, "latent_std": net.latent_std}


layers, choices, from_official = dit_layers, dit_choices, dit_from_official


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


def encode_command(argv):
    """--encode: makes the latents of both splits, with the other flags as for training."""
    given, _ = parse_command_line([word for word in argv if word != "--encode"])
    try:
        cfg = make_config(**given)
        if WORLD > 1:
            raise UserError("--encode is the work of one process: start it with python")
        for train in (True, False):
            try:
                if not latents_path(cfg, train).exists():
                    encode(cfg, train, start(cfg))
                load_latents(cfg, train)
                print(f"{latents_path(cfg, train)} is complete")
            except UserError as error:
                if train or cfg.dataset != "folder" or "and val/CLASS" not in str(error):
                    raise
                print(f"no test latents, which probe.py needs: {error}")
    except UserError as error:
        fail(error)
    return 0


if __name__ == "__main__":
    leave(encode_command(sys.argv[1:]) if "--encode" in sys.argv else main() or 0)
