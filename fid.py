"""FID and Inception Score in one file: Inception, statistics, distance, and a line that says how the number came about.

Papers    FID: Heusel et al. 2017 (arXiv 1706.08500). Inception Score (IS): Salimans et al. 2016 (arXiv 1606.03498).
Maths     FID = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of Gaussians fitted to features of two image sets
          IS  = exp E_x KL(p(y|x) || p(y))
Numbers   Network, resize and statistics are pytorch-fid's: same weights, same FID to 1e-3. Scores compare only at equal
          N, reference, sampler and detector, hence the protocol line. --resize tensorflow: as torch-fidelity and
          ADM's evaluator, of which both scores differ from pytorch-fid's.

Run       python fid.py runs/.../last.pt                   # 50,000 samples against the training images: FID and IS
          python fid.py runs/.../last.pt --n 10000         # sooner, but biased upwards, and called FID-10k
          python fid.py samples/ cifar10                   # A and B: folder of images, .npz, data set, or checkpoint
          python fid.py samples/ cifar10_stats.npz         # .npz: pytorch-fid's (mu, sigma), or ADM's images (arr_0)
          python fid.py runs/.../last.pt --detector tiny   # no Inception at hand, or images that are no photographs
          python fid.py runs/.../last.pt --save samples    # and keep what is drawn: PNGs; samples.npz: as ADM reads it
          python fid.py --save-stats images/ new.npz       # no distance: the statistics of A, as python -m pytorch_fid
          torchrun --nproc_per_node=2 fid.py ...           # all GPUs (or CPU processes) share the work; same numbers
"""
import argparse, contextlib, dataclasses, datetime, functools, hashlib, http.client, importlib, itertools, json, math
import os, re, shutil, sys, time, urllib.request, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

SCRIPTS = ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")     # a checkpoint may name these, and nothing else
EXTENSIONS = "bmp jpg jpeg pgm png ppm tif tiff webp".split()
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"       # how the sha256 of that file begins
RANK, LOCAL_RANK, WORLD = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
QUIET = True if RANK else None      # of progress bars; None: only where stderr is no terminal


class UserError(ValueError):
    """What the user can fix. The command line prints it as one line and ends with status 2."""


def digest(parts):
    """The first 12 hex digits of the sha256 of bytes-like parts, one after the other."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:12]


@contextlib.contextmanager
def new_file(path):
    """A temporary file to write to, that gets its name when the block ends well: nobody ever finds half a file."""
    part = Path(path).with_name(f".{Path(path).name}.{os.uname().nodename}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_tensors(path):
    """What torch.save wrote; code in it is refused, not run. On damaged files torch.load fails in many ways."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise UserError(f"{path} cannot be loaded ({str(error)[:200]})")


# Processes: torchrun starts several. Each measures its batches, and all meet in a few places, always together.

def gather(value):
    """The values of all processes, a list in the order of their ranks."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def agreed(work):
    """work(), in which processes do not meet. What the user can fix in one is raised in all: none waits for another
    that has left."""
    result, fault = None, None
    try:
        result = work()
    except (OSError, UserError, *(sys.modules[s].UserError for s in SCRIPTS if s in sys.modules)) as error:
        fault = error
    faults = [error for error in gather(fault and str(fault)) if error is not None]
    if faults:
        raise UserError(faults[0]) from fault
    return result


def in_turn(work):
    """work() in the first process of each machine, as it may download, decode or train; then in the others."""
    result = agreed(lambda: work() if LOCAL_RANK == 0 else None)
    return agreed(lambda: work() if LOCAL_RANK > 0 else result)


def shares(rows, batch):
    """The batches of this process, each with the index at which it begins: every WORLD-th, so that each row is seen
    once. With 2 processes, 25 rows and batches of 10, the first has (0, rows 0-9), (20, rows 20-24)."""
    for i in range(RANK * batch, len(rows), WORLD * batch):
        yield i, rows[i:i + batch]


# ---- 1. Inception: the network of 2015 behind every published FID, with torchvision's parameter names ----------------

class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU. Same-size padding at stride 1, none at stride 2, unless told."""

    def __init__(self, c_in, c_out, kernel, stride=1, pad=True):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, [k // 2 * (stride == 1 and pad) for k in kernel], bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, concatenated as listed. A branch is a chain of units, "48 1x1, 64 5x5" (channels, kernel,
    /2 for stride 2); "384 1x3 3x1" forks. branch_pool begins with the pool; "halve" adds a branch that is a pool."""

    def __init__(self, c_in, pool="avg", **branches):
        super().__init__()
        self.chains, self.pool = [], pool
        for branch, text in branches.items():
            c, chain, links = c_in, [], text.split(", ")
            for k, link in enumerate(links, 1):
                width, *kernels = link.split()
                chain.append([])
                for letter, kernel in zip("ab" if len(kernels) > 1 else [""], kernels):
                    chain[-1].append(branch + f"_{k}" * (len(links) > 1) + letter)     # branch3x3_2a
                    size, _, stride = kernel.partition("/")
                    self.add_module(chain[-1][-1], Unit(c, int(width), [*map(int, size.split("x"))], int(stride or 1)))
                c = int(width) * len(kernels)
            self.chains.append(chain)

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            h = x
            if chain == [["branch_pool"]]:      # TensorFlow leaves the padding out of the average
                h = (F.max_pool2d(x, 3, stride=1, padding=1) if self.pool == "max" else
                     F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
            for names in chain:
                h = torch.cat([self.get_submodule(name)(h) for name in names], dim=1)
            outputs.append(h)
        return torch.cat(outputs + [F.max_pool2d(x, 3, stride=2)] * (self.pool == "halve"), dim=1)


def resize_tensorflow(x, size=299):
    """Bilinear as in TensorFlow 1: pixel i of the new image lies at i * old / new, without the half-pixel shift of
    others. Images float32 (B, C, H, W) -> (B, C, size, size)."""
    for dim in (3, 2):
        place = torch.arange(size, device=x.device) * torch.tensor(x.shape[dim] / size, dtype=torch.float32)
        low = place.long()
        a, b = (x.index_select(dim, i.clamp(max=x.shape[dim] - 1)) for i in (low, low + 1))
        x = a + (b - a) * (place - low).view(-1, *[1] * (3 - dim))
    return x


class Inception(nn.Module):
    """uint8 images (B, 1 or 3, H, W) -> features (B, 2048), logits (B, 1008). By the custom of the IS the logits have
    no bias: fc.bias is there because the file has it."""
    kind, dim, classes, resize = "inception", 2048, 1008, "torch"

    def __init__(self):
        super().__init__()
        a = lambda c_in, c: Mixed(c_in, branch1x1="64 1x1", branch5x5="48 1x1, 64 5x5",
                                  branch3x3dbl="64 1x1, 96 3x3, 96 3x3", branch_pool=f"{c} 1x1")
        c = lambda c: Mixed(768, branch1x1="192 1x1", branch7x7=f"{c} 1x1, {c} 1x7, 192 7x1",
                            branch7x7dbl=f"{c} 1x1, {c} 7x1, {c} 1x7, {c} 7x1, 192 1x7", branch_pool="192 1x1")
        e = lambda c_in, pool: Mixed(c_in, pool, branch1x1="320 1x1", branch3x3="384 1x1, 384 1x3 3x1",
                                     branch3x3dbl="448 1x1, 384 3x3, 384 1x3 3x1", branch_pool="192 1x1")
        self.Conv2d_1a_3x3 = Unit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3), pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = a(192, 32), a(256, 64), a(288, 64)
        self.Mixed_6a = Mixed(288, "halve", branch3x3="384 3x3/2", branch3x3dbl="64 1x1, 96 3x3, 96 3x3/2")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = c(128), c(160), c(160), c(192)
        self.Mixed_7a = Mixed(768, "halve", branch3x3="192 1x1, 320 3x3/2",
                              branch7x7x3="192 1x1, 192 1x7, 192 7x1, 192 3x3/2")
        self.Mixed_7b, self.Mixed_7c = e(1280, "avg"), e(2048, "max")       # max: an oddity that every FID has
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        x = images.expand(-1, 3, -1, -1).float()                                        # grey becomes RGB
        if self.resize == "tensorflow":
            x = (resize_tensorflow(x) - 128) / 128
        else:
            x = 2 * F.interpolate(x / 255, size=(299, 299), mode="bilinear", align_corners=False) - 1   # no antialias
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))               # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))        # (B, 192, 71, 71)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))   # (B, 288, 35, 35)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))        # (B, 768, 17, 17)
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))      # of (B, 2048, 8, 8)
        return features, features @ self.fc.weight.T


def load_inception(file, folder):
    """Inception in eval mode: from `file`, which may hold any weights, or from the published file, which is looked for
    in `folder` and else downloaded to it. A download gets its name only when its hash is right."""
    path = Path(file or Path(folder) / INCEPTION_URL.rpartition("/")[2])

    def download(part):
        with urllib.request.urlopen(INCEPTION_URL, timeout=30) as reply:
            with tqdm.wrapattr(reply, "read", total=reply.length, desc=path.name, disable=QUIET) as stream:
                shutil.copyfileobj(stream, part)
        part.flush()
        check(Path(part.name))

    def check(path):
        sha, size = digest([path.read_bytes()]), path.stat().st_size
        if not file and not sha.startswith(INCEPTION_SHA256):
            raise OSError(f"{size} bytes with sha256 {sha}..., not {INCEPTION_SHA256}...")
        return sha

    try:
        if not file and not path.exists():
            with new_file(path) as part:
                download(part)
        net = Inception()
        net.hash = check(path)
        net.load_state_dict(load_tensors(path))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"no Inception weights at {path} ({error}); put there what {INCEPTION_URL} serves, or name "
                        "another place with --inception FILE, or use --detector tiny")
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no Inception weights ({str(error)[:200]})")
    return net.eval()


# ---- 2. The tiny detector: a classifier trained on the spot, for machines without network and for small images -------

DETECTOR = dict(version=1, widths=(32, 64, 128), features=64, steps=800, batch=128, lr=3e-3, shift=1, seed=0)


class TinyDetector(nn.Module):
    """uint8 images (B, 1 or 3, S, S) -> features (B, 64), logits (B, classes)."""
    kind, dim, resize = "tiny", DETECTOR["features"], "none"

    def __init__(self, size, classes):
        super().__init__()
        self.size, self.classes, layers, c = size, classes, [], 3
        step = max(1, size // 16)       # brings any image to about 16 x 16
        for width, stride in zip(DETECTOR["widths"], (step, 2, 2)):
            kernel = 3 if layers else 2 * step + 1
            layers += [nn.Conv2d(c, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            c = width
        self.conv, self.feature = nn.Sequential(*layers), nn.Linear(c, self.dim)
        self.head = nn.Linear(self.dim, classes)

    def forward(self, images):
        if images.shape[-2:] != (self.size, self.size):
            raise UserError(f"--detector tiny knows images of {self.size} x {self.size} pixels, and there is one of "
                            f"{images.shape[-1]} x {images.shape[-2]}")
        x = images.expand(-1, 3, -1, -1).float() / 127.5 - 1
        features = self.feature(self.conv(x).mean(dim=(2, 3)))
        return features, self.head(features.relu())


def train_detector(images, labels):
    """On the CPU for a fixed number of steps, so that the same images give the same detector, up to rounding."""
    steps, batch, lr, s, seed = (DETECTOR[k] for k in ("steps", "batch", "lr", "shift", "seed"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = TinyDetector(images.shape[-1], int(labels.max()) + 1)
    optimizer, gen = torch.optim.AdamW(net.parameters(), lr), torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps), desc="training the tiny detector", unit="step", disable=QUIET):
        rows = torch.randint(len(images), (batch,), generator=gen)
        dy, dx = torch.randint(2 * s + 1, (2,), generator=gen).tolist()         # the whole batch moves: that is cheap
        x = F.pad(images[rows].float(), (s, s, s, s), mode="replicate")[..., dy:, dx:][..., :net.size, :net.size]
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(net(x)[1], labels[rows]).backward()
        optimizer.step()
    return net.eval()


def load_detector(side, folder):
    """The detector of a data set, from `folder`, else trained and put there; with its accuracy on the test images."""
    images, labels = side.load(True)
    key = digest([side.hash.encode(), labels.numpy(), json.dumps(DETECTOR).encode()])
    path = Path(folder) / f"detector-tiny-{side.name}-{key}.pt"
    if not path.exists():
        test, answers = side.load(False)        # first, as it may be missing
        net = train_detector(images, labels)
        with torch.no_grad():
            right = sum((net(x)[1].argmax(1) == y).sum().item() for x, y in zip(test.split(500), answers.split(500)))
        with new_file(path) as file:
            torch.save(dict(model=net.state_dict(), accuracy=right / len(test)), file)
    net, state = TinyDetector(images.shape[-1], int(labels.max()) + 1), load_tensors(path)
    try:
        net.load_state_dict(state["model"])
        net.accuracy = float(state["accuracy"])
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is no detector of these images; delete it, and the next run trains one")
    net.hash = digest(v.numpy() for v in net.state_dict().values())
    return net.eval()


# ---- 3. Statistics and distance, in float64 --------------------------------------------------------------------------

class Statistics:
    """Mean and covariance of features, and Inception Score of logits, of n images in one pass and constant memory, but
    for a byte an image. For the IS, images fall into ten parts after a fixed shuffle (torch-fidelity's): parts of a
    folder sorted by class would hold few classes each."""

    def __init__(self, n, dim, classes, device="cpu"):
        part, order = np.empty(n, np.uint8), np.random.RandomState(2020).permutation(n)
        for k in range(10):
            part[order[k * n // 10:(k + 1) * n // 10]] = k
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self.part, self.n, self.seen = torch.from_numpy(part).to(device), n, 0
        self.sum, self.outer, self.p, self.p_log_p = zeros(dim), zeros(dim, dim), zeros(10, classes), zeros(10)

    def add(self, features, logits, start):
        """Features (B, D) and logits (B, classes) of the images start, start + 1, ... of the n."""
        features, logits = (v.to(self.sum.device).double() for v in (features, logits))     # MPS cannot cast
        log_p = logits.log_softmax(dim=1)
        part = self.part[start:start + len(logits)].long()
        self.seen += len(logits)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)
        self.p.index_add_(0, part, log_p.exp())
        self.p_log_p.index_add_(0, part, (log_p.exp() * log_p).sum(1))

    def merge(self):
        """The sums of all processes, in all."""
        assert sum(gather(self.seen)) == self.n     # each image once
        for total in (self.sum, self.outer, self.p, self.p_log_p) * (WORLD > 1):
            dist.all_reduce(total)

    def gaussian(self):
        """Mean (D,) and covariance (D, D) with divisor n - 1."""
        mu = self.sum / self.n
        return mu.cpu().numpy(), ((self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)).cpu().numpy()

    def inception_score(self):
        """Mean and population standard deviation over the parts of exp(mean KL(p(y|x) || p(y)))."""
        count = torch.bincount(self.part, minlength=10)
        p = self.p / count[:, None]
        score = (self.p_log_p / count - torch.special.xlogy(p, p).sum(1)).exp()
        return score.mean().item(), score.std(correction=0).item()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982; as FID: Heusel et al. 2017, Eq. 6):
    |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2).

    With S = A A^T, the trace is the sum of the singular values of A1^T A2, all real. The square root of S1 S2 itself,
    which is not symmetric, becomes complex by rounding where there are fewer images than features. Directions in which
    S has nothing but rounding are left out of A, or their roots, 1e-8 instead of 1e-16, would add up.
    """
    def factor(sigma):      # A (D, rank)
        values, vectors = torch.linalg.eigh(sigma)
        real = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        return vectors[:, real] * values[real].sqrt()

    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(np.asarray(v), dtype=torch.float64) for v in (mu1, sigma1, mu2, sigma2))
    trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    return max(((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item(), 0.0)


# ---- 4. What can be compared -----------------------------------------------------------------------------------------

@dataclasses.dataclass
class Side:
    """One side of the comparison: images that come in batches, or statistics that are known already."""
    name: str
    n: int                      # images; None: statistics that do not tell
    batches: callable = None    # batch size -> iterator over this process's (index of the first, uint8 (B, C, H, W))
    gaussian: tuple = None      # (mu, sigma)
    hash: str = None            # of the image bytes; the first process knows it
    resize: str = None          # statistics only: before Inception, if they tell
    load: callable = None       # data set only: train -> (images, labels)
    cfg: object = None          # checkpoint only
    facts: dict = dataclasses.field(default_factory=dict)       # more for the protocol


def find_script(name):
    known = name in SCRIPTS and Path(__file__).with_name(f"{name}.py").exists()
    return importlib.import_module(name) if known else None


def open_dataset(name, data_dir, first="ddpm_sc", like=None):
    """The training images of a data set, read by the script `first` or another that knows it; latents are no images.
    like: the config of a checkpoint that they are compared with; images of the same data set get the same size."""
    names = {}
    for module in map(find_script, sorted(dict.fromkeys([first, *SCRIPTS]), key="dit_latent_sc".__eq__)):
        names |= module.RECIPES if module else {}
        if name in names:
            cfg = module.make_config(dataset=name, data_dir=data_dir)
            if hasattr(like, "tokenizer") and name != "glyphs":
                raise UserError(f"{name} at {like.size} x {like.size} is too large to be a reference here; name ADM's "
                                "reference batch (.npz) or a folder of images")
            if like and like.dataset == name:
                cfg = dataclasses.replace(like, data_dir=data_dir)
            load = functools.cache(lambda train: module.load_data(cfg, train))
            images = load(True)[0]
            if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
                raise UserError(f"no script reads {name} as images, only as latents; name a folder or .npz instead")
            sha = digest([str(images.shape).encode(), images.numpy()]) if RANK == 0 else None
            return Side(name, len(images), functools.partial(shares, images), load=load, hash=sha)
    raise UserError(f"{name}: no such file or folder, and no data set; there are {', '.join(names)}")


def open_folder(path, workers):
    """Images of a folder, not of its subfolders, by name. They may differ in size. The hash is that of the files."""
    files = sorted(f for f in path.iterdir() if f.suffix[1:].lower() in EXTENSIONS and f.is_file())
    if not files:
        raise UserError(f"{path} holds no images ({' '.join(EXTENSIONS)}); its folders are not looked into: name one")

    def read(file):
        try:
            with Image.open(file) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:      # damaged images make Pillow stumble in many ways
            raise UserError(f"{file} cannot be read as an image ({error})")

    def batches(batch):
        with ThreadPoolExecutor(workers) as pool:
            parts = ((start, pool.map(read, part)) for start, part in shares(files, batch))
            waiting = [*itertools.islice(parts, 2)]         # one is measured while the next is read
            while waiting:
                start, images = waiting.pop(0)
                for _, group in itertools.groupby(images, key=lambda image: image.shape):
                    group = torch.stack([*group])
                    yield start, group
                    start += len(group)
                waiting += itertools.islice(parts, 1)

    return Side(str(path), len(files), batches, hash=digest(f.read_bytes() for f in files) if RANK == 0 else None)


def open_npz(path):
    """pytorch-fid's statistics (mu, sigma), or images as ADM stores them (arr_0), a batch of which is in memory at a
    time. Pickles inside are refused. Statistics beside ADM's mu_s are those of its evaluator, which resizes as
    TensorFlow does; ours say how; pytorch-fid's do not."""
    @contextlib.contextmanager
    def opened():
        """The open arr_0, just behind its header, and its shape."""
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)[0]
            shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{version}_0")(file)
            if dtype != np.uint8 or shape[3:] != (3,) or fortran:
                raise ValueError(f"images must be uint8 (N, H, W, 3), and are {dtype} {shape}{', Fortran' * fortran}")
            yield file, shape

    def pieces(cut):
        """(index of the first, images) for the index ranges that cut(range(N)) yields, in rising order."""
        try:
            with opened() as (file, (n, *shape)):
                head, size = file.tell(), math.prod(shape)
                for start, rows in cut(range(n)):
                    file.seek(head + start * size)
                    pixels = np.frombuffer(bytearray(file.read(len(rows) * size)), np.uint8)
                    yield start, torch.from_numpy(pixels.reshape(len(rows), *shape)).permute(0, 3, 1, 2)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} cannot be read ({error})")

    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not in npz format")
        with np.load(path, allow_pickle=False) as file:
            data = {k: file[k] for k in ("mu", "sigma", "n", "resize") if k in file}
            names = file.files
        mu, sigma = (data.get(k, np.empty(0)) for k in ("mu", "sigma"))
        if mu.size and sigma.shape == 2 * mu.shape and np.isfinite(mu.sum() + sigma.sum()):
            resize = "tensorflow" if "mu_s" in names else str(data["resize"]) if "resize" in data else None
            return Side(str(path), int(data["n"]) if "n" in data else None, gaussian=(mu, sigma), resize=resize)
        if "arr_0" not in names:
            raise ValueError("neither statistics, mu (D,) and sigma (D, D), nor images, arr_0")
        with opened() as (_, shape):
            pass
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error})")
    every = lambda rows: ((i, rows[i:i + 256]) for i in range(0, len(rows), 256))
    parts = (x.permute(0, 2, 3, 1).numpy() for _, x in pieces(every))
    sha = digest(itertools.chain([str(shape).encode()], parts)) if RANK == 0 else None
    return Side(str(path), shape[0], lambda batch: pieces(lambda rows: shares(rows, batch)), hash=sha)


@contextlib.contextmanager
def image_writer(path, seeds, workers):
    """A function that writes images uint8 (B, C, H, W), in the order of the seeds: write(index of the first, images).
    path: a folder for PNGs, named by seed; or one .npz as ADM reads it, which grows on the disk and not in memory; or
    None. It gets its name when all are written. The first process writes."""
    if not path or RANK > 0:
        yield lambda start, images: None
    elif path.endswith(".npz"):
        with (new_file(path) as part, zipfile.ZipFile(part, "w") as archive,
              archive.open("arr_0.npy", "w", force_zip64=True) as file):
            def write(start, images):
                pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
                if start == 0:
                    shape = (len(seeds), *pixels.shape[1:])
                    np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
                file.write(pixels.tobytes())
            yield write
    else:
        digits = max(6, len(str(seeds[-1])))
        part = Path(path).with_name(f".{Path(path).name}.{os.uname().nodename}.{os.getpid()}.part")
        part.mkdir()

        def save(seed, image):
            Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(part / f"{seed:0{digits}d}.png")

        try:
            with ThreadPoolExecutor(workers) as pool:
                yield lambda start, images: [*pool.map(save, seeds[start:start + len(images)], images)]
            if Path(path).exists():
                Path(path).rmdir()      # it was empty; if it no longer is, this fails
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def open_checkpoint(path, args, device, save=None):
    """Samples of a checkpoint, drawn while they are measured: image i is of seed i. save: where they go, too."""
    state = load_tensors(path)
    name = state.get("script") if isinstance(state, dict) else None
    if not (script := find_script(name)):
        raise UserError(f"{path} is no checkpoint of a script beside fid.py ({', '.join(SCRIPTS)}), but of {name}")
    cfg, net = script.load_checkpoint(path, weights=args.weights)
    changes = {name: getattr(args, name) for name in ("nfe", "guidance", "data_dir", "vae")
               if getattr(args, name) is not None}
    if "guidance" in changes and getattr(cfg, "uncond", True):
        raise UserError(f"--guidance {args.guidance:g}: does nothing, the network of {path} is told no classes")
    if "vae" in changes and not hasattr(cfg, "vae"):
        raise UserError(f"--vae {args.vae}: does nothing, {name} draws pixels")
    cfg = script.make_config(**{**dataclasses.asdict(cfg), **changes})
    net, seeds = net.to(device), range(args.seed, args.seed + args.n)
    facts = dict(script=name, step=state.get("step"), weights=args.weights.replace("model", "raw"), nfe=0)
    facts |= {} if getattr(cfg, "uncond", True) else dict(guidance=cfg.guidance)
    facts |= dict(tol=cfg.tol) if hasattr(cfg, "tol") and not cfg.nfe else {}
    facts |= dict(precision=str(script.autocast(cfg, device).fast_dtype).removeprefix("torch."))

    def draw(batch):        # all processes draw a chunk together, and all have all of it; then each takes its share
        evaluations, size = 0, math.ceil(batch / 64) * 64       # sample() works on 64 at a time
        with contextlib.ExitStack() as stack:
            write = agreed(lambda: stack.enter_context(image_writer(save, seeds, args.num_workers)))
            for i in range(0, args.n, size * WORLD):
                images = script.sample(net, cfg, seeds[i:i + size * WORLD])
                agreed(lambda: write(i, images))
                evaluations += net.nfe * len(images)
                yield i + RANK * size, images[RANK * size:(RANK + 1) * size]
        side.facts["nfe"] = round(evaluations / args.n, 1)      # RK45 takes as many as an image needs

    side = Side(str(path), args.n, draw, cfg=cfg, facts=dict(facts, seeds=[seeds[0], seeds[-1]]))
    return side


def open_side(word, args, device, save=None):
    path, known = Path(word), Path(word).suffix in (".npz", ".pt")
    if path.is_dir():
        return open_folder(path, args.num_workers)
    if known != path.exists():
        raise UserError(f"{path}: " + ("no such file" if known else "neither folder, .npz nor checkpoint (.pt)"))
    if not known:
        return open_dataset(word, args.data_dir or "data")
    return open_npz(path) if path.suffix == ".npz" else open_checkpoint(path, args, device, save)


# ---- 5. Evaluation ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def measure(side, net, device, batch):
    """(mu, sigma) and Inception Score of one side; the latter is None where it means nothing."""
    if side.gaussian:
        if len(side.gaussian[0]) != net.dim:
            raise UserError(f"{side.name} has {len(side.gaussian[0])} features, and detector {net.kind} has {net.dim}")
        if side.resize not in (None, net.resize):
            raise UserError(f"{side.name} holds statistics for --resize {side.resize}, and this is {net.resize}")
        return side.gaussian, None
    if side.n < 2:
        raise UserError(f"{side.name} holds one image; a covariance needs two")
    stats = Statistics(side.n, net.dim, net.classes, "cpu" if device.type == "mps" else device)     # MPS has no float64

    def add(start, images):
        for i in range(0, len(images), batch):
            x = images[i:i + batch].to(device).contiguous()             # the order in memory would change the rounding
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):    # its 10 bits show in digit 3
                stats.add(*net(x), start + i)
        bar.update(min(len(images) * WORLD, side.n - bar.n))

    with tqdm(total=side.n, desc=side.name, unit="image", disable=QUIET) as bar:
        if side.cfg:        # the processes meet whenever they draw
            for start, images in side.batches(batch):
                agreed(lambda: add(start, images))
        else:
            agreed(lambda: [add(start, images) for start, images in side.batches(batch)] and None)
    stats.merge()
    return stats.gaussian(), stats.inception_score() if net.kind == "inception" and side.n >= 10 else None


def save_stats(path, gaussian, n, resize):
    with new_file(path) as file:
        np.savez(file, mu=gaussian[0], sigma=gaussian[1], resize=resize, **({"n": n} if n else {}))


def keep_stats(path, *stats):
    try:
        save_stats(path, *stats)
    except OSError as error:        # data may lie where nobody may write
        print(f"note: {path} cannot be kept for next time ({error})", file=sys.stderr)


def score_name(kind, n):
    """FID is what 50,000 images give. It falls as their number grows, so other scores state theirs. None: not known."""
    if kind == "tiny":
        return "FD-tiny"
    return "FID-?" if n is None else "FID" if n >= 50000 else f"FID-{n}" if n % 1000 else f"FID-{n // 1000}k"


def evaluate(args, device):
    """Everything that will be reported, as a dict. Distances and files are the business of the first process."""
    begin, first, tiny, result = time.time(), RANK == 0, args.detector == "tiny", {}
    a = in_turn(lambda: open_side(args.A, args, device, args.save))
    folder = args.data_dir = args.data_dir or getattr(a.cfg, "data_dir", "data")

    def open_reference():
        if args.B is None and not a.cfg:
            raise UserError(f"compare {a.name} with what? B may be left out after a checkpoint only")
        if args.B is None or a.cfg and args.B == a.cfg.dataset and not Path(args.B).exists():
            return open_dataset(a.cfg.dataset, folder, a.facts["script"], like=a.cfg)
        return open_side(args.B, args, device)

    b = None if args.save_stats else in_turn(open_reference)
    sides = dict(A=a) if args.save_stats else dict(A=a, B=b)
    if tiny and not b.load:
        raise UserError(f"--detector tiny learns from a data set, so the reference must be one, not {b.name}")
    for side in sides.values():
        side.hash = gather(side.hash)[0]
    net = in_turn(lambda: load_detector(b, folder) if tiny else load_inception(args.inception, folder)).to(device)
    if not tiny:
        net.resize = args.resize
    if b:
        kind = net.kind + "-tensorflow" * (net.resize == "tensorflow")
        cache = Path(folder) / f"stats-{kind}-{net.hash}-{b.hash}.npz"      # same detector and images, same statistics
        b.facts["cached"] = gather(bool(b.hash) and cache.exists())[0]
        if b.facts["cached"]:
            target = agreed(lambda: measure(open_npz(cache), net, device, args.batch)[0] if first else None)
        else:
            target, _ = measure(b, net, device, args.batch)
            agreed(lambda: keep_stats(cache, target, b.n, net.resize) if first and b.hash else None)
    gaussian, score = measure(a, net, device, args.batch)
    if b:
        fewest = a.n if b.load or not b.n or not a.n else min(a.n, b.n)     # a data set is all there is
        value = frechet_distance(*gaussian, *target) if first else None
        result |= dict(score=score_name(net.kind, fewest), value=value, inception_score=score)
    else:
        agreed(lambda: save_stats(args.B, gaussian, a.n, net.resize) if first else None)
        result |= dict(saved=args.B, inception_score=score)
    if tiny:        # what a perfect model would get: as many test images as A has, if there are
        test = in_turn(lambda: b.load(False))[0]
        test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:a.n]]
        floor, _ = measure(Side("test images", len(test), functools.partial(shares, test)), net, device, args.batch)
        floor = frechet_distance(*floor, *target) if first else None
        result |= dict(floor=floor, floor_n=len(test), detector_accuracy=net.accuracy)
    for side in sides.values():
        if first and side.n and side.n < net.dim:
            print(f"WARNING: {side.name} has {side.n} images for {net.dim} features: too few for a covariance, so the "
                  "score is much too high; compare it with scores of the same N only", file=sys.stderr)
    result |= {k: dict(name=side.name, n=side.n, sha256=side.hash, **side.facts) for k, side in sides.items()}
    return result | dict(detector=net.kind, detector_sha256=net.hash, resize=net.resize, processes=WORLD,
                         seconds=round(time.time() - begin, 1))


def describe(r):
    """Two lines: the score, and how it came about. For the tiny detector a third."""
    drawn = "{script} at step {step}, {weights} weights, {nfe:g} NFE, seeds {seeds[0]}-{seeds[1]}"
    sides = [f"{k} {s['name']}, N {s['n'] or 'unknown'}" + f", sha256 {s['sha256']}" * bool(s["sha256"])
             + (" (statistics from the cache)" if s.get("cached") else "")
             + (", " + drawn.format(**s) if "script" in s else "")
             + (f", {s['precision']}" if "precision" in s else "") + (f", RK45 to {s['tol']:g}" if "tol" in s else "")
             + (f", classes in turn, guidance {s['guidance']:g}" if "guidance" in s else "")
             for k, s in r.items() if k in ("A", "B")]
    score = "   Inception Score {:.3f} +- {:.3f}".format(*r["inception_score"]) if r["inception_score"] else ""
    floor = ("\nfloor: FD-tiny {floor:.4f} for {floor_n} test images, about what a perfect model would get; the "
             "detector's test accuracy is {detector_accuracy:.2%}").format(**r) if "floor" in r else ""
    resize = f", resize {r['resize']}" if r["detector"] == "inception" else ""
    head = "{score} {value:.4f}" if "score" in r else "{saved}: mean and covariance, no distance"
    return (f"{head.format(**r)}{score}\nprotocol: {'; '.join(sides)}; "
            f"detector {r['detector']} {r['detector_sha256']}{resize}; {r['seconds']} s{floor}")


# ---- 6. Command line -------------------------------------------------------------------------------------------------

def fail(message):
    """Ends a run for a reason that the user can fix: one line, status 2."""
    if LOCAL_RANK > 0:
        time.sleep(10)      # torchrun ends all with the first to go: be it rank 0, if it has the fault as well
    print(f"fid: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_command_line(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail

    def add(*names, **kwargs):      # --data_dir is --data-dir, too
        parser.add_argument(*dict.fromkeys([*names, *(name.replace("_", "-") for name in names)]), **kwargs)

    add("A", help="folder of images, .npz, checkpoint (.pt), or data set (what exists as a folder is a folder)")
    add("B", nargs="?", help="the reference, likewise; default: the training images of checkpoint A's data set")
    add("--n", "--images", type=int, help="images to draw from a checkpoint (50000; 2000 with --detector tiny); "
        "torchrun would take --n for its own")
    add("--seed", type=int, help="image i has seed SEED + i (0)")
    add("--nfe", type=int, help="network evaluations per image (what the checkpoint's config says)")
    add("--guidance", type=float, help="scale of classifier-free guidance, 1: none (what the checkpoint's config says)")
    add("--weights", choices=("ema", "model"), help="ema: averaged | model: raw (ema)")
    add("--save", metavar="DIR|FILE.npz", help="write the images drawn from checkpoint A: PNGs, or one .npz as ADM's")
    add("--batch", "--batch_size", type=int, default=64, help="images at a time, in each process (64)")
    add("--num_workers", type=int, help="threads that read or write image files, in each process (8, or one a core)")
    add("--device", default="auto", help="auto | cuda | cuda:1 | cpu | mps (auto)")
    add("--data_dir", help="data sets, Inception, caches (data_dir of checkpoint A's config, else data)")
    add("--vae", help="VA-VAE's weights, for checkpoints of dit_latent_sc.py (what the checkpoint's config says)")
    add("--detector", choices=("inception", "tiny"), default="inception",
        help="tiny: a small classifier trained on the reference data set; gives FD-tiny, which is not FID")
    add("--inception", metavar="FILE", help="Inception weights, instead of those in --data_dir or a download")
    add("--resize", choices=("torch", "tensorflow"), help="before Inception. torch: pytorch-fid's | tensorflow: "
        "that of torch-fidelity and ADM's evaluator (torch)")
    add("--dims", type=int, choices=(2048,), help="pytorch-fid's: its other, narrower features are not here (2048)")
    add("--save_stats", action="store_true", help="B is a new .npz for mean and covariance of A, for us and for "
        "pytorch-fid; no distance is computed")
    add("--json", metavar="FILE", help="write the result and its protocol")
    args = parser.parse_args(argv)
    tiny, drawn = args.detector == "tiny", any(str(word).endswith(".pt") for word in (args.A, args.B))
    defaults = dict(n=2000 if tiny else 50000, seed=0, nfe=None, guidance=None, vae=None, weights="ema")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif not drawn:
            fail(f"--{name} does nothing without a checkpoint")
    if args.num_workers is None:
        args.num_workers = min(8, os.cpu_count() or 1)
    for name, low in dict(n=2, seed=0, batch=1, num_workers=0).items():
        if getattr(args, name) < low:
            fail(f"--{name} {getattr(args, name)}: must be at least {low}")
    args.num_workers = max(args.num_workers, 1)         # pytorch-fid's 0: no process but this one
    for name in ("inception", "resize", "save_stats"):
        if tiny and getattr(args, name):
            fail(f"--{name} does nothing with --detector tiny")
    args.resize = args.resize or "torch"
    if args.save_stats:
        if not str(args.B).endswith(".npz"):
            fail(f"--save_stats {args.A} {args.B or ''}: name a new file, ending in .npz, behind {args.A}")
        if Path(args.B).exists():
            fail(f"--save_stats: {args.B} exists already")
    if args.save:
        path = Path(args.save)
        if not args.A.endswith(".pt"):
            fail("--save does nothing unless A is a checkpoint")
        if path.exists() and (path.suffix == ".npz" or not path.is_dir() or any(path.iterdir())):
            fail(f"--save {path}: exists already" + " and is not empty" * path.is_dir())
    for path in (args.save, args.save_stats and args.B, args.json):     # told now, not after hours
        if path and not Path(path).absolute().parent.is_dir():
            fail(f"{path}: no such folder to write in")
    return args


def start(word):
    """The device of this process. Joins the other processes, if torchrun started several."""
    kind, _, index = word.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"(auto|cpu|mps|cuda(:\d+)?)", word):
        raise UserError(f"--device {word}: must be auto, cuda, cuda:0, cuda:1, ..., cpu, or mps")
    if kind != "cpu" and not getattr(torch, kind).is_available():
        raise UserError(f"--device {word}: this machine has none; use --device cpu")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if index and WORLD > 1:
        raise UserError(f"--device {word}: each process has its own; use --device {kind}")
    if kind != "cpu" and max(here, int(index or 0) + 1) > getattr(torch, kind).device_count():
        raise UserError(f"--device {word}: this machine has {getattr(torch, kind).device_count()} for {here} processes")
    device = torch.device(kind, int(index or LOCAL_RANK)) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if kind == "cuda" and dist.is_nccl_available() else "gloo",
                                timeout=datetime.timedelta(hours=6))        # the first may train, download or decode
    return device


def main(argv=None):
    args = parse_command_line(argv)

    def report(result):
        if args.json:
            with new_file(args.json) as file:
                file.write(json.dumps(result, indent=1).encode())
        print(describe(result), flush=True)

    try:
        result = evaluate(args, start(args.device))
        agreed(lambda: report(result) if RANK == 0 else None)
    except (UserError, OSError, *(sys.modules[s].UserError for s in SCRIPTS if s in sys.modules)) as error:
        fail(error)
    except KeyboardInterrupt:
        print("fid: interrupted", file=sys.stderr)
        sys.exit(130)
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
