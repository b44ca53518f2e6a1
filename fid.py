"""FID and Inception Score in one file: Inception, statistics, distance, and a line that says how the number came about.

Papers    FID: Heusel et al. 2017 (arXiv 1706.08500). Inception Score (IS): Salimans et al. 2016 (arXiv 1606.03498).
Maths     FID = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of Gaussians fitted to features of two image sets
          IS  = exp E_x KL(p(y|x) || p(y))
Numbers   Network, resize and statistics are pytorch-fid's: same weights, same FID to 1e-3. Scores compare only at equal
          N, reference, sampler and detector, hence the protocol line. The IS uses the same resize; torch-fidelity's
          uses TensorFlow 1's, which changes its value.

Run       python fid.py runs/.../last.pt                   # 50,000 samples against the training images: FID and IS
          python fid.py runs/.../last.pt --n 10000         # sooner, but biased upwards, and called FID-10k
          python fid.py samples/ cifar10                   # A and B: folder of images, .npz, data set, or checkpoint
          python fid.py samples/ cifar10_stats.npz         # .npz: pytorch-fid's (mu, sigma), or ADM's images (arr_0)
          python fid.py runs/.../last.pt --detector tiny   # no Inception at hand, or images that are no photographs
"""
import argparse, dataclasses, functools, hashlib, http.client, importlib, itertools, json, os, shutil, sys, time
import urllib.request, zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

SCRIPTS = ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")     # a checkpoint may name these, and nothing else
EXTENSIONS = "bmp jpg jpeg pgm png ppm tif tiff webp".split()
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"       # how the sha256 of that file begins


class UserError(ValueError):
    """What the user can mend. The command line prints it as one line and ends with status 2."""


def digest(parts):
    """The first 12 hex digits of the sha256 of bytes-like parts, one after the other."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:12]


def write_atomic(path, write):
    """write(file) fills a temporary file, which then gets its name: nobody ever finds half a file."""
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_tensors(path):
    """What torch.save wrote; code in it is refused, not run. Damaged files make torch.load stumble in many ways."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be loaded ({str(error)[:200]})")


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


class Inception(nn.Module):
    """uint8 images (B, 1 or 3, H, W) -> features (B, 2048), logits (B, 1008). By the custom of the IS the logits have
    no bias: fc.bias is there because the file has it."""
    kind, dim, classes = "inception", 2048, 1008

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
        x = images.expand(-1, 3, -1, -1).float() / 255                                  # grey becomes RGB
        x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)     # no antialiasing
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))       # (B, 64, 147, 147)
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
            with tqdm.wrapattr(reply, "read", total=reply.length, desc=path.name, disable=None) as stream:
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
            write_atomic(path, download)
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
    kind, dim = "tiny", DETECTOR["features"]

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
    for step in tqdm(range(steps), desc="training the tiny detector", unit="step", disable=None):
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
        net, (test, answers) = train_detector(images, labels), side.load(False)
        with torch.no_grad():
            right = sum((net(x)[1].argmax(1) == y).sum().item() for x, y in zip(test.split(500), answers.split(500)))
        write_atomic(path, lambda file: torch.save(dict(model=net.state_dict(), accuracy=right / len(test)), file))
    net, state = TinyDetector(images.shape[-1], int(labels.max()) + 1), load_tensors(path)
    net.load_state_dict(state["model"])
    net.hash, net.accuracy = digest(v.numpy() for v in net.state_dict().values()), state["accuracy"]
    return net.eval()


# ---- 3. Statistics and distance, in float64 --------------------------------------------------------------------------

class Statistics:
    """Mean and covariance of features, and Inception Score of logits, of n images in one pass and constant memory.
    For the IS, images fall into ten parts after a fixed shuffle (torch-fidelity's): parts of a folder sorted by class
    would hold few classes each."""

    def __init__(self, n, dim, classes, device="cpu"):
        part, order = np.empty(n, np.int64), np.random.RandomState(2020).permutation(n)
        for k in range(10):
            part[order[k * n // 10:(k + 1) * n // 10]] = k
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self.part, self.n, self.seen = torch.from_numpy(part).to(device), n, 0
        self.sum, self.outer, self.p, self.p_log_p = zeros(dim), zeros(dim, dim), zeros(10, classes), zeros(10)

    def add(self, features, logits):
        features, log_p = features.to(self.sum).double(), logits.to(self.sum).log_softmax(dim=1)
        part = self.part[self.seen:self.seen + len(logits)]
        self.seen += len(logits)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)
        self.p.index_add_(0, part, log_p.exp())
        self.p_log_p.index_add_(0, part, (log_p.exp() * log_p).sum(1))

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

    S1 S2 is not symmetric, so rounding makes its square root complex when there are fewer images than features. But it
    has the eigenvalues of S1^(1/2) S2 S1^(1/2), a symmetric matrix: they are real, and what falls below 0 is rounding.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(np.asarray(v), dtype=torch.float64) for v in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return max(((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace).item(), 0.0)


# ---- 4. What can be compared -----------------------------------------------------------------------------------------

@dataclasses.dataclass
class Side:
    """One side of the comparison: images that come in batches, or statistics that are known already."""
    name: str
    n: int                      # images; None: statistics that do not tell
    batches: callable = None    # batch size -> iterator over uint8 (B, C, H, W)
    gaussian: tuple = None      # (mu, sigma)
    hash: str = None            # of the image bytes
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
            sha = digest([str(images.shape).encode(), images.numpy()])
            return Side(name, len(images), images.split, load=load, hash=sha)
    raise UserError(f"{name}: no such file or folder, and no data set; there are {', '.join(names)}")


def open_folder(path):
    """Images of a folder, not of its subfolders, by name. They may differ in size. The hash is that of the files."""
    files = sorted(f for f in path.iterdir() if f.suffix[1:].lower() in EXTENSIONS and f.is_file())
    if not files:
        raise UserError(f"{path} holds no images ({' '.join(EXTENSIONS)})")

    def read(file):
        try:
            with Image.open(file) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except Exception as error:      # damaged images make Pillow stumble in many ways
            raise UserError(f"{file} cannot be read as an image ({error})")

    def batches(batch):
        with ThreadPoolExecutor() as pool:
            for i in range(0, len(files), batch):
                for _, group in itertools.groupby(pool.map(read, files[i:i + batch]), key=lambda image: image.shape):
                    yield torch.stack(list(group))

    return Side(str(path), len(files), batches, hash=digest(f.read_bytes() for f in files))


def open_npz(path):
    """pytorch-fid's statistics (mu, sigma), or images as ADM stores them (arr_0). Pickles inside are refused."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not in npz format")
        with np.load(path, allow_pickle=False) as file:
            data = {k: file[k] for k in ("mu", "sigma", "n") if k in file} if "mu" in file else {**file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error})")
    mu, sigma, images = (data.get(k, np.empty(0)) for k in ("mu", "sigma", "arr_0"))
    if mu.size and sigma.shape == 2 * mu.shape and np.isfinite(mu.sum() + sigma.sum()):
        return Side(str(path), int(data["n"]) if "n" in data else None, gaussian=(mu, sigma))
    if images.dtype == np.uint8 and images.shape[3:] == (3,):
        sha = digest([str(images.shape).encode(), np.ascontiguousarray(images)])
        return Side(str(path), len(images), torch.from_numpy(images).permute(0, 3, 1, 2).split, hash=sha)
    raise UserError(f"{path} holds neither statistics (mu (D,), sigma (D, D)) nor images (arr_0, uint8 (N, H, W, 3))")


def open_checkpoint(path, args, device):
    """Samples of a checkpoint, drawn while they are measured: image i comes from seed i."""
    state = load_tensors(path)
    name = state.get("script") if isinstance(state, dict) else None
    if not (script := find_script(name)):
        raise UserError(f"{path} is no checkpoint of a script beside fid.py ({', '.join(SCRIPTS)}), but of {name}")
    cfg, net = script.load_checkpoint(path, weights=args.weights)
    changes = {name: getattr(args, name) for name in ("nfe", "guidance", "data_dir") if getattr(args, name) is not None}
    if "guidance" in changes and getattr(cfg, "uncond", True):
        raise UserError(f"--guidance {args.guidance:g}: does nothing, the network of {path} is told no classes")
    cfg = script.make_config(**{**dataclasses.asdict(cfg), **changes})
    net, seeds = net.to(device), range(args.seed, args.seed + args.n)
    facts = dict(script=name, step=state.get("step"), weights=args.weights.replace("model", "raw"), nfe=0)
    facts |= {} if getattr(cfg, "uncond", True) else dict(guidance=cfg.guidance)

    def draw(batch):
        evaluations = 0
        for i in range(0, args.n, batch):
            images = script.sample(net, cfg, seeds[i:i + batch])
            evaluations += net.nfe * len(images)
            yield images
        side.facts["nfe"] = round(evaluations / args.n, 1)      # RK45 takes as many as an image needs
    side = Side(str(path), args.n, draw, cfg=cfg, facts=dict(facts, seeds=[seeds[0], seeds[-1]]))
    return side


def open_side(word, args, device):
    path, known = Path(word), Path(word).suffix in (".npz", ".pt")
    if path.is_dir():
        return open_folder(path)
    if known != path.exists():
        raise UserError(f"{path}: " + ("no such file" if known else "neither folder, .npz nor checkpoint (.pt)"))
    if not known:
        return open_dataset(word, args.data_dir or "data")
    return open_npz(path) if path.suffix == ".npz" else open_checkpoint(path, args, device)


# ---- 5. Evaluation ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def measure(side, net, device, batch):
    """(mu, sigma) and Inception Score of one side; the latter is None where it means nothing."""
    if side.gaussian:
        if len(side.gaussian[0]) != net.dim:
            raise UserError(f"{side.name} has {len(side.gaussian[0])} features, and detector {net.kind} has {net.dim}")
        return side.gaussian, None
    if side.n < 2:
        raise UserError(f"{side.name} holds one image; a covariance needs two")
    stats = Statistics(side.n, net.dim, net.classes, "cpu" if device.type == "mps" else device)     # MPS has no float64
    with tqdm(total=side.n, desc=side.name, unit="image", disable=None) as bar:
        for images in side.batches(batch):
            with torch.backends.cudnn.flags(allow_tf32=False):      # its 10 bits of mantissa show in the third digit
                stats.add(*net(images.to(device).contiguous()))     # the order in memory would change the rounding
            bar.update(len(images))
    return stats.gaussian(), stats.inception_score() if net.kind == "inception" and side.n >= 10 else None


def save_stats(path, gaussian, n):
    write_atomic(path, lambda file: np.savez(file, mu=gaussian[0], sigma=gaussian[1], **({"n": n} if n else {})))


def score_name(kind, n):
    """FID is what 50,000 images give. It falls as their number grows, so other scores state theirs. None: not known."""
    if kind == "tiny":
        return "FD-tiny"
    return "FID-?" if n is None else "FID" if n >= 50000 else f"FID-{n}" if n % 1000 else f"FID-{n // 1000}k"


def evaluate(args, device):
    """Everything that will be reported, as a dict."""
    start, a = time.time(), open_side(args.A, args, device)
    folder = args.data_dir = args.data_dir or getattr(a.cfg, "data_dir", "data")
    if not args.B and not a.cfg:
        raise UserError(f"compare {a.name} with what? B may be left out after a checkpoint only")
    if args.B is None or a.cfg and args.B == a.cfg.dataset and not Path(args.B).exists():
        b = open_dataset(a.cfg.dataset, folder, a.facts["script"], like=a.cfg)
    else:
        b = open_side(args.B, args, device)
    if args.detector == "tiny" and not b.load:
        raise UserError(f"--detector tiny learns from a data set, so the reference must be one, not {b.name}")
    net = (load_detector(b, folder) if args.detector == "tiny" else load_inception(args.inception, folder)).to(device)
    cache = Path(folder) / f"stats-{net.kind}-{net.hash}-{b.hash}.npz"      # same detector and images, same statistics
    b.facts["cached"] = bool(b.hash) and cache.exists()
    target, _ = measure(open_npz(cache) if b.facts["cached"] else b, net, device, args.batch)
    if b.hash and not b.facts["cached"]:
        save_stats(cache, target, b.n)
    gaussian, score = measure(a, net, device, args.batch)
    fewest = a.n if b.load or not b.n or not a.n else min(a.n, b.n)         # a data set is all there is
    result = dict(score=score_name(net.kind, fewest), value=frechet_distance(*gaussian, *target), inception_score=score)
    if args.detector == "tiny":     # what a perfect model would get: as many test images as A has, if there are
        test = b.load(False)[0]
        test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:a.n]]
        (floor, _), n = measure(Side("test images", len(test), test.split), net, device, args.batch), len(test)
        result |= dict(floor=frechet_distance(*floor, *target), floor_n=n, detector_accuracy=net.accuracy)
    for side in (a, b):
        if side.n and side.n < net.dim:
            print(f"WARNING: {side.name} has {side.n} images for {net.dim} features: too few for a covariance, so the "
                  "score is much too high; compare it with scores of the same N only", file=sys.stderr)
    if args.save_stats:
        save_stats(args.save_stats, gaussian, a.n)
    sides = {k: dict(name=side.name, n=side.n, sha256=side.hash, **side.facts) for k, side in dict(A=a, B=b).items()}
    return result | sides | dict(detector=net.kind, detector_sha256=net.hash, seconds=round(time.time() - start, 1))


def describe(r):
    """Two lines: the score, and how it came about. For the tiny detector a third."""
    drawn = "{script} at step {step}, {weights} weights, {nfe:g} NFE, seeds {seeds[0]}-{seeds[1]}"
    sides = [f"{k} {s['name']}, N {s['n'] or 'unknown'}" + f", sha256 {s['sha256']}" * bool(s["sha256"])
             + (" (statistics from the cache)" if s.get("cached") else "")
             + (", " + drawn.format(**s) if "script" in s else "")
             + (f", guidance {s['guidance']:g}" if "guidance" in s else "") for k, s in (("A", r["A"]), ("B", r["B"]))]
    score = "   Inception Score {:.3f} +- {:.3f}".format(*r["inception_score"]) if r["inception_score"] else ""
    floor = ("\nfloor: FD-tiny {floor:.4f} for {floor_n} test images, about what a perfect model would get; the "
             "detector's test accuracy is {detector_accuracy:.2%}").format(**r) if "floor" in r else ""
    return (f"{r['score']} {r['value']:.4f}{score}\nprotocol: {'; '.join(sides)}; "
            f"detector {r['detector']} {r['detector_sha256']}; {r['seconds']} s{floor}")


# ---- 6. Command line -------------------------------------------------------------------------------------------------

def fail(message):
    """The end of a run that the user can mend: one line, status 2."""
    print(f"fid: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def parse_command_line(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("A", help="folder of images, .npz, checkpoint (.pt), or data set (what exists as a folder is a folder)")
    add("B", nargs="?", help="the reference, likewise; default: the training images of checkpoint A's data set")
    add("--n", type=int, help="images to draw from a checkpoint (50000; 2000 with --detector tiny)")
    add("--seed", type=int, help="image i has seed SEED + i (0)")
    add("--nfe", type=int, help="network evaluations per image (what the checkpoint's config says)")
    add("--guidance", type=float, help="scale of classifier-free guidance, 1: none (what the checkpoint's config says)")
    add("--weights", choices=("ema", "model"), help="ema: averaged | model: raw (ema)")
    add("--batch", type=int, default=64, help="images at a time (64)")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto")
    add("--data_dir", help="data sets, Inception, caches (data_dir of checkpoint A's config, else data)")
    add("--detector", choices=("inception", "tiny"), default="inception",
        help="tiny: a small classifier trained on the reference data set; gives FD-tiny, which is not FID")
    add("--inception", metavar="FILE", help="Inception weights, instead of those in --data_dir or a download")
    add("--save_stats", metavar="FILE.npz", help="write mean and covariance of A, for us and for pytorch-fid")
    add("--json", metavar="FILE", help="write the result and its protocol")
    args = parser.parse_args(argv)
    drawn = any(str(word).endswith(".pt") for word in (args.A, args.B))
    for name, value in dict(n=2000 if args.detector == "tiny" else 50000, seed=0, nfe=None, guidance=None,
                            weights="ema").items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif not drawn:
            fail(f"--{name} does nothing without a checkpoint")
    for name, low in dict(n=2, seed=0, batch=1).items():
        if getattr(args, name) < low:
            fail(f"--{name} {getattr(args, name)}: must be at least {low}")
    if args.inception and args.detector == "tiny":
        fail("--inception does nothing with --detector tiny")
    for name in ("save_stats", "json"):     # told now, not after hours
        if (path := getattr(args, name)) and not Path(path).absolute().parent.is_dir():
            fail(f"--{name} {path}: no such folder")
    if args.save_stats and not args.save_stats.endswith(".npz"):
        fail(f"--save_stats {args.save_stats}: the name must end in .npz")
    return args


def main(argv=None):
    args = parse_command_line(argv)
    kind = args.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind != "cpu" and not getattr(torch, kind).is_available():
        fail(f"--device {kind}: this machine has none; use --device cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("this is one process: start it with python, not with torchrun")
    try:
        result = evaluate(args, torch.device(kind))
        if args.json:
            write_atomic(args.json, lambda file: file.write(json.dumps(result, indent=1).encode()))
        print(describe(result))
    except (UserError, OSError, *(sys.modules[s].UserError for s in SCRIPTS if s in sys.modules)) as error:
        fail(error)


if __name__ == "__main__":
    main()
