"""DDAE++ with EDM and UNets in pixel space, in one file: data, network, training, sampling, features.

Paper     DDAE++ (arXiv 2505.10999): Sec. 4.1 and Fig. 1(a) self-conditioning, Tables 2-4 results, Tables 8-11 settings.
Idea      A diffusion model learns features that classify well. Hand one of them back to the layers that decode. Here f
          is the best layer's map, averaged over positions; e, which conditions all blocks, becomes e + s(t) * W f after
          it, W a linear layer, s(t) a vector, learned from the same time input as e. [SC] marks the lines.
Cost      460,288 parameters (1.3 % of ddpm, 0.8 % of ddpmpp), 1 to 2 % of a step
Maths     x_t = x_0 + sigma eps                           Eq. (1) with alpha = 1; time is the noise level: t = sigma
          loss = w(sigma) || D_theta(x_t, sigma) - x_0 ||^2, D = c_skip x_t + c_out F_theta(c_in x_t, c_noise)
          sample = Heun's method on Eq. (2), 18 steps     35 network evaluations
Careful   This self-conditioning hands the network its own *features*. The method of the same name in Analog Bits
          (Chen et al. 2022) hands it its previous estimate of x_0: something else.

Run       python edm_sc.py                                                 # glyphs: two CPU cores, 5 minutes
          torchrun --nproc_per_node=4 edm_sc.py --dataset cifar100         # the paper's setting, 35.7M parameters
          torchrun --nproc_per_node=4 edm_sc.py --dataset cifar100 --self_cond none        # its baseline
          torchrun --nproc_per_node=4 edm_sc.py --dataset cifar100 --aug 0.12 --cl 0.01    # Table 3, all of it
          torchrun --nproc_per_node=4 edm_sc.py --dataset cifar100 --backbone ddpmpp       # 56.5M parameters
          python edm_sc.py --sample runs/.../last.pt --n 80                # a grid of images
Expect    Table 2 (2000 epochs, 4 GPUs), FID and accuracy, baseline in brackets:
          CIFAR-10  ddpm 3.30, 91.07 % (3.39, 91.41 %); ddpmpp 2.18, 94.85 % (2.23, 94.83 %)
          CIFAR-100 ddpm 6.01, 65.35 % (6.21, 63.68 %); ddpmpp 3.36, 71.61 % (3.46, 71.09 %)
          README.md: what two CPU cores reach.
"""
import argparse, concurrent.futures, contextlib, copy, dataclasses, datetime, difflib, fcntl, functools, gzip
import hashlib, http.client, inspect, json, math, os, re, signal, sys, tarfile, time, urllib.request, zipfile, zlib
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
    out: str = ""                # run folder; default: runs/SCRIPT-DATASET-SELFCOND-sSEED, with what else was chosen
    init: str = ""               # start from these weights: an official state_dict, or a checkpoint's averaged ones
    seed: int = 0                # all randomness of a step is a function of (seed, step)
    # network
    backbone: str = "ddpm"       # a name in Backbone.sizes (Table 9)
    dropout: float = 0.13        # where the public implementations have it (Table 8); U-ViT has none
    self_cond: str = "adaptive"  # adaptive: e + s(t) W f | add: e + W f (Table 7a) | cls: a token (Fig. 2a) | none
    layer: str = "out_7"         # UNet, DiT: its features condition what follows; all: probed, contrasted (Table 10)
    t_probe: float = 0.06        # best time for the linear probe (Table 10)
    # optimisation
    epochs: int = 2000           # passes over the training images (Table 11)
    steps: int = 0               # if > 0: stop after so many optimizer steps, whatever epochs says
    batch: int = 512             # images per optimizer step, over all processes (Table 11)
    accum: int = 1               # forward passes into which each process divides its share of the batch
    lr: float = 4e-4             # final learning rate, for any number of processes (Table 11)
    warmup: float = 200.0        # epochs of linear warm-up; constant afterwards (Table 11)
    beta1: float = 0.9           # of AdamW: 0.99 in the official U-ViT configuration, 0.9 elsewhere
    beta2: float = 0.999         # of AdamW: 0.95 in LightningDiT, 0.999 elsewhere
    weight_decay: float = 0.0    # of AdamW, but none on biases and positions (Appendix A); with 0, AdamW is Adam
    ema: float = 0.9993          # decay rate of the averaged weights (Table 8)
    ema_ramp: bool = True        # average over fewer steps at first, as DDAE does; LightningDiT does not
    flip: bool = True            # mirror half of the images (Table 11); if not, the augmentation mirrors none either
    # augmentation and contrast (Table 3)
    aug: float = 0.0             # probability of each non-leaky transformation (EDM's is 0.12); latents: shifted crop
    cl: float = 0.0              # weight gamma of the contrastive loss; 0.01 is best (Table 7d)
    cl_head: str = "time"        # projector of features: time: knows the time | plain: as in MoCo v3 (Table 7b)
    cl_target: str = "probe"     # noise of the teacher's images: probe: as at t_probe | min: the least (Table 7c)
    cl_hidden: int = 4096        # hidden units of projector and predictor
    # sampling
    nfe: int = 35                # network evaluations per image (Table 8); RF: 0 for adaptive RK45, else Euler's
    # machine
    device: str = "auto"         # auto | cuda | cpu | mps
    amp: str = "auto"            # auto: bf16, else fp16, on CUDA and float32 elsewhere | off | bf16 | fp16
    compile: bool = False        # torch.compile the network
    save_every: int = 200        # epochs between ckpt_EPOCH.pt; last.pt is also renewed every ten minutes
    sample_every: int = 50       # epochs between samples_EPOCH.png


TINY_UNET = dict(backbone="unet_tiny", dropout=0.0, batch=32, lr=2e-3, warmup=0.5, layer="out_2",
                 cl_hidden=512)
RECIPES = {  # fields of Config by data set; under the name of a backbone, those that differ with it
    "glyphs": dict(TINY_UNET, epochs=4, flip=False, save_every=1, sample_every=4),
    "fashion_mnist": dict(TINY_UNET, epochs=1, save_every=1, sample_every=1),
    "cifar10": dict(ddpmpp=dict(batch=256, layer="out_9")),
    "cifar100": dict(layer="out_6", ddpmpp=dict(batch=256, layer="out_8")),
    # 64 x 64: Table 10 has ddpm alone; ddpmpp takes its layer.
    **dict.fromkeys(("tiny_imagenet", "imagenet100", "imagenet", "folder"),
                    dict(layer="out_5", t_probe=0.2964, ddpmpp=dict(batch=256))),
}
DATASETS = {  # channels, side in pixels, classes (0: as many as there are folders)
    "glyphs": (3, 16, 10), "fashion_mnist": (1, 32, 10), "cifar10": (3, 32, 10), "cifar100": (3, 32, 100),
    "tiny_imagenet": (3, 64, 200), "imagenet100": (3, 64, 100), "imagenet": (3, 64, 1000), "folder": (3, 64, 0),
}


# ---- 2. Data: uint8 images (N, C, H, W) and int64 labels (N,), in memory  [same text in the pixel scripts] -----------

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


CIFAR = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_MIRROR = "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"
FASHION = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
DOWNLOADS = {  # file: MD5 of the published file, then the folders that serve it, in order of trial
    "cifar-10-binary.tar.gz": ("c32a1d4ab5d03f1284b67883e8d87530", CIFAR, CIFAR10_MIRROR),
    "cifar-100-binary.tar.gz": ("03b5dce01913d631647c71ecec9e9cb8", CIFAR),
    "train-images-idx3-ubyte.gz": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", FASHION),
    "train-labels-idx1-ubyte.gz": ("25c81989df183df01b3e8a0aad5dffbe", FASHION),
    "t10k-images-idx3-ubyte.gz": ("bef4ecab320f06d8554ea6380940ec79", FASHION),
    "t10k-labels-idx1-ubyte.gz": ("bb300cfdad3c16e7a12a480ee83cd310", FASHION),
    "tiny-imagenet-200.zip": ("90528d7ca1a48142e341f4ef8d21d0de", "https://cs231n.stanford.edu/"),
}
MOST = 2**28    # no file here has more bytes, packed or unpacked: reading stops there even if the data go on
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


def fetch(name, folder):
    """Path of a file of DOWNLOADS: the one in `folder`, or a download. A download gets its name only when complete and
    of the right hash: later runs can trust what they find. A file put there by hand may differ, and we say so."""
    md5, *mirrors = DOWNLOADS[name]
    path, faults = Path(folder) / name, []
    if path.exists():
        if hashlib.md5(path.read_bytes()).hexdigest() != md5:
            print(f"note: {path} is used, but it is not the published file (MD5 {md5})", file=sys.stderr)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{name}.{os.uname().nodename}.{os.getpid()}.part")
    for url in (mirror + name for mirror in mirrors):
        try:
            with urllib.request.urlopen(url, timeout=30) as reply, open(part, "wb") as file:
                with tqdm.wrapattr(reply, "read", total=reply.length, desc=name, disable=None) as stream:
                    while file.tell() <= MOST and (chunk := stream.read(2**20)):
                        file.write(chunk)
            found = hashlib.md5(part.read_bytes()).hexdigest()
            if found != md5:
                raise OSError(f"{part.stat().st_size} bytes came, with MD5 {found}")
            os.replace(part, path)
            return path
        except (OSError, http.client.HTTPException) as error:
            faults.append(f"{url}: {error}")
        finally:
            part.unlink(missing_ok=True)
    raise UserError(f"cannot download {name} ({'; '.join(faults)}); put the file with MD5 {md5} into {folder}, "
                    "or name the folder that holds it with --data_dir")


def read_cifar(cfg, train):
    """The binary archives, no pickle: records of one label byte (CIFAR-100: coarse, fine) and 3 x 32 x 32 pixels."""
    if cfg.dataset == "cifar10":
        archive, folder, head = "cifar-10-binary.tar.gz", "cifar-10-batches-bin/", 1
        files = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    else:
        archive, folder, head = "cifar-100-binary.tar.gz", "cifar-100-binary/", 2
        files = ["train.bin" if train else "test.bin"]
    with tarfile.open(fetch(archive, cfg.data_dir)) as tar:     # read, never extracted: paths in it do no harm
        data = b"".join(tar.extractfile(folder + name).read(MOST) for name in files)
    records = np.frombuffer(data, np.uint8).reshape(-1, head + 3072)
    return records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1]


def read_fashion_mnist(cfg, train):
    """IDX files: big-endian sizes, then bytes. From data_dir, else Debian's dataset-fashion-mnist, else a download."""
    arrays = []
    for kind, dims in ("images", 3), ("labels", 1):
        name = f"{'train' if train else 't10k'}-{kind}-idx{dims}-ubyte.gz"
        debian = Path("/usr/share/datasets/fashion-mnist") / name
        here = debian.exists() and not (Path(cfg.data_dir) / name).exists()
        with gzip.open(debian if here else fetch(name, cfg.data_dir)) as file:
            data = file.read(MOST)
        magic, *shape = np.frombuffer(data[:4 + 4 * dims], ">i4")
        if magic != 0x800 + dims:                               # 0x08: unsigned bytes
            raise ValueError(f"{name} begins with {magic:#x}")
        arrays.append(np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape))
    images = np.pad(arrays[0], ((0, 0), (2, 2), (2, 2)))[:, None]               # 28 x 28 in the middle of 32 x 32
    if cfg.size == 16:
        images = (images.reshape(-1, 1, 16, 2, 16, 2).sum(axis=(3, 5)) + 2) // 4
    return images.astype(np.uint8), arrays[1]


def read_tiny_imagenet(cfg, train):
    """The published zip, read in place. A text file lists the classes of the test (val) images."""
    with zipfile.ZipFile(fetch("tiny-imagenet-200.zip", cfg.data_dir)) as archive:
        top, names = "tiny-imagenet-200/", sorted(name for name in archive.namelist() if name.endswith(".JPEG"))
        names = [name for name in names if name.startswith(f"{top}train/")]
        folders = [name.split("/")[2] for name in names]
        classes = {folder: label for label, folder in enumerate(sorted(set(folders)))}
        if not train:
            lines = archive.open(f"{top}val/val_annotations.txt").read(MOST).decode().splitlines()
            names, folders = zip(*(line.split("\t")[:2] for line in lines))
            names = [f"{top}val/images/{name}" for name in names]
        labels = [classes[folder] for folder in folders]
        return decode_once(cfg, train, names, labels, [archive.getinfo(name).CRC for name in names], archive.open)


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


def read_folders(cfg, train):
    root, *listing = list_folders(cfg, train)
    return decode_once(cfg, train, *listing, lambda name: open(root / name, "rb"))


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


def decode_once(cfg, train, names, labels, stamps, open_file):
    """Images (N, 3, S, S), mapped from one file in data_dir, and labels (N,). The first run decodes, in parallel, and
    writes the file: all images, then all labels as uint16. Its name has a hash of the names and stamps of the files."""
    key = hashlib.sha256(repr((list(names), list(labels), stamps, cfg.skip_bad)).encode()).hexdigest()[:12]
    path = Path(cfg.data_dir, f"{cfg.dataset}{cfg.size}-{'train' if train else 'test'}-{key}.u8")

    def decode(name):
        try:
            with open_file(name) as file, Image.open(file) as image:
                return centre_crop(image, cfg.size).tobytes()
        except Exception as error:      # Pillow fails in many ways on damaged images
            return error

    if not path.exists():
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"--data_dir {cfg.data_dir} is read-only, and {path.name} must be written there; "
                            f"link to it, ln -s {path.parent.resolve()} data/{cfg.dataset}, and give --data_dir data")
        part, kept, bad = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.part"), [], []
        try:
            with open(part, "wb") as file, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                for i in tqdm(range(0, len(names), 256), desc=f"decoding {cfg.dataset}", unit="256", disable=None):
                    some = slice(i, i + 256)
                    for name, label, pixels in zip(names[some], labels[some], pool.map(decode, names[some])):
                        if isinstance(pixels, bytes):
                            file.write(pixels)
                            kept.append(label)
                            continue
                        bad.append(name)
                        if not cfg.skip_bad:
                            raise UserError(f"{name} in --data_dir {cfg.data_dir} cannot be decoded ({pixels}); "
                                            "remove it, or give --skip_bad")
                file.write(np.array(kept, np.uint16).tobytes())
            if not kept:
                raise UserError(f"--data_dir {cfg.data_dir}: none of {len(names)} images can be decoded")
            if bad:
                print(f"note: {len(bad)} of {len(names)} images cannot be decoded and are skipped, {bad[0]} first",
                      file=sys.stderr)
            if not path.exists():       # else another machine was faster, and maps its file already
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    shape = (path.stat().st_size // (3 * cfg.size ** 2 + 2), 3, cfg.size, cfg.size)
    labels = np.fromfile(path, np.uint16, offset=math.prod(shape))
    return np.memmap(path, np.uint8, "c", shape=shape), labels      # "c": changes stay in memory


def load_data(cfg, train):
    """The training or test images of cfg.dataset, uint8 (N, C, H, W), and labels, int64 (N,), as CPU tensors."""
    (C, _, classes), S = DATASETS[cfg.dataset], cfg.size
    downloaded = dict(fashion_mnist=read_fashion_mnist, cifar10=read_cifar, cifar100=read_cifar,
                      tiny_imagenet=read_tiny_imagenet)
    try:
        if cfg.dataset == "glyphs":
            images, labels = draw_glyphs(20000, seed=0) if train else draw_glyphs(4000, seed=1)
        else:
            images, labels = downloaded.get(cfg.dataset, read_folders)(cfg, train)
        if images.shape != (len(labels), C, S, S) or not 0 <= max(labels) < (classes or 2**16):
            raise ValueError(f"shape {images.shape}, labels up to {max(labels)}")
    except UserError:
        raise
    except (OSError, EOFError, LookupError, AttributeError, ValueError, RecursionError, tarfile.TarError,
            zipfile.BadZipFile, zlib.error) as error:
        remedy = "; delete what is damaged, and the next run downloads it" if cfg.dataset in downloaded else ""
        error = " ".join(str(error).split())
        raise UserError(f"--data_dir {cfg.data_dir}: {cfg.dataset} cannot be read ({error}){remedy}")
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64))


def to_float(images):   # uint8 -> float32 in [-1, 1]
    return images.float() / 127.5 - 1


def to_uint8(x):        # and back: rounded to the nearest, clipped
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


# ---- 3. Backbone: the UNets of DDAE (Table 9) with the public parameter names  [same text in the UNet scripts] -------

class TimeEmbedding(nn.Module):
    """Noise input c (B,) -> sinusoids (B, width), sines first -> linear, SiLU, linear -> (B, E). Labels of the
    augmentation (B, 9) are projected and added to the sinusoids; without a bias, None is the same as zeros."""

    def __init__(self, width, E, aug=False):
        super().__init__()
        self.frequencies = width // 2
        if aug:
            self.aug_emb = nn.Linear(9, width, bias=False)
        self.lin1 = nn.Linear(width, E)
        self.lin2 = nn.Linear(E, E)

    def forward(self, c, aug=None):
        powers = torch.arange(self.frequencies, device=c.device) / (self.frequencies - 1)
        angles = c.float()[:, None] * torch.exp(-math.log(10000) * powers)          # frequencies from 1 to 1/10000
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        waves = waves if aug is None else waves + self.aug_emb(aug)
        return self.lin2(F.silu(self.lin1(waves)))


def group_norm(C):
    return nn.GroupNorm(min(32, C // 4), C)


class ResBlock(nn.Module):
    """norm, SiLU, conv, + conditioning e, norm, SiLU, dropout, conv; + the input. `resize` makes it a BigGAN block."""

    def __init__(self, C_in, C_out, E, dropout, resize=nn.Identity()):
        super().__init__()
        self.norm1 = group_norm(C_in)
        self.resize = resize
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(E, C_out))
        self.norm2 = group_norm(C_out)
        self.conv2 = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(C_out, C_out, 3, padding=1))
        self.shortcut = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        h = h + self.time_emb(e)[:, :, None, None]                                  # a shift of channels, no scale
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(self.resize(x)) + h


class SpatialAttention(nn.Module):
    """Attention between the positions of a feature map, one head as wide as the map has channels; + the input."""

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
    """A residual block, and attention where the map has the right size: what the outputs out_1, out_2, ... are of."""

    def __init__(self, C_in, C_out, E, dropout, attention):
        super().__init__()
        self.res = ResBlock(C_in, C_out, E, dropout)
        self.attn = SpatialAttention(C_out) if attention else nn.Identity()

    def forward(self, x, e):
        return self.attn(self.res(x, e))


class Resample(nn.Module):
    """Half or twice the resolution: by a convolution (ddpm) or by a residual block as in BigGAN (ddpmpp)."""

    def __init__(self, C, E, dropout, up, biggan):
        super().__init__()
        self.biggan = biggan
        if biggan:
            self.op = ResBlock(C, C, E, dropout, nn.Upsample(scale_factor=2) if up else nn.AvgPool2d(2))
        else:
            self.resize = nn.Upsample(scale_factor=2) if up else nn.Identity()
            self.conv = nn.Conv2d(C, C, 3, stride=1 if up else 2, padding=1)

    def forward(self, x, e):
        return self.op(x, e) if self.biggan else self.conv(self.resize(x))


class UNet(nn.Module):
    """Down through the levels, a middle, up again with skip connections. The decoder is conditioned on its features."""
    sizes = {  # base width, multiple of it at each level, blocks per level, BigGAN resampling, side of attention maps
        "unet_tiny": (32, (1, 2, 4), 1, False, 8),
        "ddpm": (128, (1, 2, 2, 2), 2, False, 16),
        "ddpmpp": (128, (2, 2, 2), 4, True, 16),
    }

    def __init__(self, cfg):
        super().__init__()
        base, multiples, depth, biggan, attention = self.sizes[cfg.backbone]
        C, side, E, p = DATASETS[cfg.dataset][0], cfg.size, 4 * base, cfg.dropout
        sides = [side >> level for level in range(len(multiples))]
        attention = min(sides, key=lambda s: abs(s - attention))        # at other sizes than the paper's, the nearest
        self.image_proj = nn.Conv2d(C, base, 3, padding=1)
        self.time_emb = TimeEmbedding(base, E, cfg.aug > 0)
        self.down, self.up, self.middle = nn.ModuleList(), nn.ModuleList(), nn.Module()
        width, skips = base, [base]                                                 # channels now, and of the skips
        for level, multiple in enumerate(multiples):
            if level:
                self.down.append(Resample(width, E, p, up=False, biggan=biggan))
                skips.append(width)
                side //= 2
            for _ in range(depth):
                self.down.append(UNetBlock(width, base * multiple, E, p, side == attention))
                width = base * multiple
                skips.append(width)
        self.middle.res1 = ResBlock(width, width, E, p)
        self.middle.attn = SpatialAttention(width)
        self.middle.res2 = ResBlock(width, width, E, p)
        widths = []                                                                 # of out_1, out_2, ...
        for level, multiple in reversed(list(enumerate(multiples))):
            for _ in range(depth + 1):
                self.up.append(UNetBlock(width + skips.pop(), base * multiple, E, p, side == attention))
                width = base * multiple
                widths.append(width)
            if level:
                self.up.append(Resample(width, E, p, up=True, biggan=biggan))
                side *= 2
        self.norm = nn.GroupNorm(8, width)
        self.final = nn.Conv2d(width, C, 3, padding=1)
        self.tap, self.D, self.E = cfg.layer, widths[int(cfg.layer[4:]) - 1], E     # layer to contrast; widths of f, e
        self.sc_layer = int(cfg.layer[4:]) if cfg.self_cond != "none" else None     # [SC] k of out_k, Table 10
        if self.sc_layer:                                                           # [SC]
            self.sc_proj = nn.Linear(self.D, E)                                     # [SC] W
        self.sc_time = TimeEmbedding(base, E) if cfg.self_cond == "adaptive" else None    # [SC] s(t)
        self.to(memory_format=torch.channels_last)      # the layout that convolutions like best

    @staticmethod
    def choices(cfg):
        """The values that some fields may take, given the others."""
        _, multiples, depth, _, _ = UNet.sizes[cfg.backbone]
        if cfg.size % (multiple := 2 ** (len(multiples) - 1)):
            raise UserError(f"--size {cfg.size}: must be a multiple of {multiple} for {cfg.backbone}")
        layers = [f"out_{k}" for k in range(1, len(multiples) * (depth + 1) + 1)]
        if cfg.self_cond != "none" and cfg.layer == layers[-1]:
            raise UserError(f"--layer {cfg.layer}: is the last, so it can condition none; use --self_cond none")
        return dict(self_cond=("adaptive", "add", "none"), layer=layers)

    @staticmethod
    def from_official(state):
        """The averaged weights of a checkpoint of the public DDAE code, {MODEL, EMA, opt}; or a state_dict as it is."""
        prefix = "ema_model.nn_model."
        if "EMA" in state:
            state = {k.removeprefix(prefix): v for k, v in state["EMA"].items() if k.startswith(prefix)}
        return {k.removeprefix("nn_model."): v for k, v in state.items()}

    def embed_time(self, c):
        return self.time_emb(c)                                                     # (B, E)

    def forward(self, x, c, aug=None, tap=False, last=None, place=None):
        """x (B, C, H, W), c (B,) -> prediction (B, C, H, W). aug (B, 9): labels of the augmentation; None is zeros.
        With `tap`: prediction, and the pooled feature that is contrasted, (B, D) float32. With the name of a layer as
        `last`: the pooled features of all layers up to it, {name: (B, D) float32}; the rest is not computed. With
        place (B,) in [0, 1), these include token_k: one position of the map, a random one in Fig. 4."""
        e = self.time_emb(c, aug)                                                   # (B, E), the conditioning
        h = self.image_proj(x)
        skips, feats, k = [h], {}, 0
        for block in self.down:
            h = block(h, e)
            skips.append(h)
        h = self.middle.res2(self.middle.attn(self.middle.res1(h, e)), e)
        for block in self.up:
            if isinstance(block, Resample):
                h = block(h, e)
                continue
            h = block(torch.cat([h, skips.pop()], dim=1), e)                        # (B, C_k, H_k, W_k)
            k += 1
            if last or (tap and f"out_{k}" == self.tap):
                feats[f"out_{k}"] = h.float().mean(dim=(2, 3))                      # (B, C_k)
            if place is not None:
                feats[f"token_{k}"] = h.float().flatten(2)[range(len(h)), :, (place * h[0, 0].numel()).long()]
            if last in feats:
                return feats
            if k == self.sc_layer:                                                  # [SC] what the image is about:
                f = h.mean(dim=(2, 3))                                              # [SC] (B, C_k), Sec. 4.1
                s = self.sc_time(c) if self.sc_time else 1                          # [SC] (B, E); 1 is `add`, Table 7a
                e = e + s * self.sc_proj(f)                                         # [SC] (B, E) for all later layers
        prediction = self.final(F.silu(self.norm(h)))
        return (prediction, feats[self.tap]) if tap else prediction


# ---- 4. Formulation: EDM (Karras et al. 2022, Table 8) ---------------------------------------------------------------

class Uncertainty(nn.Module):
    """Learned weights of the noise levels, for training with augmentation (Appendix A; Karras et al. 2024): loss and
    noise input c (B,) -> loss / exp(u) + u, least where u(c) is the logarithm of the mean loss at c: then no level
    outweighs another. u begins as 0, which leaves EDM's own w(sigma)."""

    def __init__(self, width=256):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, loss, c):
        u = ((2 * math.pi * (c[:, None] * self.frequencies + self.phases)).cos() * self.weight).sum(dim=1)
        return loss / u.exp() + u


class EDM:
    """Forward process, loss and sampler. Times are noise levels sigma, sigma = 0 is the data; images are in [-1, 1]."""
    sigma_data = 0.5
    probe_times = (0.0075, 0.0229, 0.06, 0.1395, 0.2964, 0.5853)                    # Table 8's steps, 2..7 from the end
    quartiles = (0.1341, 0.3012, 0.6766)                                            # of the training times, for the log
    limits = dict(nfe=(1, 1000), t_probe=(0.002, 80))

    def __init__(self, cfg):
        self.steps = (cfg.nfe + 1) // 2                                             # two evaluations each, then one
        self.nfe = 2 * self.steps - 1

    def draw_t(self, n, generator):
        """Training times of n images: ln sigma ~ N(-1.2, 1.2^2), float32 (n,)."""
        return (torch.randn(n, generator=generator, device=generator.device) * 1.2 - 1.2).exp()

    def add_noise(self, x, t, noise):
        """x_t = x_0 + sigma eps, Eq. (1). x and noise (B, C, H, W), t (B,)."""
        return x + t.view(-1, 1, 1, 1) * noise

    def inputs(self, x_t, t):
        """What the network is given for the noisy images x_t at times t: c_in x_t and c_noise."""
        c_in = (t ** 2 + self.sigma_data ** 2) ** -0.5
        return c_in.view(-1, 1, 1, 1) * x_t, t.log() / 4

    def denoise(self, net, x_t, t):
        """D_theta(x_t, sigma) = c_skip x_t + c_out F_theta(c_in x_t, c_noise), the estimate of x_0; EDM's Eq. (7)."""
        total = (t ** 2 + self.sigma_data ** 2).view(-1, 1, 1, 1)                   # the variance of x_t
        c_skip, c_out = self.sigma_data ** 2 / total, t.view(-1, 1, 1, 1) * self.sigma_data / total.sqrt()
        return c_skip * x_t + c_out * net(*self.inputs(x_t, t)).float()

    def loss(self, net, x, t, noise):
        """w(sigma) || D_theta(x_t, sigma) - x_0 ||^2 with w = 1 / c_out^2, the mean over pixels: (B,) float32."""
        weight = (t ** 2 + self.sigma_data ** 2) / (t * self.sigma_data) ** 2
        x_0 = self.denoise(net, self.add_noise(x, t, noise), t)
        return weight * (x_0 - x).square().mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample(self, net, noise):
        """Heun's method on Eq. (2), dx/dsigma = (x - D) / sigma: noise (B, C, H, W) ~ N(0, I) -> images in [-1, 1]."""
        ramp = torch.linspace(0, 1, self.steps, dtype=torch.float64)
        times = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7    # Table 8: from 80 to 0.002, rho = 7
        times = times.tolist() + [0.0]

        def slope(x, t):                                                            # D clipped: by DDAE, not by EDM
            return (x - self.denoise(net, x, torch.full((len(x),), t, device=x.device)).clamp(-1, 1)) / t
        x = noise * times[0]
        for t, s in zip(times, times[1:]):                                          # from t to the next time s < t
            d = slope(x, t)
            euler = x + (s - t) * d
            x = x + (s - t) * (d + slope(euler, s)) / 2 if s > 0 else euler
        return x


def draw_images(net, cfg, seeds):
    """Images uint8 (n, C, S, S) and the number of network evaluations for each, (n,), on the network's device. The
    noise of each comes from a CPU generator of its own."""
    device, diffusion, C, S = next(net.parameters()).device, Diffusion(cfg), DATASETS[cfg.dataset][0], cfg.size
    noise = torch.stack([torch.randn(C, S, S, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with autocast(cfg, device):
        x = diffusion.sample(net, noise.to(device))
    return to_uint8(x), torch.as_tensor(diffusion.nfe, device=device).float().expand(len(x))


SCRIPT, Backbone, Diffusion, Weighting = "edm_sc", UNet, EDM, Uncertainty     # what this script is made of


# ---- 5. Non-leaky augmentation (Sec. 4.2; Karras et al. 2020, 2022)  [same text in the pixel scripts] ----------------

SYM6 = (0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148)       # the low-pass filter of the wavelet, 12 taps


def draw_augment(n, p, generator, mirror=True):
    """Parameters of n transformations, {name: float32 (n,)} on the generator's device; 0 is the identity. Half of the
    images are mirrored left to right; each other one is drawn with probability p. mirror=False: no mirroring at all."""
    uniform = lambda: torch.rand(n, generator=generator, device=generator.device)
    normal = lambda: torch.randn(n, generator=generator, device=generator.device)
    coin = lambda: (uniform() < 0.5).float()
    angle = lambda: (uniform() * 2 - 1) * math.pi
    gated = lambda values, p: values * (uniform() < p)                              # else 0
    params = dict(xflip=gated(coin(), 1.0 * mirror), yflip=gated(coin(), p * mirror), scale=gated(normal(), p),
                  rotate=gated(angle(), p), aniso=gated(normal(), p), aniso_angle=gated(angle(), 0.5),    # 0: along x
                  translate_x=gated(normal(), p))
    params["translate_y"] = gated(normal(), 1.0) * (params["translate_x"] != 0)     # one gate for both
    return params


def augment_label(params):
    """What the network is told, so that it does not take transformations for traits of the data: float32 (n, 9)."""
    a, w, r = params["rotate"], params["aniso"], params["aniso_angle"]
    return torch.stack([params["xflip"], params["yflip"], params["scale"], a.cos() - 1, a.sin(), w * r.cos(),
                        w * r.sin(), params["translate_x"], params["translate_y"]], dim=1)


@functools.lru_cache
def resampling(S, device):
    """Two matrices that filter with SYM6: up (6S - 4, S) continues S pixels by reflection to 3S - 2 and doubles them,
    down (S, 2S + 12) halves a canvas of 2S + 12. Down after up, cut to the canvas, is the identity."""
    reflect = torch.eye(S)[np.pad(np.arange(S), S - 1, mode="reflect")]             # (3S - 2, S): repeats rows
    taps = torch.tensor(SYM6).view(1, 1, 12)
    up = F.conv_transpose1d(torch.eye(3 * S - 2)[:, None], taps, stride=2, padding=5)[:, 0].T
    down = F.conv1d(torch.eye(2 * S + 12)[:, None], taps, stride=2, padding=5)[:, 0, 3:-3].T
    return (up @ reflect).to(device), down.contiguous().to(device)


def apply_augment(x, params):
    """Transforms square images x (B, C, S, S), float32 in [-1, 1] on any device, by params as draw_augment gives them:
    mirrored, then, in one resampling, enlarged by 2^(0.2 scale), rotated by `rotate`, stretched by 2^(0.2 aniso) along
    aniso_angle, shrunk as much across it, and moved by translate * S / 8 pixels. Returns images and labels (B, 9).
    Images only mirrored are not resampled; with params on the CPU, no device has to wait to learn which they are."""
    S, labels, target = x.shape[-1], augment_label(params), dict(device=x.device, non_blocking=x.is_cuda)
    for name, axis in ("xflip", -1), ("yflip", -2):
        x = torch.where(params[name].to(**target).view(-1, 1, 1, 1) > 0, x.flip(axis), x)
    rows = (labels[:, 2:] != 0).any(dim=1).nonzero()[:, 0]
    if len(rows):
        # The output at z shows the input at M z + v; both are (x, y), in pixels from the middle.
        some = {name: values[rows] for name, values in params.items()}
        turn = lambda a: torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], dim=1).view(-1, 2, 2)
        w, r = some["aniso"], some["aniso_angle"]
        stretch = torch.diag_embed(2 ** (0.2 * torch.stack([-w, w], dim=1)))
        M = turn(some["rotate"]) @ turn(-r) @ stretch @ turn(r) * 2 ** (-0.2 * some["scale"]).view(-1, 1, 1)
        v = M @ torch.stack([some["translate_x"], some["translate_y"]], dim=1)[:, :, None] * (-S / 8)
        # Twice as large, an image has its middle half a pixel before the map's. grid_sample counts from -1 to 1.
        up, down = resampling(S, x.device)
        off = torch.full((2, 1), 0.5)
        theta = torch.cat([M * (len(down.T) / len(up)), (M @ off + 2 * v - off) * (2 / len(up))], dim=2)
        moved = rows.to(**target)
        grid = F.affine_grid(theta.to(**target), (len(rows), 1, len(down.T), len(down.T)), align_corners=False)
        x[moved] = down @ F.grid_sample(up @ x[moved] @ up.T, grid, align_corners=False) @ down.T
    return x, labels.to(**target)


def draw_view(cfg, generator):
    """A view of each image of a global batch: {name: (batch,)} on the CPU. The network is told xflip, but not flip."""
    view = dict(flip=torch.rand(cfg.batch, generator=generator) < 0.5 * cfg.flip)
    return {**view, **draw_augment(cfg.batch, cfg.aug, generator, cfg.flip)} if cfg.aug else view


def make_view(images, classes, view):
    """Images uint8 (B, C, S, S) as seen in a view: float32 in [-1, 1]; and what the network is told, labels (B, 9) of
    the augmentation or None. It is never told the classes (B,)."""
    params = dict(view)
    flip = params.pop("flip").to(images.device, non_blocking=images.is_cuda).view(-1, 1, 1, 1)
    x = to_float(torch.where(flip, images.flip(-1), images))
    return apply_augment(x, params) if params else (x, None)


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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SystemExit as end:
        if WORLD > 1:       # gloo's threads outlive its group, and now and then abort Python when it takes itself apart
            sys.stdout.flush()
            os._exit(end.code or 0)
        raise
