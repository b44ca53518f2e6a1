"""DDAE++ with DiT in the latent space of VA-VAE, in one file: latents, network, training, sampling, features.

Paper     DDAE++ (arXiv 2505.10999): Sec. 4.1 and Fig. 1(b) self-conditioning, Tables 5 and 6 results, Tables 8-11.
Idea      A diffusion model learns features that classify well. Hand one of them back to the layers that decode. Here f
          is the best block's output, averaged over tokens; c, which conditions all blocks, becomes c + s(t) * W f after
          it, W a linear layer, s(t) a vector, learned from the time as c is. [SC] marks the lines.
Cost      1,378,560 parameters (1.1 % of dit_b), about 2 % of a step
Maths     x_t = (1 - t) x_0 + t eps                       Eq. (1) with alpha = 1 - t, sigma = t; t = 0 is the data
          loss = || v - (eps - x_0) ||^2 + 1 - cos(v, eps - x_0), v = v_theta(x_t, t, y); cos is LightningDiT's
          sample = Euler's method along dx/dt = v         250 steps; with classes y also classifier-free guidance
Careful   This self-conditioning hands the network its own *features*. The method of the same name in Analog Bits
          (Chen et al. 2022) hands it its previous estimate of x_0: something else.

Run       python dit_latent_sc.py                                           # glyphs: two CPU cores, 5 minutes
          python dit_latent_sc.py --encode --dataset imagenet100            # once: VA-VAE latents of data/imagenet100
          torchrun --nproc_per_node=8 dit_latent_sc.py --dataset imagenet100 --epochs 1000      # told the classes
          torchrun --nproc_per_node=8 dit_latent_sc.py --dataset imagenet100 --uncond           # not told the classes
          torchrun --nproc_per_node=8 dit_latent_sc.py --dataset imagenet100 --self_cond none   # the baseline
          python dit_latent_sc.py --sample runs/.../last.pt --n 80 --guidance 1.5               # the classes in turn
Expect    Table 6 (ImageNet, 90 epochs, baseline in brackets): unconditional FID 28.85, accuracy 64.42 %
          (29.69, 63.25 %); conditional FID 15.30, 62.46 % (16.01, 62.03 %), 6.11 with guidance (6.10).
          README.md: what two CPU cores reach.
"""
import argparse, concurrent.futures, contextlib, copy, dataclasses, datetime, difflib, fcntl, functools, hashlib
import http.client, inspect, json, math, os, re, shutil, signal, sys, time, urllib.request, zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm


# ---- 1. Configuration: Tables 8-11 as data ---------------------------------------------------------------------------

@dataclasses.dataclass
class Config:
    """Every field is a command-line flag and its comment the help text."""
    dataset: str = "glyphs"      # a name in RECIPES: glyphs, cifar100, tiny_imagenet, folder, ...
    data_dir: str = "data"       # downloads go here; files and folders of class folders found here are used
    size: int = 0                # pixels a side; 0: the data set's own, 64 for folders (fashion_mnist also takes 16)
    skip_bad: bool = False       # skip image files that cannot be decoded, instead of stopping at the first
    tokenizer: str = "vavae"     # makes latents of images: vavae | unshuffle: without parameters, for trial runs
    cell: int = 16               # side in pixels of what one position of the latents stands for (Table 9)
    vae: str = ""                # file with the weights of VA-VAE; default: data_dir, or a download to it
    out: str = ""                # run folder; default: runs/SCRIPT-DATASET-SELFCOND-sSEED, with what else was chosen
    init: str = ""               # start from these weights: an official state_dict, or a checkpoint's averaged ones
    seed: int = 0                # all randomness of a step is a function of (seed, step)
    # network
    backbone: str = "dit_b"      # a name in Backbone.sizes (Table 9)
    dropout: float = 0.0         # where the public implementations have it (Table 8); U-ViT has none
    uncond: bool = False         # do not tell the network the classes (Tables 5 and 6)
    classes: int = 0             # how many the network is told of, with --dataset folder; other data sets know
    class_drop: float = 0.1      # probability with which the network is not told the class, for guidance
    self_cond: str = "adaptive"  # adaptive: e + s(t) W f | add: e + W f (Table 7a) | cls: a token (Fig. 2a) | none
    layer: str = "block_8"       # UNet, DiT: its features condition what follows; all: probed, contrasted (Table 10)
    t_probe: float = 0.25        # best time for the linear probe (Table 10)
    # optimisation
    epochs: int = 1400           # passes over the training images (Table 11)
    steps: int = 0               # if > 0: stop after so many optimizer steps, whatever epochs says
    batch: int = 1024            # images per optimizer step, over all processes (Table 11)
    accum: int = 1               # forward passes into which each process divides its share of the batch
    lr: float = 2e-4             # final learning rate, for any number of processes (Table 11)
    warmup: float = 0.0          # epochs of linear warm-up; constant afterwards (Table 11)
    beta1: float = 0.9           # of AdamW: 0.99 in the official U-ViT configuration, 0.9 elsewhere
    beta2: float = 0.95          # of AdamW: 0.95 in LightningDiT, 0.999 elsewhere
    weight_decay: float = 0.0    # of AdamW, but none on biases and positions (Appendix A); with 0, AdamW is Adam
    ema: float = 0.9999          # decay rate of the averaged weights (Table 8)
    ema_ramp: bool = True        # average over fewer steps at first, as DDAE does; LightningDiT does not
    flip: bool = True            # mirror half of the images (Table 11); if not, the augmentation mirrors none either
    # augmentation and contrast (Table 3)
    aug: float = 0.0             # probability of each non-leaky transformation (EDM's is 0.12); latents: shifted crop
    cl: float = 0.0              # weight gamma of the contrastive loss; 0.01 is best (Table 7d)
    cl_head: str = "time"        # projector of features: time: knows the time | plain: as in MoCo v3 (Table 7b)
    cl_target: str = "probe"     # noise of the teacher's images: probe: as at t_probe | min: the least (Table 7c)
    cl_hidden: int = 4096        # hidden units of projector and predictor
    # sampling
    nfe: int = 250               # network evaluations per image (Table 8); RF: 0 for adaptive RK45, else Euler's
    shift: float = 3.3           # of the sampler's times towards the noise (Table 8); 1: evenly spaced
    guidance: float = 1.5        # scale of classifier-free guidance (Table 8); 1: none
    guide_until: float = 0.89    # guidance for times in [0, guide_until] alone (Table 8)
    # machine
    device: str = "auto"         # auto | cuda | cpu | mps
    amp: str = "auto"            # auto: bf16, else fp16, on CUDA and float32 elsewhere | off | bf16 | fp16
    compile: bool = False        # torch.compile the network
    save_every: int = 200        # epochs between ckpt_EPOCH.pt; last.pt is also renewed every ten minutes
    sample_every: int = 50       # epochs between samples_EPOCH.png


TINY_DIT = dict(backbone="dit_tiny", tokenizer="unshuffle", cell=4, batch=32, lr=1.5e-3, warmup=0.5, beta2=0.999,
                layer="block_4", cl_hidden=512, nfe=50)
RECIPES = {  # fields of Config by data set; under the name of a backbone, those that differ with it
    "glyphs": dict(TINY_DIT, epochs=8, flip=False, save_every=1, sample_every=4),
    "imagenet100": dict(size=256, ema_ramp=False),      # the paper: 1400 epochs with --uncond, 1000 without
    "imagenet": dict(size=256, ema_ramp=False, epochs=90, save_every=10, sample_every=10,
                     layer="block_10"),                 # the paper: block_9 with --uncond
    "folder": dict(size=256),
}
DATASETS = {  # channels, side in pixels, classes (0: as many as there are folders)
    "glyphs": (3, 16, 10), "fashion_mnist": (1, 32, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100),
    "tiny_imagenet": (3, 64, 200), "imagenet100": (3, 64, 100), "imagenet": (3, 64, 1000), "folder": (3, 64, 0),
}


# ---- 2. Data: latents float16 (N, 2, C, h, w) of images and their mirror images, mapped from a file ------------------

# Strokes of the ten digits, as on a seven-segment display: "10 78" is a line from x = 1, y = 0 to x = 7, y = 8 (down).
DIGITS = [
    ["10 70 78 18 10"], ["70 78"], ["10 70 74 14 18 78"], ["10 70 78 18", "14 74"], ["10 14 74", "70 78"],
    ["70 10 14 74 78 18"], ["70 10 18 78 74 14"], ["10 70 78"], ["10 70 78 18 10", "14 74"], ["74 14 10 70 78 18"],
]


def draw_glyphs(n, seed):
    """n digits in random pose and colour: uint8 (n, 3, 16, 16), labels (n,) = 0..9 in turn. The same bytes everywhere:
    RandomState's streams are frozen, and + - * / sqrt are exact in IEEE 754; hence no sin, exp, BLAS or font. Half of
    the digits are lighter than the grey ground and half darker, so the mean of a pixel says little about the class."""
    rng, labels = np.random.RandomState(seed), np.arange(n) % 10
    uniform = lambda low, high, size=1: (low + (high - low) * rng.random_sample((n, size))).astype(np.float32)
    grid = np.arange(-7.5, 8, dtype=np.float32)
    x0, y0 = (axis.reshape(1, 256) for axis in np.meshgrid(grid, grid))             # pixel centres
    x, y = x0 - uniform(-0.3, 0.3), y0 - uniform(-0.3, 0.3)                         # to digit axes (n, 256): shift,
    u = uniform(-0.14, 0.14)                                                        # rotate by 2 atan(u), +-0.28 rad,
    x, y = ((1 - u * u) * x + 2 * u * y) / (1 + u * u), ((1 - u * u) * y - 2 * u * x) / (1 + u * u)
    x = (x + uniform(-0.05, 0.05) * y) / uniform(1.1, 1.35) + 4                     # shear and scale
    y = y / uniform(1.1, 1.35) + 4
    distance = np.full((n, 256), 99, np.float32)                                    # to the nearest stroke
    for digit, stroke in ((digit, stroke) for digit, strokes in enumerate(DIGITS) for stroke in strokes):
        points = [np.array([int(p[0]), int(p[1])], np.float32) for p in stroke.split()]
        for (ax, ay), (bx, by) in zip(points, points[1:]):
            px, py, dx, dy = x[digit::10] - ax, y[digit::10] - ay, bx - ax, by - ay
            along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
            off = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2)
            distance[digit::10] = np.minimum(distance[digit::10], off)
    ink = np.clip(uniform(1.2, 1.6) - distance, 0, 1)[:, None]                      # (n, 1, 256), one pixel of blur
    front = np.where(uniform(0, 1) < 0.5, uniform(0, 0.25), uniform(0.75, 1)) + uniform(-0.04, 0.04, 3)     # a tint
    back = uniform(0.4, 0.6) + uniform(-0.04, 0.04, 3)                              # (n, 3)
    back = back[..., None] + (uniform(-0.005, 0.005) * x0 + uniform(-0.005, 0.005) * y0)[:, None]   # a gradient
    image = np.clip(back + (front[..., None] - back) * ink, 0, 1) * np.float32(255) + rng.randint(-2, 3, (n, 3, 256))
    return np.clip(image + 0.5, 0, 255).astype(np.uint8).reshape(n, 3, 16, 16), labels


IMAGENET100 = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166 n01983481 n02009229
n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622 n02091831 n02093428 n02099849 n02100583
n02104029 n02105505 n02106550 n02107142 n02108089 n02109047 n02113799 n02113978 n02114855 n02116738 n02119022 n02123045
n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443
n02869837 n02877765 n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032 n03794056 n03837869
n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531 n04127249 n04136333 n04229816 n04238763
n04336792 n04418357 n04429376 n04435653 n04485082 n04493381 n04517823 n04589890 n04592741 n07714571 n07715103 n07753275
n07831146 n07836838 n13037406 n13040303
""".split()      # the classes of CMC (Tian et al. 2020)


class UserError(ValueError):
    """What the user can fix. The command line prints it as one line and ends with status 2."""


def list_folders(cfg, train):
    """Folders of class folders, sorted: train/ and val/ (or test/) in DATA_DIR/DATASET, or else in DATA_DIR. With
    --dataset folder, the class folders may also lie there without train/. Returns the root, and of each image its path
    from there, its label and a stamp that changes with the file."""
    root = Path(cfg.data_dir, cfg.dataset) if Path(cfg.data_dir, cfg.dataset).is_dir() else Path(cfg.data_dir)
    home = root / "train" if cfg.dataset != "folder" or (root / "train").is_dir() else root
    tests = root / "val", root / "test"
    split = home if train else next(filter(Path.is_dir, tests), tests[0])
    if not home.is_dir() or not split.is_dir():
        raise UserError(f"--data_dir {cfg.data_dir}: there is no folder {split if home.is_dir() else home}; "
                        f"--dataset {cfg.dataset} reads train/CLASS/*.jpg and val/CLASS/*.jpg there")
    classes = sorted(f.name for f in home.iterdir() if f.is_dir() and f not in tests and not f.name.startswith("."))
    if cfg.dataset == "imagenet100":
        classes = [name for name in classes if name in IMAGENET100]
    kinds = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
    files = []

    def stop(error):        # a folder that cannot be read is not passed over; one that is not there has no images
        if not isinstance(error, FileNotFoundError):
            raise error
    for label, name in enumerate(classes):      # strings, as a million Paths take a minute
        found = [os.path.join(folder, file) for folder, _, here in os.walk(split / name, onerror=stop) for file in here
                 if file.lower().endswith(kinds) and not file.startswith(".")]
        for path in filter(os.path.isfile, sorted(found, key=lambda path: path.split(os.sep))):
            files.append((os.path.relpath(path, root), label, os.stat(path)))
    if len(classes) < (DATASETS[cfg.dataset][2] or 1) or not files:
        raise UserError(f"--data_dir {cfg.data_dir}: {len(classes)} class folders in {home} and {len(files)} images of "
                        f"them in {split}; --dataset {cfg.dataset} needs {DATASETS[cfg.dataset][2] or 1} or more")
    names, labels, stats = zip(*files)
    return root, names, labels, [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def centre_crop(image, size):
    """RGB pixels (3, size, size), cropped as by ADM (Dhariwal & Nichol 2021): halved by box filters while twice too
    large, then resized by a bicubic one until the shorter side fits; the middle is kept."""
    if image.mode.startswith("I"):      # 16 bits: convert() would clip them to white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize([side // 2 for side in image.size], Image.BOX)
    scale = size / min(image.size)
    image = np.asarray(image.resize([round(side * scale) for side in image.size], Image.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top:top + size, left:left + size].transpose(2, 0, 1)


def list_images(cfg, train):
    """What there is to encode: a function that gives image i as uint8 (3, S, S), the labels, and a hash of it all."""
    if cfg.dataset == "glyphs":
        images, labels = draw_glyphs(20000, seed=0) if train else draw_glyphs(4000, seed=1)
        return lambda i: images[i], labels.tolist(), hashlib.sha256(images.tobytes()).hexdigest()[:12]
    root, names, labels, stamps = list_folders(cfg, train)

    def read(i):
        try:
            with Image.open(root / names[i]) as image:
                return centre_crop(image, cfg.size)
        except Exception as error:      # Pillow fails in many ways on damaged images
            return UserError(f"{names[i]} in --data_dir {cfg.data_dir} cannot be decoded ({error}); remove it, or give "
                             "--skip_bad")
    sizes = [size for size, _ in stamps]        # no file times: a copy of the folder will do
    return read, list(labels), hashlib.sha256(repr((names, labels, sizes)).encode()).hexdigest()[:12]


class VAEBlock(nn.Module):
    """norm, SiLU, conv, twice; + the input."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, C_in, eps=1e-6), nn.Conv2d(C_in, C_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, C_out, eps=1e-6), nn.Conv2d(C_out, C_out, 3, padding=1)
        if C_in != C_out:
            self.nin_shortcut = nn.Conv2d(C_in, C_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class VAEAttention(nn.Module):
    """Attention between all positions, one head; + the input."""

    def __init__(self, C):
        super().__init__()
        self.norm = nn.GroupNorm(32, C, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(C, C, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))      # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class VAE(nn.Module):
    """The convolutional autoencoder of VA-VAE f16d32 (Yao et al. 2025), with the official parameter names: images
    (B, 3, S, S) in [-1, 1] to mean and log-variance of latents (B, 32, S/16, S/16), and back. 69,836,067 parameters."""
    widths = (128, 128, 256, 256, 512)

    def __init__(self):
        super().__init__()
        def stage(C_in, C_out, blocks, attention, resample):
            module = nn.Module()
            module.block = nn.ModuleList(VAEBlock(C_in if i == 0 else C_out, C_out) for i in range(blocks))
            module.attn = nn.ModuleList(VAEAttention(C_out) for _ in range(blocks * attention))
            if resample:
                setattr(module, resample, nn.Module())
                stride, padding = (2, 0) if resample == "downsample" else (1, 1)
                getattr(module, resample).conv = nn.Conv2d(C_out, C_out, 3, stride, padding)
            return module

        def half(C_in, C_first, C_last, C_out):
            module = nn.Module()
            module.conv_in, module.mid = nn.Conv2d(C_in, C_first, 3, padding=1), nn.Module()
            module.mid.block_1, module.mid.attn_1 = VAEBlock(512, 512), VAEAttention(512)
            module.mid.block_2, module.norm_out = VAEBlock(512, 512), nn.GroupNorm(32, C_last, eps=1e-6)
            module.conv_out = nn.Conv2d(C_last, C_out, 3, padding=1)
            return module
        w, levels = self.widths, range(5)
        self.encoder, self.decoder = half(3, 128, 512, 64), half(32, 512, 128, 3)
        self.encoder.down = nn.ModuleList(
            stage(w[max(k - 1, 0)], w[k], 2, k == 4, "downsample" if k < 4 else "") for k in levels)
        self.decoder.up = nn.ModuleList(                                            # the last comes first
            stage(w[min(k + 1, 4)], w[k], 3, k == 4, "upsample" if k > 0 else "") for k in levels)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(64, 64, 1), nn.Conv2d(32, 32, 1)

    def run(self, stage, h):
        for i, block in enumerate(stage.block):
            h = block(h)
            h = stage.attn[i](h) if len(stage.attn) else h
        return h

    def middle(self, mid, h):
        return mid.block_2(mid.attn_1(mid.block_1(h)))

    def encode(self, x):
        h = self.encoder.conv_in(x)
        for stage in self.encoder.down:
            h = self.run(stage, h)
            if hasattr(stage, "downsample"):
                h = stage.downsample.conv(F.pad(h, (0, 1, 0, 1)))                   # zeros at the right and the bottom
        h = self.encoder.conv_out(F.silu(self.encoder.norm_out(self.middle(self.encoder.mid, h))))
        mean, logvar = self.quant_conv(h).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        h = self.middle(self.decoder.mid, self.decoder.conv_in(self.post_quant_conv(z)))
        for stage in reversed(self.decoder.up):
            h = self.run(stage, h)
            if hasattr(stage, "upsample"):
                h = stage.upsample.conv(F.interpolate(h, scale_factor=2.0))
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(h)))


VAVAE = "vavae-imagenet256-f16d32-dinov2.pt"
VAVAE_URL = "https://huggingface.co/hustvl/vavae-imagenet256-f16d32-dinov2/resolve/main/"


def find_vae(cfg):
    """Path of VA-VAE's weights. The first download is pinned: its hash is printed, kept beside it and compared."""
    path = Path(cfg.vae or Path(cfg.data_dir, VAVAE))
    pin = path.with_name(f"{path.name}.sha256")
    if not path.is_file() and cfg.vae:
        raise UserError(f"--vae {cfg.vae}: no such file")
    if path.is_file() and pin.is_file() and pin.read_text().strip() != file_hash(path):
        raise UserError(f"{path} is not what was downloaded ({pin}); delete both, and the next run downloads it")
    if not path.is_file():
        part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urllib.request.urlopen(VAVAE_URL + VAVAE, timeout=30) as reply, open(part, "wb") as file:
                size = reply.length
                with tqdm.wrapattr(reply, "read", total=size, desc=VAVAE, disable=None) as stream:
                    while file.tell() < 2**33 and (chunk := stream.read(2**20)):        # far more than it has
                        file.write(chunk)
            if size and part.stat().st_size != size:
                raise OSError(f"{part.stat().st_size} of {size} bytes came")
            os.replace(part, path)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"cannot download {VAVAE_URL}{VAVAE} ({error}); put the file into {cfg.data_dir}, name it "
                            "with --vae, or try the pipeline without it: --tokenizer unshuffle")
        finally:
            part.unlink(missing_ok=True)
        write_text(pin, file_hash(path))
        print(f"{path}: sha256 {file_hash(path)}", file=sys.stderr)
    return path


@functools.lru_cache
def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tokenizer_hash(cfg):
    """What tells one tokenizer from another: 12 hex digits of the weights' hash."""
    return file_hash(find_vae(cfg))[:12] if cfg.tokenizer == "vavae" else f"unshuffle{cfg.cell}"


@functools.lru_cache(maxsize=1)
def load_vae(path, device):
    """The official file: a state_dict, or a checkpoint with one, which holds other networks as well."""
    state = read_checkpoint(path)
    state, net = state.get("state_dict", state), VAE()
    if missing := [name for name in net.state_dict() if name not in state]:
        raise UserError(f"--vae {path}: {missing[0]} and {len(missing) - 1} more tensors of VA-VAE are not in it")
    try:
        net.load_state_dict({name: state[name] for name in net.state_dict()})
    except RuntimeError as error:
        raise UserError(f"--vae {path}: is no VA-VAE f16d32 ({' '.join(str(error).split())[:200]})")
    return net.to(device).eval().requires_grad_(False)


def latent_shape(cfg):
    side = cfg.size // cfg.cell
    return (32 if cfg.tokenizer == "vavae" else DATASETS[cfg.dataset][0] * cfg.cell ** 2, side, side)


@torch.no_grad()
def to_latents(cfg, images, seeds, device):
    """uint8 images (B, C, S, S) -> latents (B, ...) float32, not normalised: as by LightningDiT, a draw from VA-VAE's
    posterior, with noise from a seed for each; or the pixels of each cell as channels."""
    x = to_float(images.to(device))
    if cfg.tokenizer == "unshuffle":
        return F.pixel_unshuffle(x, cfg.cell)
    mean, logvar = load_vae(find_vae(cfg), device).encode(x)
    noise = torch.stack([torch.randn(mean.shape[1:], generator=rng(*seed)) for seed in seeds]).to(device)
    return mean + (logvar / 2).exp() * noise


@torch.no_grad()
def to_images(cfg, x):
    """Latents as to_latents makes them -> uint8 images (B, C, S, S)."""
    if cfg.tokenizer == "unshuffle":
        return to_uint8(F.pixel_shuffle(x, cfg.cell))
    vae = load_vae(find_vae(cfg), x.device)
    return torch.cat([to_uint8(vae.decode(part)) for part in x.split(8)])           # 0.3 GB an image


def latents_path(cfg, train):
    cell = f"{cfg.tokenizer}{cfg.cell}"
    return Path(cfg.data_dir, f"{cfg.dataset}{cfg.size}-{cell}-{'train' if train else 'test'}.latents")


@contextlib.contextmanager
def locked(folder):
    """One process at a time, of all that work in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def encode_rows(cfg, read, rows, copies, pool, device):
    """Latents (n, copies, ...) of some images and their mirror images, and the rows of those that can be decoded."""
    images = dict(zip(rows, pool.map(read, rows)))
    good = [row for row, image in images.items() if not isinstance(image, Exception)]
    if len(good) < len(rows) and not cfg.skip_bad:
        raise next(image for image in images.values() if isinstance(image, Exception))
    if not good:
        return torch.zeros(0, copies, *latent_shape(cfg), device=device), good
    x = torch.from_numpy(np.stack([images[row] for row in good]))
    x = torch.stack([x, x.flip(-1)][:copies], dim=1).flatten(0, 1)
    x = to_latents(cfg, x, [(row, mirror, 5) for row in good for mirror in range(copies)], device)
    return x.unflatten(0, (-1, copies)), good


def channel_statistics(cfg, latents):
    """Mean and standard deviation of each channel of batches of latents (n, 1, C, h, w), as lists."""
    sums, n = torch.zeros(2, latent_shape(cfg)[0], dtype=torch.float64), 0
    for x in latents:
        x = x[:, 0].cpu().double()
        sums, n = sums + torch.stack([x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))]), n + x[:, 0].numel()
    if not n:
        raise UserError(f"--data_dir {cfg.data_dir}: no image can be decoded")
    mean, square = sums / n
    return dict(mean=mean.tolist(), std=(square - mean ** 2).clamp(min=1e-8).sqrt().tolist())


def encode(cfg, train, device, batch=None):
    """Makes the latents of the training or test images: one file of float16 (N, 2, C, h, w), each image and its mirror
    image, normalised by channel, and a JSON file with what they are. A run that is killed goes on where it was, and the
    file ends up the same, byte by byte: work comes in the same batches, noise from a seed for each image."""
    path, shape = latents_path(cfg, train), latent_shape(cfg)
    read, labels, listing = list_images(cfg, train)
    batch = batch or (500 if cfg.tokenizer == "unshuffle" else 2 if device.type == "cpu" else 16)
    facts = dict(tokenizer=tokenizer_hash(cfg), images=listing, shape=list(shape), batch=batch)
    part, note = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    size, N = 4 * math.prod(shape), len(labels)                                     # bytes of an image's two latents
    path.parent.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, locked(path.parent):
        if path.exists():       # another process has made them while we waited
            return
        try:
            state = json.loads(note.read_text()) if part.exists() else {}
        except (OSError, ValueError):       # none, or a machine that crashed has left a piece of it
            state = {}
        there = part.stat().st_size if part.exists() else 0
        # Not begun, or begun with something else, or a machine that crashed has lost what was written.
        if state.get("facts") != facts or there < size * (state["done"] - len(state["skipped"])):
            if there:
                print(f"{part} was begun with other images, tokenizer or device; it is made anew", file=sys.stderr)
            part.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            print(f"{path}: {N} images, {N * size / 1e9:.2f} GB to write, {free / 1e9:.0f} GB free", flush=True)
            if free < 1.02 * N * size:
                raise UserError(f"--data_dir {cfg.data_dir}: {N * size / 1e9:.1f} GB for latents are needed and "
                                f"{free / 1e9:.1f} GB free; choose a folder with room")
            if train:           # from as many images as LightningDiT takes
                some = tqdm(torch.randperm(N, generator=rng(0))[:10000].split(batch), desc="statistics", disable=None)
                made = (encode_rows(cfg, read, rows.tolist(), 1, pool, device)[0] for rows in some)
            found = channel_statistics(cfg, made) if train else read_facts(cfg, True)
            state = dict(facts=facts, done=0, skipped=[], mean=found["mean"], std=found["std"])
        mean, std = (torch.tensor(state[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
        part.touch()
        with open(part, "r+b") as file, tqdm(total=N, initial=state["done"], desc=path.name, disable=None) as bar:
            file.truncate(size * (state["done"] - len(state["skipped"])))           # a batch that was not finished
            file.seek(0, 2)
            while state["done"] < N:
                rows = list(range(state["done"], min(N, state["done"] + batch)))
                x, good = encode_rows(cfg, read, rows, 2, pool, device)
                file.write(((x - mean) / std).half().cpu().numpy().tobytes())
                file.flush()
                state = dict(state, done=rows[-1] + 1, skipped=state["skipped"] + sorted({*rows} - {*good}))
                write_text(note, json.dumps(state))
                bar.update(len(rows))
        if state["skipped"]:
            print(f"note: {len(state['skipped'])} of {N} images cannot be decoded and are skipped", file=sys.stderr)
        skipped = set(state["skipped"])
        kept = [label for i, label in enumerate(labels) if i not in skipped]
        write_text(path.with_name(f"{path.name}.json"), json.dumps(dict(state, labels=kept)))
        os.replace(part, path)
        note.unlink()


def write_text(path, text):
    part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)


def read_facts(cfg, train):
    """The JSON file beside latents."""
    path = latents_path(cfg, train)
    try:
        return json.loads(path.with_name(f"{path.name}.json").read_text())
    except OSError:
        given = {name: getattr(cfg, name) for name in ("dataset", "data_dir", "size", "tokenizer", "cell", "vae")}
        raise UserError(f"there are no latents {path}; make them: {SCRIPT}.py --encode "
                        + " ".join(f"--{name} {value}" for name, value in given.items() if value))
    except ValueError as error:
        raise UserError(f"{path}.json is damaged ({error}); delete it and {path}, and encode again")


def load_latents(cfg, train):
    """Latents float16 (N, 2, C, h, w) of the training or test images and their mirror images, mapped from the file that
    --encode made, and labels int64 (N,). What is not of these images and this tokenizer is refused."""
    path = latents_path(cfg, train)
    if cfg.tokenizer == "unshuffle" and not path.exists():
        for split in (True, train):
            if not latents_path(cfg, split).exists():
                encode(cfg, split, torch.device("cpu"))
    facts, home = read_facts(cfg, train), latents_path(cfg, True)
    if cfg.tokenizer == "vavae" and train:
        find_vae(cfg)       # needed when samples are drawn: better now than in an hour
    shape, again = (len(facts["labels"]), 2, *latent_shape(cfg)), f"delete {home} and what lies beside it, encode again"
    if not path.exists() or path.stat().st_size != 2 * math.prod(shape):
        raise UserError(f"{path} is truncated: {path.stat().st_size if path.exists() else 0} of {2 * math.prod(shape)} "
                        f"bytes; {again}")
    known = cfg.tokenizer == "unshuffle" or Path(cfg.vae or Path(cfg.data_dir, VAVAE)).is_file()
    if known and facts["facts"]["tokenizer"] != tokenizer_hash(cfg):
        raise UserError(f"{path} was made by another tokenizer ({facts['facts']['tokenizer']}, now "
                        f"{tokenizer_hash(cfg)}); {again}, or name the right one with --vae")
    try:
        listing = list_images(cfg, train)[2]
    except UserError:       # without the images there is nothing to compare
        listing = facts["facts"]["images"]
    if facts["facts"]["images"] != listing:
        raise UserError(f"{path} was made of other images than are in --data_dir {cfg.data_dir} now; {again}")
    if any(facts[name] != read_facts(cfg, True)[name] for name in ("mean", "std")):
        raise UserError(f"{path} is normalised otherwise than {home}; {again}")
    if not cfg.uncond and cfg.classes and max(facts["labels"]) >= cfg.classes:
        raise UserError(f"--classes {cfg.classes}: {path} has {max(facts['labels']) + 1}")
    return torch.from_numpy(np.memmap(path, np.float16, "c", shape=shape)), torch.tensor(facts["labels"])


def to_float(images):   # uint8 -> float32 in [-1, 1]
    return images.float() / 127.5 - 1


def to_uint8(x):        # and back: rounded to the nearest, clipped
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


# ---- 3. Backbone: Lightning-DiT (Yao et al. 2025, Table 9) with the official parameter names -------------------------

class TimestepEmbedder(nn.Module):
    """Times t (B,) in [0, 1] -> 256 sinusoids, cosines first -> linear, SiLU, linear -> (B, D)."""

    def __init__(self, D):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, t):
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


def rotate(x, turn):
    """RoPE: each pair of neighbouring channels of x (B, heads, N, d), as a complex number, is turned by the angle of
    its position: turn (N, d/2) = exp(i angle)."""
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(-2)


class DiTAttention(nn.Module):
    def __init__(self, D, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x, turn):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)      # each (B, heads, N, D/heads)
        q, k = rotate(q, turn).to(v.dtype), rotate(k, turn).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        return self.dropout(self.proj(x))


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
    """A pre-norm Transformer block; c, the conditioning, shifts, scales and gates what attention and MLP do."""

    def __init__(self, D, heads, dropout):
        super().__init__()
        self.norm1 = nn.RMSNorm(D, eps=1e-6)
        self.norm2 = nn.RMSNorm(D, eps=1e-6)
        self.attn = DiTAttention(D, heads, dropout)
        self.mlp = SwiGLU(D, int(2 / 3 * 4 * D), dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c, turn):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)   # (B, 1, D)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, turn)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, D, C):
        super().__init__()
        self.norm_final = nn.RMSNorm(D, eps=1e-6)
        self.linear = nn.Linear(D, C)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """A token for each position of the latents; c, of time and class, conditions all blocks (UNets: e). Those after
    cfg.layer are conditioned on its features as well."""
    sizes = {  # blocks, width, heads
        "dit_tiny": (6, 160, 4), "dit_b": (12, 768, 12), "dit_l": (24, 1024, 16), "dit_xl": (28, 1152, 16),
    }

    def __init__(self, cfg):
        super().__init__()
        (depth, D, heads), (C, S, _) = self.sizes[cfg.backbone], latent_shape(cfg)
        self.shape, self.tap, self.D, self.E = (C, S, S), cfg.layer, D, D
        self.null = None if cfg.uncond else cfg.classes or DATASETS[cfg.dataset][2]     # one more class: not told
        if self.null == 0:
            raise UserError(f"--classes 0: say how many classes --data_dir {cfg.data_dir} has, or --uncond")
        self.pos_embed = nn.Parameter(self.positions(S, D), requires_grad=False)
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(C, D, 1)
        self.t_embedder = TimestepEmbedder(D)
        if self.null:
            self.y_embedder = nn.Module()
            self.y_embedder.embedding_table = nn.Embedding(self.null + 1, D)
        self.feat_rope = nn.Module()
        rows, columns = (a.flatten() for a in torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij"))
        powers = torch.arange(D // heads // 4) * 4 / (D // heads)                   # (d/4,), d = D / heads
        angles = torch.cat([place[:, None] * 10000 ** -powers for place in (rows, columns)], dim=1)     # (N, d/2)
        self.feat_rope.register_buffer("freqs_cos", angles.cos().repeat_interleave(2, dim=1))       # (N, D/heads)
        self.feat_rope.register_buffer("freqs_sin", angles.sin().repeat_interleave(2, dim=1))
        self.blocks = nn.ModuleList(DiTBlock(D, heads, cfg.dropout) for _ in range(depth))
        self.final_layer = FinalLayer(D, C)
        if cfg.aug:
            self.aug_emb = nn.Linear(2, D, bias=False)
        self.sc_layer = int(cfg.layer[6:]) if cfg.self_cond != "none" else None     # [SC] k of block_k, Table 10
        if self.sc_layer:                                                           # [SC]
            self.sc_proj = nn.Linear(D, D)                                          # [SC] W
        self.sc_time = TimestepEmbedder(D) if cfg.self_cond == "adaptive" else None     # [SC] s(t)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))                   # a view: convolutions as matrices
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and ("embedder" in name or name.startswith("sc_time")):
                nn.init.normal_(weight, std=0.02)
        for module in (*self.blocks, self.final_layer):     # at first every block does nothing, and the output is 0
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        mean, std = latent_statistics(cfg)                  # of channels: latents are normalised by them
        self.register_buffer("latent_mean", mean.view(-1, 1, 1))
        self.register_buffer("latent_std", std.view(-1, 1, 1))

    @staticmethod
    def positions(S, D):
        """The fixed embedding of S x S positions, (1, S * S, D): half of the channels for columns, half for rows."""
        angles = torch.arange(S)[:, None] * 10000 ** -(torch.arange(D // 4, dtype=torch.float64) / (D // 4))
        place = torch.cat([angles.sin(), angles.cos()], dim=1)                      # (S, D/2)
        return torch.cat([place.repeat(S, 1), place.repeat_interleave(S, dim=0)], dim=1)[None].float()

    @staticmethod
    def choices(cfg):
        """The values that some fields may take, given the others."""
        layers = [f"block_{k}" for k in range(1, DiT.sizes[cfg.backbone][0] + 1)]
        cells = [cell for cell in range(1, cfg.size + 1) if cfg.size % cell == 0]
        cells = [16] * (16 in cells) if cfg.tokenizer == "vavae" else cells
        if not cells:
            raise UserError(f"--size {cfg.size}: must be a multiple of 16 for VA-VAE")
        if cfg.classes and DATASETS[cfg.dataset][2]:
            raise UserError(f"--classes {cfg.classes}: goes with --dataset folder; {cfg.dataset} has "
                            f"{DATASETS[cfg.dataset][2]}")
        if cfg.class_drop == 0 and not cfg.uncond:
            raise UserError("--class_drop 0: nothing would be learned without a class, which features are; use 0.1")
        idle = [f for f in ("guidance", "guide_until", "class_drop") if getattr(cfg, f) != getattr(Config, f)]
        if idle and cfg.uncond:
            raise UserError(f"--{idle[0]} {getattr(cfg, idle[0])}: does nothing with --uncond")
        if cfg.vae and cfg.tokenizer != "vavae":
            raise UserError(f"--vae {cfg.vae}: does nothing with --tokenizer {cfg.tokenizer}")
        return dict(tokenizer=("vavae", "unshuffle"), cell=cells, self_cond=("adaptive", "add", "none"), layer=layers)

    def embed_time(self, t):
        return self.t_embedder(t)                                                   # (B, D)

    def forward(self, x, t, y=None, tap=False, last=None, place=None):
        """x (B, C, S, S), t (B,) -> prediction (B, C, S, S). y: classes (B,), -1 or None where not known, or a tuple of
        them and the shifts (B, 2) of a crop. With `tap`: prediction, and the pooled feature that is contrasted, (B, D)
        float32. With the name of a layer as `last`: the pooled features of all layers up to it, {name: (B, D)
        float32}; the rest is not computed. With place (B,) in [0, 1), these include token_k: one position."""
        y, shift = y if isinstance(y, tuple) else (y, None)
        y = None if last else y     # features are never told the class, neither the probe's nor the teacher's
        c = self.t_embedder(t)                                                      # (B, D), the conditioning
        if self.null:
            y = torch.full(t.shape, self.null, device=t.device) if y is None else torch.where(y < 0, self.null, y)
            c = c + self.y_embedder.embedding_table(y)
        if shift is not None:
            c = c + self.aug_emb(shift)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed     # (B, N, D)
        turn = torch.complex(self.feat_rope.freqs_cos, self.feat_rope.freqs_sin)[:, ::2]    # one of each pair
        feats = {}
        for k, block in enumerate(self.blocks, 1):
            h = block(h, c, turn)
            if last or (tap and f"block_{k}" == self.tap):
                feats[f"block_{k}"] = h.float().mean(dim=1)                         # (B, D)
            if place is not None:
                feats[f"token_{k}"] = h[range(len(h)), (place * h.shape[1]).long()].float()
            if last in feats:
                return feats
            if k == self.sc_layer:                                                  # [SC] what the image is about:
                f = h.mean(dim=1)                                                   # [SC] (B, D), Sec. 4.1
                s = self.sc_time(t) if self.sc_time else 1                          # [SC] (B, D); 1 is `add`, Table 7a
                c = c + s * self.sc_proj(f)                                         # [SC] (B, D) for all later blocks
        prediction = self.final_layer(h, c).transpose(1, 2).reshape(x.shape)
        return (prediction, feats[self.tap]) if tap else prediction

    def from_official(self, state):
        """LightningDiT's weights for our clock. Its time is 1 - t and its prediction -v: the signs of the last layer
        change, and cos((1 - t) f) and sin((1 - t) f) are linear in cos(t f) and sin(t f)."""
        if "latent_mean" in state:      # ours
            return state
        state = {k.removeprefix("module."): v.clone() for k, v in state.get("ema", state.get("model", state)).items()}
        f = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        W = state["t_embedder.mlp.0.weight"]
        turned = [W[:, :128] * f.cos() + W[:, 128:] * f.sin(), W[:, :128] * f.sin() - W[:, 128:] * f.cos()]
        state["t_embedder.mlp.0.weight"] = torch.cat(turned, dim=1)
        for name in ("weight", "bias"):
            state[f"final_layer.linear.{name}"] = -state[f"final_layer.linear.{name}"]
        return {**state, "latent_mean": self.latent_mean, "latent_std": self.latent_std}


def latent_statistics(cfg):
    """Mean and standard deviation of each channel of the training latents; 0 and 1 where there are none yet: then a
    checkpoint will tell."""
    path, C = latents_path(cfg, True), latent_shape(cfg)[0]
    facts = read_facts(cfg, True) if path.with_name(f"{path.name}.json").exists() else {}
    return torch.tensor(facts.get("mean", [0.0] * C)), torch.tensor(facts.get("std", [1.0] * C))


# ---- 4. Formulation: rectified flow on latents (Table 8) -------------------------------------------------------------

class LatentRF:
    """Forward process, loss and sampler. Times lie in [0, 1], t = 0 is the data (in LightningDiT's code, t = 1)."""
    probe_times = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)                            # the grid of probe.py
    quartiles = (0.3375, 0.5, 0.6625)                                               # of the training times, for the log
    limits = dict(nfe=(1, 1000), t_probe=(0, 1), shift=(0.01, 100), guidance=(0, 100), guide_until=(0, 1),
                  class_drop=(0, 1), classes=(0, 2**15))

    def __init__(self, cfg):
        self.steps, self.nfe, self.shift = cfg.nfe, cfg.nfe, cfg.shift
        self.guidance, self.guide_until = cfg.guidance, cfg.guide_until

    def draw_t(self, n, generator):
        """Training times of n images: logit-normal ("lognorm" in Table 8), the sigmoid of N(0, 1): float32 (n,)."""
        return torch.randn(n, generator=generator, device=generator.device).sigmoid()

    def add_noise(self, x, t, noise):
        """x_t = (1 - t) x_0 + t eps, Eq. (1). x and noise (B, C, H, W), t (B,)."""
        return (1 - t).view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1) * noise

    def inputs(self, x_t, t):
        """What the network is given for the noisy latents x_t at times t."""
        return x_t, t

    def loss(self, net, x, t, noise):
        """|| v_theta(x_t, t) - (eps - x_0) ||^2, the mean over channels and positions, and 1 - their cosine over
        channels, the mean over positions: (B,) float32. The second is LightningDiT's, on which the paper builds."""
        v = net(*self.inputs(self.add_noise(x, t, noise), t)).float()
        # At first v is exactly 0. There the usual eps, 1e-8, makes gradients so large that fp16 overflows every time.
        away = 1 - F.cosine_similarity(v, noise - x, dim=1, eps=0.1)                # (B, H, W)
        return (v - (noise - x)).square().mean(dim=(1, 2, 3)) + away.mean(dim=(1, 2))

    def times(self):
        """The sampler's times from 1 to 0: evenly spaced s, mapped to t = shift s / (1 + (shift - 1) s), which for
        shift > 1 puts more of them near the noise (Esser et al. 2024)."""
        s = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        return (self.shift * s / (1 + (self.shift - 1) * s)).tolist()

    @torch.no_grad()
    def sample(self, net, noise, y=None, null=None):
        """Euler's method from t = 1 to 0: noise (B, C, H, W) ~ N(0, I) -> latents. With classes y (B,), and `null`
        for "not told": guided, v = v_null + guidance (v_y - v_null) in all channels, for t <= guide_until (Table 8)."""
        x, times = noise, self.times()
        for t, s in zip(times, times[1:]):
            at = torch.full((len(x),), t, device=x.device)
            if y is None or self.guidance == 1 or t > self.guide_until:
                v = net(*self.inputs(x, at), *([] if y is None else [y])).float()
            else:
                both = torch.cat([y, torch.full_like(y, null)])
                v_y, v_null = net(*self.inputs(x.repeat(2, 1, 1, 1), at.repeat(2)), both).float().chunk(2)
                v = v_null + self.guidance * (v_y - v_null)
            x = x + (s - t) * v
        return x


# ---- 5. Views: the mirrored latent, and a shifted crop of it ---------------------------------------------------------

def draw_latent_view(cfg, generator):
    """What makes a view of each image of a global batch: {name: (batch,) or (batch, 2)} on the CPU. A latent cannot be
    mirrored, as an image can: the latent of the mirrored image is read instead. Shifts are up to an eighth."""
    n, far = cfg.batch, max(1, cfg.size // cfg.cell // 8)
    view = dict(flip=torch.rand(n, generator=generator) < 0.5 * cfg.flip,
                told=torch.rand(n, generator=generator) >= cfg.class_drop)
    if cfg.aug:
        shift = torch.randint(-far, far + 1, (n, 2), generator=generator)
        view["shift"] = shift * (torch.rand(n, 1, generator=generator) < cfg.aug)
    return view


def make_latent_view(latents, classes, view):
    """Latents (B, 2, C, S, S) as seen in a view: float32 (B, C, S, S); and what the network is told, the classes (B,),
    -1 where it is not, and the shifts (B, 2), if there are any. A crop goes on beyond the border by reflection."""
    rows, S = torch.arange(len(latents), device=latents.device), latents.shape[-1]
    x = latents[rows, view["flip"].long().to(latents.device)].float()
    y = None if classes is None else torch.where(view["told"].to(classes.device), classes, -1)
    if "shift" not in view:
        return x, y
    shift = view["shift"].to(x.device)
    place = torch.arange(S, device=x.device) - shift[:, :, None]                    # (B, 2, S)
    place = (S - 1) - ((S - 1) - place.abs()).abs()
    x = x[rows[:, None, None], :, place[:, 0, :, None], place[:, 1, None]].permute(0, 3, 1, 2)
    return x, (y, shift.float())


def draw_from_latents(net, cfg, seeds):
    """Images uint8 (n, C, S, S) and the number of network evaluations for each, (n,), on the network's device. The
    noise of each comes from a CPU generator of its own, and its class is the seed modulo the number of classes."""
    device, diffusion = next(net.parameters()).device, Diffusion(cfg)
    noise = torch.stack([torch.randn(net.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    y = torch.tensor([seed % net.null for seed in seeds], device=device) if net.null else None
    with autocast(cfg, device):
        x = diffusion.sample(net, noise.to(device), y, net.null)
    images = to_images(cfg, x * net.latent_std + net.latent_mean)
    # Evaluations as Table 8 counts them: one with guidance computes twice, with the class and without.
    return images, torch.full((len(x),), float(diffusion.nfe), device=device)


SCRIPT, Backbone, Diffusion, Weighting = "dit_latent_sc", DiT, LatentRF, None     # what this script is made of
load_data, draw_view, make_view, draw_images = load_latents, draw_latent_view, make_latent_view, draw_from_latents


# ---- 6. Contrastive self-distillation (Sec. 4.2): MoCo v3 with the averaged network  [same text in every script] -----

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


class SumOverProcesses(torch.autograd.Function):
    """The sum over processes. All their losses depend on it, so its gradient is summed as well: backward = forward."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class BatchNorm(nn.Module):
    """Batch normalisation (B, D) -> (B, D), float32, over the batches of all processes, with gradients: N compute what
    one does (nn.SyncBatchNorm needs GPUs). In eval mode too, as MoCo v3's teacher: there are no running averages."""

    def __init__(self, D, affine=True):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.full((D,), v)) if affine else v for v in (1.0, 0.0))

    def forward(self, x):
        def mean(x):
            x = x.mean(dim=0)
            return SumOverProcesses.apply(x) / WORLD if WORLD > 1 else x
        x = x.float() - mean(x.float())
        return x * (mean(x.square()) + 1e-5).rsqrt() * self.weight + self.bias


def mlp(*widths):
    """Linear, BatchNorm, ReLU, ... Linear, BatchNorm without weights: as the heads of MoCo v3 (Chen et al. 2021)."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b, bias=False), BatchNorm(b), nn.ReLU()]
    return nn.Sequential(*layers[:-2], BatchNorm(widths[-1], affine=False))


class Projector(nn.Module):
    """MoCo v3's projector (B, D) -> (B, 256). Given E, the width of a time embedding, it knows the time (Table 7b):
    queries come from all noise levels and keys from one, so how a feature is to be read depends on t."""

    def __init__(self, D, hidden, E):
        super().__init__()
        self.time = nn.Linear(E, D) if E else None
        self.mlp = mlp(D, hidden, hidden, 256)

    def forward(self, f, e):
        return self.mlp(f + self.time(e) if self.time else f)


def info_nce(q, k, T=0.2):
    """MoCo v3's loss of queries q (B, D) and the keys k (B * WORLD, D) of all processes, in one direction of two: each
    query is to find its image's key. T: temperature; the factor 2 T undoes 1 / T in the gradient. Always in float32."""
    with torch.autocast(q.device.type, enabled=False):
        logits = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T / T
    return 2 * T * F.cross_entropy(logits, torch.arange(len(q), device=q.device) + len(q) * RANK)


class Learner(nn.Module):
    """All that is trained: the network, and the heads that only training needs. Its forward is the whole loss, so that
    DistributedDataParallel sees one forward per backward. A copy of it, with averaged weights, is what we evaluate
    and, with --cl, the teacher."""

    def __init__(self, net, cfg):
        super().__init__()
        self.net, self.cfg, self.diffusion, self.heads = net, cfg, Diffusion(cfg), nn.ModuleDict()
        if cfg.cl:
            self.heads["projector"] = Projector(net.D, cfg.cl_hidden, net.E if cfg.cl_head == "time" else None)
            self.heads["predictor"] = mlp(256, cfg.cl_hidden, 256)
        if cfg.aug and Weighting:
            self.heads["weighting"] = Weighting()

    def forward(self, x_0, labels, t, noise, keys):
        """A view x_0 and `labels`, what the network is told of it; times, noise, the other view's keys -> the scalar to
        minimise; and for the log, unweighted, (10,): the diffusion loss, the contrastive loss, and for the quarters of
        the training times four sums of losses and four counts of images."""
        seen = {}

        def net(x, c):      # Diffusion.loss calls this; the feature and c are kept for the heads
            prediction, seen["f"] = self.net(x, c, labels, tap=True)
            seen["c"] = c
            return prediction
        loss = weighted = self.diffusion.loss(net, x_0, t, noise)                   # (B,)
        contrast = loss.new_zeros(())
        if "weighting" in self.heads:
            weighted = self.heads["weighting"](loss, seen["c"])
        if self.cfg.cl:
            q = self.heads["predictor"](self.heads["projector"](seen["f"], self.net.embed_time(seen["c"])))
            contrast = info_nce(q, keys)
        quarter = F.one_hot(sum((t > limit).long() for limit in self.diffusion.quartiles), 4)       # (B, 4)
        sums = (loss[:, None] * quarter).sum(dim=0)
        parts = torch.cat([torch.stack([loss.mean(), contrast]), sums, quarter.sum(dim=0)])
        return weighted.mean() + self.cfg.cl * contrast, parts.detach()

    @torch.no_grad()
    def keys(self, x_0, labels, noise):
        """The teacher's part, called on the averaged copy: features of the other view at the time where they classify
        best (Tables 7c, 10), projected, of all processes: (B * WORLD, 256). The network stops at the layer it needs."""
        low = self.diffusion.limits["t_probe"][0]
        t = torch.full((len(x_0),), low if self.cfg.cl_target == "min" else self.cfg.t_probe, device=x_0.device)
        x_t, c = self.diffusion.inputs(self.diffusion.add_noise(x_0, t, noise), t)
        f = self.net(x_t, c, labels, last=self.net.tap)[self.net.tap]
        k = self.heads["projector"](f, self.net.embed_time(c))
        parts = [torch.empty_like(k) for _ in range(WORLD)]
        if WORLD > 1:
            dist.all_gather(parts, k)
        return torch.cat(parts) if WORLD > 1 else k


# ---- 7. Plumbing: randomness, processes, precision, files  [same text in every script] -------------------------------

def rng(*key, device="cpu"):
    """A generator whose stream is a function of the integers `key`; the third tells uses apart. They are hashed: CPU
    generators keep only the low 32 bits of a seed, so sums or shifts of keys would collide."""
    return torch.Generator(device).manual_seed(int(hashlib.sha256(str(key).encode()).hexdigest()[:8], 16))


@functools.lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return torch.randperm(n, generator=rng(seed, epoch, 1))


def batch_indices(n, batch, seed, step):
    """Which of n images form the global batch of a step, int64 (batch,). Shuffled epochs, laid end to end, are cut into
    batches: each image comes once an epoch, none is dropped, and the step is all a resumed run needs."""
    place = torch.arange(step * batch, (step + 1) * batch)
    return torch.cat([epoch_order(n, seed, e)[place[place // n == e] % n] for e in (place // n).unique().tolist()])


def read_batches(images, classes, cfg, step, own, device):
    """From a step on, the images and classes of this process's part of each global batch, on the device. If the images
    are not there, a thread reads one step ahead, as they may come from a disk."""
    def read(step):
        rows = batch_indices(len(images), cfg.batch, cfg.seed, step)[own]
        x = images[rows.to(images.device, non_blocking=images.is_cuda)]
        return x.pin_memory() if device.type == "cuda" and not x.is_cuda else x, classes[rows]
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        ahead = None
        while True:
            batch = ahead.result() if ahead else read(step)
            step += 1
            ahead = reader.submit(read, step) if images.device.type != device.type else None
            yield tuple(part.to(device, non_blocking=device.type == "cuda") for part in batch)


def start(cfg):
    """The device of this process. Joins the other processes, if torchrun started several."""
    kind = cfg.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind != "cpu" and not getattr(torch, kind).is_available():
        raise UserError(f"--device {kind}: this machine has none; use --device cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind != "cpu" and here > getattr(torch, kind).device_count():
        raise UserError(f"--device {kind}: {here} processes for {getattr(torch, kind).device_count()}; give torchrun "
                        "--nproc_per_node as many, or use --device cpu")
    device = torch.device(kind, LOCAL_RANK) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" and dist.is_nccl_available() else "gloo")
    return device


@contextlib.contextmanager
def one_process_first():
    """The first process of each machine runs the block (it may decode all of ImageNet) before the others do."""
    if WORLD > 1:       # NCCL's first barrier gives up after ten minutes, whatever timeout is set
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=6))
        if LOCAL_RANK > 0:
            dist.barrier(group)
    yield
    if WORLD > 1:
        if LOCAL_RANK == 0:
            dist.barrier(group)


def autocast(cfg, device):
    """Matrix products in bf16 where the GPU has it, as that needs no loss scaling; else fp16. Weights stay float32."""
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(cfg.amp, torch.float32)
    if cfg.amp == "auto" and device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_optimizer(net, cfg):
    """AdamW, without decay for biases and positions but with it for [CLS] (Appendix A)."""
    decayed, free = [], []
    for name, p in net.named_parameters():
        (free if name.endswith(("bias", "pos_embed")) else decayed).append(p)
    groups = [dict(params=decayed, weight_decay=cfg.weight_decay), dict(params=free, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)


@torch.no_grad()
def update_ema(ema, net, rate, n, ramp=True):
    """Averages the weights after the n-th step, n = 1, 2, ..., and copies buffers. With `ramp` the rate is at most
    1 - n^(-2/3), as by ema_pytorch in the authors' DDAE code: the first call copies, short runs forget their random
    start, and the 0.9999 of Table 8 is reached only after a million steps; after 100,000 the rate is 0.9995."""
    if ramp:
        rate = min(rate, 1 - n ** (-2 / 3))
    # ema = rate ema + (1 - rate) net
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - rate)
    for mean, now in zip(ema.buffers(), net.buffers()):
        mean.copy_(now)


def write_checkpoint(path, **contents):
    """Plain types and tensors in one file, replaced in one go: a crash leaves the old file or the new, never a part."""
    if not all_finite(contents):
        raise UserError(f"numbers that are not finite at step {contents['step']}: {path.parent} is left as last saved")
    part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:        # torch.save turns an OSError into a RuntimeError
        raise UserError(f"{path} cannot be written ({error.__context__ or error}); is the disk full?")
    finally:
        part.unlink(missing_ok=True)


def all_finite(value):
    """Whether all tensors in nested dicts and lists are finite."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return all(map(all_finite, parts))


def read_checkpoint(path):
    """The contents of a checkpoint, on the CPU. Code in it is refused, not run."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a run folder has last.pt and ckpt_EPOCH.pt")
    try:
        if zipfile.is_zipfile(path):        # torch.load ignores wrong checksums of weights
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise ValueError(f"wrong checksum of {bad}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # torch.load fails in many ways on damaged files
        raise UserError(f"{path} is damaged or no checkpoint ({(str(error) or repr(error)).splitlines()[0]})")


def save_grid(images, path, columns=10):
    """Images uint8 (n, C, H, W) as one PNG, small ones enlarged."""
    zoom = max(1, 64 // images.shape[2])
    images = images.expand(-1, 3, -1, -1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    images = F.pad(images, (1, 1, 1, 1), value=255)
    images = torch.cat([images, images.new_full((-len(images) % columns, *images.shape[1:]), 255)])
    grid = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray(grid.contiguous().numpy()).save(path)


def save_loss_plot(log, path):
    """The logged losses over steps, on a logarithmic axis, averaged over 2 % of the lines."""
    log = [line for line in log if line["loss"]] or [dict(step=1, loss=1)]
    window = max(1, len(log) // 50)
    loss = np.convolve(np.log10([line["loss"] for line in log]), np.ones(window) / window, "valid")
    low, span, end = loss.min(), max(np.ptp(loss), 1e-3), log[-1]["step"]
    draw = ImageDraw.Draw(image := Image.new("RGB", (640, 400), "white"))
    for i in range(5):
        draw.line([(60, 340 - 80 * i), (620, 340 - 80 * i)], fill="#dddddd")
        draw.text((10, 334 - 80 * i), f"{10 ** (low + span * i / 4):.4f}", fill="black")
        draw.text((50 + 140 * i, 350), f"{end * i // 4}", fill="black")
    draw.text((300, 375), "loss / step", fill="black")
    curve = [(60 + 560 * line["step"] / end, 340 - 320 * (v - low) / span) for line, v in zip(log[window - 1:], loss)]
    draw.line(curve, fill="#c03030", width=2)
    image.save(path)


# ---- 8. Training  [same text in every script] ------------------------------------------------------------------------

# What may change in mid-run; accum may not with --cl, which compares the images of one forward pass.
FREE = "data_dir skip_bad vae out init epochs steps accum device compile save_every sample_every".split()


def claim(out, stack):
    """Makes the run folder and locks it until the stack closes or the process ends, however it ends: two runs in one
    folder would mix their states. The first process does so and gets the log, open for appending; the others wait."""
    journal = None
    if RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        journal = stack.enter_context(open(out / "log.jsonl", "a"))
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out {out} is being written by another run; wait for its end, or choose another folder")
        except OSError as error:
            print(f"note: {out} cannot be locked ({error}): see that no other run uses it", file=sys.stderr)
        for stale in out.glob(".*.part"):       # left by a process that was killed
            stale.unlink(missing_ok=True)
    if WORLD > 1:
        dist.barrier()      # nobody reads before the folder is ours
    return journal


def restore(path, cfg, parts):
    """Loads the state of a run into its parts and returns its step. Other settings than it began with are refused."""
    state = read_checkpoint(path)
    try:
        defaults = {f.name: f.default for f in dataclasses.fields(cfg)}     # of fields that are newer than the file
        there, here = {**defaults, **state["config"], "script": state["script"]}, {**vars(cfg), "script": SCRIPT}
        free = {*FREE} - ({"accum"} if cfg.cl else set())
        if other := [f"{k} ({there[k]} there, {v} now)" for k, v in here.items() if k not in free and there[k] != v]:
            raise UserError(f"--out {cfg.out} holds a run with other settings: {', '.join(other)}; choose another "
                            f"folder; --init {path} starts one anew from its averaged weights")
        for name, part in parts.items():
            if state[name] or name != "scaler":         # a loss scaler that was off has no state
                part.load_state_dict(state[name])
        if not all_finite(state) or not isinstance(state["step"], int):
            raise UserError(f"{path} has numbers that are not finite, or no step; move it away to start anew")
        return state["step"]
    except UserError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no state of this run ({error!r:.300}); move it away to start anew")


def resume(out, cfg, parts):
    """The step at which a run goes on: that of last.pt, whose state is loaded into the parts, or 0."""
    step = restore(out / "last.pt", cfg, parts) if (out / "last.pt").exists() else 0
    if WORLD > 1:
        steps = [step] * WORLD
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise UserError(f"--out {out}: processes find states of steps {min(steps)} and {max(steps)} there; it must "
                            "be one folder that all machines see")
    return step


def read_log(path, step):
    """The lines of a log up to a step, and how many bytes they take: what comes later is done again."""
    log, size = [], 0
    for line in open(path, "rb") if path.exists() else []:
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, LookupError, TypeError):        # a crash of the machine may leave anything
            break
        log.append(json.loads(line))
        size += len(line)
    return log, size


def train(cfg):
    """Trains to the end, from last.pt in the run folder if it is there. Returns 0, or the signal that ended the run."""
    with contextlib.ExitStack() as stack:       # closes the log, and gives the signals back, whatever ends the run
        return run(cfg, stack)


def run(cfg, stack):
    """The whole training, from top to bottom.

    Every process draws the random numbers of the *global* batch from (seed, step) and uses its own slice of them: so a
    resumed run equals an unbroken one, and one process with 8 images and two with 4 give the same losses (but for the
    masks of dropout, which each draws for its own images).
    """
    device, out, diffusion = start(cfg), Path(cfg.out), Diffusion(cfg)
    share, rest = divmod(cfg.batch, WORLD * cfg.accum)          # images per forward pass
    if rest:
        raise UserError(f"--batch {cfg.batch} does not divide by {WORLD} processes x --accum {cfg.accum}; "
                        f"use {cfg.batch - rest + WORLD * cfg.accum}")
    if cfg.cl and share * WORLD < 2:
        raise UserError(f"--cl {cfg.cl}: needs at least two images in a forward pass; use a smaller --accum")
    with one_process_first():
        images, classes = load_data(cfg, train=True)
    N = len(images)
    if images.nbytes < 4e9:     # all of CIFAR takes 0.2 GB, ImageNet100 at 64 x 64 takes 1.6 GB
        images = images.to(device)
    total = cfg.steps or math.ceil(cfg.epochs * N / cfg.batch)

    # The state of the run, and where it stands.
    torch.manual_seed(cfg.seed)
    learner = Learner(build_net(cfg), cfg).to(device).train()
    if cfg.init and not (out / "last.pt").exists():
        kept = {name: buffer.clone() for name, buffer in learner.net.named_buffers()}   # what latents are normalised by
        load_weights(learner.net, cfg.init)
        learner.net.load_state_dict(kept, strict=False)
        print(f"starting from all {len(learner.net.state_dict())} tensors of {cfg.init}")
    ema = copy.deepcopy(learner).eval().requires_grad_(False)           # its average over the steps: teacher and result
    optimizer, context = make_optimizer(learner, cfg), autocast(cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=context.fast_dtype == torch.float16)
    parts = dict(model=learner.net, ema=ema.net, heads=learner.heads, ema_heads=ema.heads, optimizer=optimizer,
                 scaler=scaler)
    journal = claim(out, stack)
    step = resume(out, cfg, parts)
    log, size = read_log(out / "log.jsonl", step)
    if cfg.compile:
        learner.net.compile()
    model = learner
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if RANK == 0:
        journal.truncate(size)
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
        print(f"{out}: {N} images {tuple(images.shape[-3:])}, {sum(p.numel() for p in learner.net.parameters()):,} "
              f"parameters, {total} steps of {cfg.batch}, {WORLD} x {device.type}, {context.fast_dtype}", flush=True)
        if step:
            print(f"resumed at step {step}", flush=True)

    def save(name, **some):
        if RANK == 0:       # every process has the same state: one writes, none waits
            write_checkpoint(out / name, script=SCRIPT, config=dataclasses.asdict(cfg), step=step,
                             **{k: part.state_dict() for k, part in some.items()})

    def due(every):         # whether this step ends a multiple of `every` epochs, or the run
        return step == total or step * cfg.batch // (every * N) > (step - 1) * cfg.batch // (every * N)

    told, leave = [], 0     # Ctrl-C or a scheduler: the signal we got, and the one that all processes agreed to obey
    for number in signal.SIGINT, signal.SIGTERM:
        stack.callback(signal.signal, number, signal.signal(number, lambda number, frame: told.append(number)))
    bad = torch.zeros((), device=device)        # steps in a row without a finite gradient
    window = torch.zeros(11, device=device)     # steps since the last log line, and sums of Learner's numbers
    own = slice(RANK * cfg.accum * share, (RANK + 1) * cfg.accum * share)      # what of a batch this process does
    batches = read_batches(images, classes, cfg, step, own, device)
    saved = logged = time.time()
    bar = stack.enter_context(tqdm(total=total, initial=step, unit="step", disable=RANK > 0,
                                   mininterval=0.2 if sys.stderr.isatty() else 20))
    while step < total and not leave:
        # 1. All that is random, drawn for the global batch: times, noise, and views of the images.
        (x, y), gen, shape = next(batches), rng(cfg.seed, step, 0, device=device), (cfg.batch, *images.shape[-3:])
        t = diffusion.draw_t(cfg.batch, gen)[own]
        noise = torch.randn(shape, generator=gen, device=device)[own]
        view = draw_view(cfg, rng(cfg.seed, step, 3))
        if cfg.cl:
            other_view = draw_view(cfg, rng(cfg.seed, step, 4))
            other_noise = torch.randn(shape, generator=gen, device=device)[own]

        # 2. Gradients of this process's slices, one forward per backward; with the last, DDP averages over processes.
        sums = 0
        for i in range(cfg.accum):
            mine = slice(i * share, (i + 1) * share)
            seen_as = lambda view: make_view(x[mine], y[mine], {name: v[own][mine] for name, v in view.items()})
            x_0, labels = seen_as(view)
            other = seen_as(other_view) if cfg.cl else None
            if cfg.dropout:
                torch.manual_seed(rng(cfg.seed, step, 2, own.start + mine.start).initial_seed())
            with model.no_sync() if WORLD > 1 and i + 1 < cfg.accum else contextlib.nullcontext():
                with context:
                    keys = ema.keys(*other, other_noise[mine]) if cfg.cl else None
                    objective, numbers = model(x_0, labels, t[mine], noise[mine], keys)
                scaler.scale(objective / cfg.accum).backward()
            sums = sums + numbers / cfg.accum

        # 3. The step. One whose gradient is not finite is skipped on the device: the CPU need not wait to look.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        finite = norm.isfinite()
        if not scaler.is_enabled():
            optimizer.found_inf = (~finite).float()             # a fused optimizer reads this, as from GradScaler
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) * cfg.batch / (cfg.warmup * N + 1e-9))
        if device.type != "mps" or finite:                      # MPS's optimizer does not read it
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, learner, cfg.ema, step + 1, cfg.ema_ramp)
        bad = torch.where(finite, 0, bad + 1)
        window += torch.where(finite, torch.cat([sums.new_ones(1), sums]), 0)
        step += 1
        bar.update()

        # 4. The log, every step at first, then every tenth. Only here the CPU waits and processes agree to leave.
        if step <= 50 or step % 10 == 0 or step == total or WORLD == 1 and told:
            leave = torch.tensor(max(told, default=0), device=device)
            if WORLD > 1:
                dist.all_reduce(window)
                dist.all_reduce(leave, dist.ReduceOp.MAX)
            (count, loss, contrast, *quarters), leave, seconds = window.tolist(), int(leave), time.time() - logged
            line = dict(step=step, epoch=round(step * cfg.batch / N, 4), loss=loss / count if count else None,
                        loss_by_time=[a / n if n else None for a, n in zip(quarters[:4], quarters[4:])], lr=group["lr"],
                        grad_norm=norm.item(), images_per_second=round(count / WORLD * cfg.batch / seconds, 1))
            if cfg.cl:
                line["contrast"] = contrast / count if count else None
            log.append(line)
            if RANK == 0:
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                bar.set_postfix_str(f"loss {line['loss'] or math.nan:.4f}, {line['images_per_second']:.0f} images/s")
            if bad >= 10:
                raise UserError(f"no finite gradient in {int(bad)} steps in a row, up to step {step}; they were "
                                f"skipped and {out} left as last saved; start anew from there with a lower "
                                f"--lr or --amp off: --init {out}/last.pt --out FOLDER")
            window.zero_()
            logged = time.time()

        # 5. Files: after some epochs, every ten minutes, and at the end.
        epoch = step * cfg.batch // N
        if due(cfg.save_every):
            save(f"ckpt_{epoch:04d}.pt", ema=ema.net)
        if due(cfg.save_every) or leave or time.time() - saved > 600:
            save("last.pt", **parts)
            saved = time.time()
        if due(cfg.sample_every):
            grid = sample(ema.net, cfg, range(80))                 # drawn by all processes together
            if RANK == 0:
                save_grid(grid, out / f"samples_{epoch:04d}.png")
                save_loss_plot(log, out / "loss.png")
    return leave if step < total else 0


# ---- 9. Interface for probe.py, fid.py and you  [same text in every script] ------------------------------------------

LIMITS = dict(seed=(0, 2**32 - 1), dropout=(0, 0.99), epochs=(1, 10**6), steps=(0, 10**9), batch=(1, 10**6),
              accum=(1, 10**6), size=(8, 1024), lr=(0, 1), warmup=(0, 10**6), beta1=(0, 0.9999), beta2=(0, 0.99999),
              weight_decay=(0, 1), ema=(0, 0.999999), aug=(0, 1), cl=(0, 1), cl_hidden=(1, 2**16),
              save_every=(1, 10**6), sample_every=(1, 10**6))


def make_config(dataset="glyphs", **overrides):
    """The recipe of a data set, with changes. UserError, a ValueError, names what is wrong and what would do."""
    fields = [f.name for f in dataclasses.fields(Config)]
    if unknown := set(overrides) - set(fields):
        raise UserError(f"unknown field {min(unknown)}; there are {', '.join(fields)}")
    if dataset not in RECIPES:
        raise UserError(f"--dataset {dataset}: unknown; there are {', '.join(RECIPES)}")
    recipe = {**RECIPES[dataset], **overrides}
    backbone = recipe.get("backbone", Config.backbone)
    special = recipe.get(backbone, {}) if backbone in Backbone.sizes else {}
    cfg = Config(dataset, **{k: v for k, v in {**recipe, **special, **overrides}.items() if k in fields})
    cfg.size = cfg.size or DATASETS[dataset][1]
    words = [Path(cfg.data_dir).resolve().name if dataset == "folder" else dataset, cfg.self_cond]
    words += [f"{k}_{overrides[k]}" for k in fields if k in overrides and k not in {*FREE, "self_cond", "seed"}]
    cfg.out = cfg.out or f"runs/{SCRIPT}-{'-'.join(words)}-s{cfg.seed}"
    for f in dataclasses.fields(Config):
        if not isinstance(getattr(cfg, f.name), (int, float) if f.type is float else f.type):
            raise UserError(f"--{f.name} {getattr(cfg, f.name)!r}: must be of type {f.type.__name__}")
    for name, (low, high) in {**LIMITS, **Diffusion.limits}.items():
        if not low <= getattr(cfg, name) <= high:
            raise UserError(f"--{name} {getattr(cfg, name)}: must lie between {low} and {high}")
    for name in ("aug_mask", "cl_head", "cl_target", "cl_feature"):
        switch = name.split("_")[0]
        if getattr(cfg, name, None) != getattr(Config, name, None) and not getattr(cfg, switch):
            raise UserError(f"--{name} {getattr(cfg, name)}: does nothing without --{switch}")
    choices = dict(backbone=Backbone.sizes, cl_head=("time", "plain"), cl_target=("probe", "min"),
                   device=("auto", "cuda", "cpu", "mps"), amp=("auto", "off", "bf16", "fp16"))
    if dataset in ("glyphs", "fashion_mnist", "cifar10", "cifar100"):
        choices |= dict(size=(32, 16) if dataset == "fashion_mnist" else DATASETS[dataset][1:2])
    choices |= Backbone.choices(cfg) if cfg.backbone in Backbone.sizes else {}
    for name, values in choices.items():
        if getattr(cfg, name) not in values:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be one of {', '.join(map(str, values))}")
    return cfg


def build_net(cfg):
    """The network of a config in float32 on the CPU, with random weights from torch's global generator."""
    net = Backbone(cfg)
    net.cfg = cfg
    return net


def load_weights(net, path, weights="ema"):
    """Fills net from a state_dict with the official names or from a checkpoint. Every tensor must be there and fit."""
    state = read_checkpoint(path)
    try:
        if "script" not in state and hasattr(net, "from_official"):
            state = net.from_official(state)
        net.load_state_dict(state.get(weights, state))
    except (RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not fit this network: {' '.join(str(error).split())[:300]}")


def read_config(path, *parts):
    """The config of a checkpoint, which must be of this script and hold these parts."""
    state = read_checkpoint(path)
    if not isinstance(state, dict) or state.get("script") != SCRIPT or not {"config", *parts} <= state.keys():
        raise UserError(f"{path} is no checkpoint of {SCRIPT} with {' and '.join(parts)} weights")
    try:
        return make_config(**state["config"])
    except (UserError, TypeError) as error:
        raise UserError(f"{path} has settings that are none ({error})")


def load_checkpoint(path, weights="ema"):
    """(cfg, net in eval mode) of a checkpoint of this script. weights: 'ema', or 'model', the raw ones (in last.pt)."""
    cfg = read_config(path, weights)
    net = build_net(cfg)
    load_weights(net, path, weights)
    return cfg, net.eval()


@torch.no_grad()
def features(net, x, t, noise, last=None, place=None):
    """Pooled features of images x at time t: {layer: (B, D) float32}, in the order of computation. x (B, C, H, W) in
    [-1, 1]; noise like x; t a number, the formulation's own time; the net stops after the layer `last`. With place
    (B,) in [0, 1), also those of one position of each image, token_k."""
    low, high = Diffusion.limits["t_probe"]
    if not low <= t <= high:
        raise UserError(f"t = {t}: must lie between {low} and {high}; net.cfg.t_probe is {net.cfg.t_probe}")
    diffusion, t = Diffusion(net.cfg), torch.full((len(x),), t, device=x.device)
    last = last or Backbone.choices(net.cfg)["layer"][-1]
    return net(*diffusion.inputs(diffusion.add_noise(x, t, noise), t), last=last, place=place)


def sample(net, cfg, seeds, progress=False):
    """Images uint8 (n, C, S, S) on the CPU. Image i is a function of seeds[i] alone: not of the other seeds, nor of the
    number of processes, which share the work and all get all images. So the net always sees the same number of rows,
    if need be with idle ones: at other sizes other kernels run, which round differently. Sets net.nfe, the mean number
    of network evaluations per image."""
    device, seeds, C, S = next(net.parameters()).device, list(seeds), DATASETS[cfg.dataset][0], cfg.size
    images = torch.zeros(len(seeds), C, S, S, dtype=torch.uint8, device=device)
    evaluations = torch.zeros(len(seeds), device=device)
    mine, group = list(range(RANK, len(seeds), WORLD)), 64 if device.type == "cuda" else 16
    quiet = None if progress and RANK == 0 else True        # None: only where stderr is no terminal
    for i in tqdm(range(0, len(mine), group), desc="sampling", unit=f"{group} images", disable=quiet):
        rows = mine[i:i + group]
        drawn, nfe = draw_images(net, cfg, [seeds[row] for row in rows] + [0] * (group - len(rows)))
        images[rows], evaluations[rows] = drawn[:len(rows)], nfe[:len(rows)]
    if WORLD > 1:
        dist.all_reduce(images)     # the other processes' rows are zero
        dist.all_reduce(evaluations)
    net.nfe = evaluations.mean().item()
    return images.cpu()


# ---- 10. Command line  [same text in every script] -------------------------------------------------------------------

def fail(error):
    """Ends a run for which the user or the machine is to blame: one line, status 2. Our own bugs are raised."""
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError):
        if re.search("out of memory|allocate memory|ALLOC_FAILED", text):
            text = f"out of memory; training needs less with a larger --accum or a smaller --batch ({text[:120]})"
        elif WORLD > 1 and re.search("gloo|nccl|connection", text, re.IGNORECASE):
            text = (f"process {RANK} has lost another one or cannot reach it ({text[:120]}); the same command goes on "
                    "from last.pt, if there is one")
        else:
            raise error
    if LOCAL_RANK == 0 or isinstance(error, (OSError, RuntimeError)):       # others are seen by all processes
        tqdm.write(f"{SCRIPT}: {text}", file=sys.stderr)        # tqdm ends its bar's line first
    if WORLD > 1:       # to leave the group would be to wait for those who wait for this one
        sys.stderr.flush()
        os._exit(2)
    sys.exit(2)


def parse_command_line(argv):
    """Every field of Config is a flag. Returns the fields that were given, and the other options."""
    helps = dict(re.findall(r"^    (\w+): \w+ = .*?# (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    for f in dataclasses.fields(Config):
        kind = dict(type=f.type, metavar=f.type.__name__)
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=helps[f.name].replace("%", "%%"), **kind)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--sample", metavar="CKPT", help="draw images from a checkpoint, for the seeds from --seed on")
    parser.add_argument("--n", "--images", type=int, help="how many (80); torchrun would take --n for its own")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1, cutoff=0.7)
        fail(f"unknown argument {unknown[0]}{f', did you mean {near[0]}?' if near else ';'} --help lists all")
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}, args


def sample_command(given, args):
    """--sample CKPT: a PNG beside the checkpoint."""
    if idle := set(given) - {*"seed nfe tol shift guidance guide_until vae device amp".split()}:
        raise UserError(f"--{min(idle)} does nothing with --sample")
    n = 80 if args.n is None else args.n
    if n < 1:
        raise UserError(f"--n {n}: must be at least 1")
    cfg, net = load_checkpoint(args.sample)
    cfg = make_config(**{**dataclasses.asdict(cfg), "seed": 0, **given})
    net.to(start(cfg))
    images = sample(net, cfg, range(cfg.seed, cfg.seed + n), progress=True)
    if RANK == 0:
        path = f"{Path(args.sample).with_suffix('')}_seeds{cfg.seed}-{cfg.seed + n - 1}.png"
        save_grid(images, path)
        print(f"{path}: {n} images from the ema weights, {net.nfe:g} network evaluations each")


def main(argv=None):
    given, args = parse_command_line(argv)
    try:
        if args.sample:
            return sample_command(given, args)
        if args.n is not None:
            raise UserError("--n goes with --sample")
        cfg = make_config(**given)
        if args.resume:
            settings = dataclasses.asdict(read_config(Path(cfg.out) / "last.pt", "model"))
            cfg = make_config(**{**settings, "out": cfg.out, **given})
        signal_number = train(cfg)
        if RANK == 0:
            tiny = " --detector tiny" * (cfg.dataset in ("glyphs", "fashion_mnist"))    # Inception knows photographs
            print(f"saved {cfg.out}/last.pt; the same command goes on from there" if signal_number else
                  f"done: look at {cfg.out}/samples_*.png and loss.png, then\n"
                  f"  python probe.py {cfg.out}/last.pt\n  python fid.py {cfg.out}/last.pt{tiny}")
        return 128 + signal_number if signal_number else 0
    except (UserError, OSError, RuntimeError) as error:
        fail(error)
    except KeyboardInterrupt:       # while data are read or images drawn; train() has its own way to leave
        print(f"{SCRIPT}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized() and not sys.exc_info()[0]:     # NCCL would wait for the others, and hide the error
            dist.destroy_process_group()


def encode_command(argv):
    """--encode: makes the latents of both splits, with the other flags as for training."""
    given, args = parse_command_line([word for word in argv if word != "--encode"])
    try:
        useful = {*"dataset data_dir size skip_bad tokenizer cell vae device".split()}
        if idle := [name for name in (*given, "resume", "sample", "n") if name not in useful and (
                name in given or getattr(args, name))]:
            raise UserError(f"--{idle[0]} does nothing with --encode")
        cfg = make_config(**given)
        device = start(cfg)
        if WORLD > 1:
            raise UserError("--encode: is the work of one process; start it with python, not torchrun")
        for train in (True, False):
            if latents_path(cfg, train).exists():
                load_latents(cfg, train)
                print(f"{latents_path(cfg, train)} is there already")
            else:
                encode(cfg, train, device)
    except (UserError, OSError, RuntimeError) as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"{SCRIPT}: interrupted; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    try:
        sys.exit(encode_command(sys.argv[1:]) if "--encode" in sys.argv else main())
    except SystemExit as end:
        if WORLD > 1:       # gloo's threads outlive its group, and now and then abort Python when it takes itself apart
            sys.stdout.flush()
            os._exit(end.code or 0)
        raise
