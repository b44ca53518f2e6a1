"""FID and Inception Score: the network, the statistics, the distance, and how a number came about.

FID (Heusel et al. 2017, arXiv 1706.08500) = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of
Gaussians fitted to features of two image sets; Inception Score (Salimans et al. 2016) = exp E_x
KL(p(y|x) || p(y)). FID equals pytorch-fid's to 1e-3, with --resize tensorflow torch-fidelity's and
ADM's. Scores compare only at equal N, reference, sampler and detector: hence the protocol line.

    python fid.py runs/.../last.pt                    # 50,000 samples and the training images
    python fid.py runs/.../last.pt --detector tiny    # no Inception at hand, or no photographs
    python fid.py samples/ cifar10_stats.npz          # folder, .npz, data set or checkpoint
    torchrun --nproc_per_node=2 fid.py ...            # share the work; the same numbers
"""
import argparse, collections, concurrent.futures, contextlib, dataclasses, datetime, functools
import hashlib, importlib, itertools, json, math, os, socket, sys, time
from pathlib import Path

import numpy as np
# OpenMP threads that wait are to sleep soon: where cores are shared, spinning costs most speed.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d"       # how the sha256 of that file begins
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
QUIET = RANK > 0 or None            # no progress bars; None: only where stderr is no terminal
BESIDE = [name for name in ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")
          if Path(__file__).with_name(f"{name}.py").exists()]
SCRIPTS = {name: importlib.import_module(name) for name in BESIDE}      # nothing else is imported
ANY = SCRIPTS[BESIDE[0]]            # one must be there; these read the same in all:
KINDS, UserError, new_file, read_image = ANY.KINDS, ANY.UserError, ANY.new_file, ANY.read_image


def digest(data):
    """The first 12 hex digits of the sha256 of bytes or of an array."""
    return hashlib.sha256(data).hexdigest()[:12]


def gather(value=None):
    """The values of all processes. Here all wait for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def in_turn(work):
    """work() in the first process of each machine, as it may download or train; then in others."""
    result = work() if LOCAL_RANK == 0 else None
    gather()
    return work() if LOCAL_RANK > 0 else result


def shares(rows, batch):
    """This process's batches, every WORLD-th, each with the index at which it begins."""
    for i in range(RANK * batch, len(rows), WORLD * batch):
        yield i, rows[i:i + batch]


# ---- 1. Inception: the network of 2015 behind every published FID, names as in torchvision -------

def unit(c_in, c_out, kernel, stride=1, padding="same"):
    padding = padding if stride == 1 else "valid"
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
    bn = nn.BatchNorm2d(c_out, eps=1e-3)
    return nn.Sequential(collections.OrderedDict(conv=conv, bn=bn, relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Branches side by side, concatenated: name=[(channels, kernel), ...]; two kernels see the same
    input. branch_pool begins with the pool, whose stride the last unit of each branch has, too."""

    def __init__(self, c_in, pool, **branches):
        super().__init__()
        self.pool = pool
        self.chains = {branch: [] for branch in branches}       # names of units: [one or two, ...]
        for branch, units in branches.items():
            c = c_in
            for k, (c_out, *kernels) in enumerate(units, 1):
                name = branch if len(units) == 1 else f"{branch}_{k}"       # branch3x3dbl_1
                names = [name] if len(kernels) == 1 else [name + "a", name + "b"]
                stride = pool.stride if k == len(units) else 1
                for name, kernel in zip(names, kernels):
                    self.add_module(name, unit(c, c_out, kernel, stride))
                self.chains[branch].append(names)
                c = c_out * len(kernels)

    def forward(self, x):
        outputs = []
        for branch, chain in self.chains.items():
            h = self.pool(x) if branch == "branch_pool" else x
            for names in chain:
                h = torch.cat([self.get_submodule(name)(h) for name in names], dim=1)
            outputs.append(h)
        return torch.cat(outputs, dim=1)


class Inception(nn.Sequential):
    """uint8 images (B, 1 or 3, H, W) -> features (B, 2048), logits (B, 1008). By the custom of the
    IS the logits have no bias: fc.bias is there because the file has it."""
    kind, dim, classes = "inception", 2048, 1008

    def __init__(self, resize="torch"):
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)     # TensorFlow's
        most, halve = nn.MaxPool2d(3, stride=1, padding=1), nn.MaxPool2d(3, stride=2)
        row, col, fork = (1, 7), (7, 1), (384, (1, 3), (3, 1))
        single, triple = [(192, 1)], [(64, 1), (96, 3), (96, 3)]

        def a(c_in, d):
            return Mixed(c_in, average, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                         branch3x3dbl=triple, branch_pool=[(d, 1)])

        def c(d):
            return Mixed(768, average, branch1x1=single, branch7x7=[(d, 1), (d, row), (192, col)],
                         branch7x7dbl=[(d, 1), (d, col), (d, row), (d, col), (192, row)],
                         branch_pool=single)

        def e(c_in, pool):
            return Mixed(c_in, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                         branch3x3dbl=[(448, 1), (384, 3), fork], branch_pool=single)

        super().__init__(collections.OrderedDict(
            Conv2d_1a_3x3=unit(3, 32, 3, stride=2), Conv2d_2a_3x3=unit(32, 32, 3, padding="valid"),
            Conv2d_2b_3x3=unit(32, 64, 3), pool_1=halve,                        # (B, 64, 73, 73)
            Conv2d_3b_1x1=unit(64, 80, 1), Conv2d_4a_3x3=unit(80, 192, 3, padding="valid"),
            pool_2=halve, Mixed_5b=a(192, 32), Mixed_5c=a(256, 64), Mixed_5d=a(288, 64),
            Mixed_6a=Mixed(288, halve, branch3x3=[(384, 3)], branch3x3dbl=triple, branch_pool=[]),
            Mixed_6b=c(128), Mixed_6c=c(160), Mixed_6d=c(160), Mixed_6e=c(192), # (B, 768, 17, 17)
            Mixed_7a=Mixed(768, halve, branch3x3=[(192, 1), (320, 3)], branch7x7x3=[
                (192, 1), (192, row), (192, col), (192, 3)], branch_pool=[]),
            Mixed_7b=e(1280, average), Mixed_7c=e(2048, most), fc=nn.Linear(2048, 1008)))
        self.resize = resize

    def forward(self, images):
        x = images.expand(-1, 3, -1, -1).float()        # grey becomes RGB
        if self.resize == "tensorflow":
            x = (resize_tensorflow(x) - 128) / 128
        else:       # without antialias
            x = 2 * F.interpolate(x / 255, size=(299, 299), mode="bilinear") - 1
        for layer in list(self)[:-1]:
            x = layer(x)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def resize_tensorflow(x, size=299):
    """Bilinear as in TensorFlow 1: pixel i of the new image lies at i * old / new, without the
    half-pixel shift of others. So do aligned corners, if both images have one pixel more."""
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, size=size + 1, mode="bilinear", align_corners=True)[..., :-1, :-1]


def load_inception(file, folder, resize):
    """From `file`, or from the published file, which lies in `folder` or is downloaded to it."""
    path, net = Path(file or Path(folder, INCEPTION_URL.rpartition("/")[2])), Inception(resize)
    try:
        if not file and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(30)        # download_url_to_file has none
            torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256, progress=False)
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:      # there are many ways to fail
        raise UserError(f"{path} holds no Inception weights ({str(error)[:300]}); put there what "
                        f"{INCEPTION_URL} serves, or give --inception FILE or --detector tiny")
    net.hash = digest(path.read_bytes())
    return net.eval()


# ---- 2. The tiny detector: a classifier of small images, trained on the spot, no download --------

class TinyDetector(nn.Module):
    """uint8 images (B, 1 or 3, S, S) -> features (B, 64), logits (B, classes)."""
    kind, dim, resize = "tiny", 64, "none"

    def __init__(self, size, classes):
        super().__init__()
        self.size, self.classes = size, classes
        step = max(1, size // 16)       # brings any image to about 16 x 16
        self.conv = nn.Sequential(
            nn.Conv2d(3, 32, 2 * step + 1, step, step, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 2, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        self.feature, self.head = nn.Linear(128, self.dim), nn.Linear(self.dim, classes)
        self.register_buffer("accuracy", torch.zeros(()))       # on the test images

    def forward(self, images):
        x = images.expand(-1, 3, -1, -1).float() / 127.5 - 1
        features = self.feature(self.conv(x).mean(dim=(2, 3)))
        return features, self.head(features.relu())


def train_detector(net, images, labels, steps=800, batch=128, lr=3e-3, shift=1):
    """On the CPU, for a number of steps: the same images, the same detector, up to rounding."""
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    gen = torch.Generator().manual_seed(0)
    for step in tqdm(range(steps), desc="training the tiny detector", unit="step", disable=QUIET):
        rows = torch.randint(len(images), (batch,), generator=gen)
        dy, dx = torch.randint(2 * shift + 1, (2,), generator=gen).tolist()
        x = F.pad(images[rows].float(), [shift] * 4, mode="replicate")
        x = x[..., dy:dy + net.size, dx:dx + net.size]      # the whole batch moves: that is cheap
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(net(x)[1], labels[rows]).backward()
        optimizer.step()


def load_detector(side, folder):
    """The detector of a data set, from `folder`, else trained and put there."""
    images, labels = side.load(True)
    if labels.max() == 0:
        raise UserError(f"--detector tiny tells classes apart, and {side.name} has only one")
    key = digest(side.facts["sha256"].encode() + labels.numpy().tobytes())
    path = Path(folder, f"detector-tiny2-{side.name}-{key}.pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = TinyDetector(images.shape[-1], int(labels.max()) + 1)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        test, answers = side.load(False)        # first, as it may be missing
        train_detector(net, images, labels)
        net.eval()
        with torch.no_grad():
            found = torch.cat([net(x)[1].argmax(dim=1) for x in test.split(500)])
        net.accuracy += (found == answers).double().mean()
        with new_file(path) as file:
            torch.save(net.state_dict(), file)
    net.hash = digest(b"".join(value.numpy().tobytes() for value in net.state_dict().values()))
    return net.eval()


# ---- 3. Statistics and distance, in float64 ------------------------------------------------------

class Statistics:
    """Mean and covariance of features, Inception Score of logits, in one pass. The IS has ten parts
    after torch-fidelity's fixed shuffle: parts of a sorted folder would hold few classes each."""

    def __init__(self, n, dim, classes, device="cpu"):
        part = np.empty(n, np.uint8)
        part[np.random.RandomState(2020).permutation(n)] = (10 * np.arange(n) + 9) // n
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=device)
        self.n, self.part = n, torch.from_numpy(part).to(device)
        self.sum, self.outer = zeros(dim), zeros(dim, dim)
        self.p, self.p_log_p = zeros(10, classes), zeros(10)

    def add(self, features, logits, start):
        """Features (B, D) and logits (B, classes) of the images start, start + 1, ... of the n."""
        features = features.to(self.sum.device).double()        # in this order: MPS has no float64
        log_p = logits.to(self.sum.device).double().log_softmax(dim=1)
        part = self.part[start:start + len(logits)].long()
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)
        self.p.index_add_(0, part, log_p.exp())
        self.p_log_p.index_add_(0, part, (log_p.exp() * log_p).sum(1))

    def gaussian(self):
        """Mean (D,) and covariance (D, D) with divisor n - 1."""
        mu = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()

    def inception_score(self):
        """Mean and population standard deviation over the parts of exp(mean KL(p(y|x) || p(y)))."""
        count = torch.bincount(self.part, minlength=10)
        p = self.p / count[:, None]
        score = (self.p_log_p / count - torch.special.xlogy(p, p).sum(1)).exp()
        return score.mean().item(), score.std(correction=0).item()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) (Dowson & Landau 1982). With S = A A^T the
    last trace is the sum of the singular values of A1^T A2, all real. The square root of S1 S2,
    which is not symmetric, becomes complex by rounding if there are fewer images than features."""
    def factor(sigma):      # A (D, rank); eigenvalues that are mere rounding go, as roots add up
        values, vectors = torch.linalg.eigh(sigma)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        return vectors[:, kept] * values[kept].sqrt()
    mu1, sigma1, mu2, sigma2 = [torch.as_tensor(v).double() for v in (mu1, sigma1, mu2, sigma2)]
    trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return max(distance.item(), 0.0)


# ---- 4. What can be compared ---------------------------------------------------------------------

@dataclasses.dataclass
class Side:
    """One side of the comparison: images that come in batches, or statistics that are known."""
    name: str
    n: int                      # images; None: statistics that do not tell
    facts: dict                 # more for the protocol
    batches: callable = None    # batch -> this process's (index of the first, uint8 (B, C, H, W))
    gaussian: tuple = None      # (mu, sigma)
    load: callable = None       # data set only: train -> (images, labels)
    cfg: object = None          # checkpoint only


def images_in_memory(name, images, load=None):
    facts = dict(sha256=digest(np.ascontiguousarray(images)))
    return Side(name, len(images), facts, functools.partial(shares, images), load=load)


def open_dataset(name, data_dir, like):
    """The training images of a data set, as a checkpoint with config `like` was trained on them."""
    readers = {}
    for script in reversed(SCRIPTS.values()):       # DiT's reads latents: any other goes before
        readers |= dict.fromkeys(script.RECIPES, script)
    if name not in readers:
        raise UserError(f"{name} is no folder, .npz, .pt, nor a data set: {', '.join(readers)}")
    cfg = readers[name].make_config(name, data_dir=data_dir)
    if like and like.dataset == name != "glyphs":
        cfg = dataclasses.replace(like, data_dir=data_dir)
    if hasattr(cfg, "tokenizer"):       # latents: the pictures that they stand for
        dit = SCRIPTS["dit_latent_sc"]
        files, _, stamps = dit.list_folders(cfg, train=True)
        bad = dit.read_facts(dit.latents_path(cfg, True)).get("bad", {})        # left out there
        files = [file for i, file in enumerate(files) if str(i) not in bad]
        crop = functools.partial(dit.centre_crop, size=cfg.size)
        return open_files(name, files, digest(repr((cfg.size, stamps, bad)).encode()), crop)
    load = functools.cache(lambda train: readers[name].load_data(cfg, train))
    return images_in_memory(name, load(True)[0], load)


def open_files(name, files, sha256, crop):
    """Pictures that are read while they are measured; crop makes pixels (3, H, W) of each."""
    pool = concurrent.futures.ThreadPoolExecutor(8)

    def read(file):
        try:
            return torch.from_numpy(np.array(crop(read_image(file))))
        except Exception as error:      # Pillow fails in many ways on damaged images
            raise UserError(f"{file} cannot be read as an image ({error})")

    def batches(batch):
        for start, some in shares(files, batch):
            for _, group in itertools.groupby(pool.map(read, some), lambda image: image.shape):
                images = torch.stack(list(group))
                yield start, images
                start += len(images)

    return Side(name, len(files), dict(sha256=sha256), batches)


def open_folder(path):
    """Images of a folder, not of its subfolders, by name. They may differ in size."""
    files = [f for f in sorted(path.glob("[!.]*")) if f.suffix.lower() in KINDS]
    if not files:
        raise UserError(f"{path} holds no images; its folders are not looked into: name one")
    sha256 = digest(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
    return open_files(str(path), files, sha256, lambda image: np.array(image).transpose(2, 0, 1))


def open_npz(path):
    """pytorch-fid's statistics (mu, sigma), or images as ADM stores them (arr_0). A file
    with mu_s is of ADM's evaluator, which resizes as TensorFlow; ours say how; others do not."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" in file:
                facts = {key: file[key].item() for key in ("n", "resize", "pixels") if key in file}
                if "mu_s" in file:
                    facts["resize"] = "tensorflow"
                gaussian = file["mu"], file["sigma"]
                return Side(str(path), facts.pop("n", None), facts, gaussian=gaussian)
            images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
        if images.dtype != torch.uint8 or images.shape[1] != 3:
            raise ValueError("arr_0 must be uint8 (N, H, W, 3)")
    except Exception as error:      # NumPy fails in many ways on damaged files
        raise UserError(f"{path} holds neither statistics (mu, sigma) nor images (arr_0): {error}")
    return images_in_memory(str(path), images)


def open_checkpoint(path, args, device, save):
    """Samples of seeds from --seed on, drawn while they are measured. save: a folder for them."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        script = SCRIPTS[state["script"]]
    except Exception as error:      # torch.load fails in many ways
        raise UserError(f"{path} is no checkpoint of {', '.join(SCRIPTS)} ({str(error)[:200]})")
    cfg, net = script.load_checkpoint(path, weights=args.weights)
    names = ("nfe", "guidance", "data_dir", "vae", "amp")
    given = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    cfg, net = script.make_config(**{**dataclasses.asdict(cfg), **given}), net.to(device)
    seeds = range(args.seed, args.seed + args.n)
    precision = str(script.autocast(cfg, device).fast_dtype).removeprefix("torch.")
    facts = dict(script=script.SCRIPT, step=state["step"], weights=args.weights, nfe=cfg.nfe,
                 precision=precision, seeds=f"{seeds[0]}-{seeds[-1]}")
    if not getattr(cfg, "uncond", True):
        facts["guidance"] = cfg.guidance

    def draw(batch):        # all draw a chunk together, and have all of it; each measures its share
        evaluations = 0
        if save and RANK == 0:
            Path(save).mkdir(parents=True)      # an error where it exists
        for i in range(0, args.n, batch * WORLD):
            images = script.sample(net, cfg, seeds[i:i + batch * WORLD])
            evaluations += net.nfe * len(images)
            if save and RANK == 0:
                pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
                for seed, picture in enumerate(pixels, seeds[i]):
                    Image.fromarray(picture).save(Path(save, f"{seed:06d}.png"))
            for start, share in shares(images, batch):      # one at most
                yield i + start, share
        facts["nfe"] = round(evaluations / args.n, 1)       # RK45 takes as many as an image needs

    return Side(str(path), args.n, facts, draw, cfg=cfg)


def open_side(word, args, device, save=None, like=None):
    path = Path(word)
    if path.is_dir() and not (like and word == like.dataset):
        return open_folder(path)
    if path.suffix == ".npz":
        return open_npz(path)
    if path.suffix == ".pt":
        return open_checkpoint(path, args, device, save)
    return open_dataset(word, args.data_dir or "data", like)


# ---- 5. Evaluation and command line --------------------------------------------------------------

@torch.no_grad()
def measure(side, net, device, batch):
    """(mu, sigma) and Inception Score of one side; the latter is None where it means nothing."""
    if side.gaussian:
        dim, resize = len(side.gaussian[0]), side.facts.get("resize", net.resize)
        if (dim, resize) != (net.dim, net.resize):
            raise UserError(f"{side.name} holds statistics of {dim} features, --resize {resize}; "
                            f"detector {net.kind} has {net.dim}, --resize {net.resize}")
        return side.gaussian, None
    stats = Statistics(side.n, net.dim, net.classes, "cpu" if device.type == "mps" else device)
    total, sizes = math.ceil(side.n / batch / WORLD), set()
    for start, images in tqdm(side.batches(batch), side.name, total, unit="batch", disable=QUIET):
        sizes.add(f"{images.shape[3]} x {images.shape[2]}")
        images = images.to(device).contiguous()     # strides would change the rounding
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):    # it has 10 bits
            stats.add(*net(images), start)
    if WORLD > 1:
        for part in (stats.sum, stats.outer, stats.p, stats.p_log_p):
            dist.all_reduce(part)
    sizes = set().union(*gather(sizes))
    side.facts["pixels"] = sizes.pop() if len(sizes) == 1 else f"of {len(sizes)} sizes"
    score = stats.inception_score() if net.kind == "inception" and side.n >= 10 else None
    return stats.gaussian(), score


def measure_reference(side, net, args, device):
    """(mu, sigma), kept for next time by the hashes of detector and images."""
    sha = side.facts.get("sha256")      # samples have none
    cache = Path(args.data_dir, f"stats2-{net.kind}-{net.resize}-{net.hash}-{sha}.npz")
    if gather(cache.exists())[0]:
        known = open_npz(cache)
        side.facts.update(known.facts, cached=True)
        return known.gaussian
    (mu, sigma), _ = measure(side, net, device, args.batch)
    if sha and RANK == 0:
        facts = dict(n=side.n, resize=net.resize, pixels=side.facts["pixels"])
        with contextlib.suppress(OSError), new_file(cache) as file:     # where one may write
            np.savez(file, mu=mu, sigma=sigma, **facts)
    return mu, sigma


def score_name(n):
    """FID is what 50,000 images give. It falls as their number grows: other scores state theirs."""
    if n is None or n >= 50000:
        return "FID" if n else "FID-?"      # statistics may not tell
    return f"FID-{n}" if n % 1000 else f"FID-{n // 1000}k"


def evaluate(args, device):
    """Everything that will be reported, as a dict."""
    begin, tiny = time.time(), args.detector == "tiny"
    a = in_turn(lambda: open_side(args.A, args, device, args.save))
    args.data_dir = args.data_dir or getattr(a.cfg, "data_dir", "data")
    b = in_turn(lambda: open_side(args.B or a.cfg.dataset, args, device, like=a.cfg))
    if tiny and not b.load:
        raise UserError("--detector tiny learns from a data set of pixels (not of latents), which "
                        "must be the reference")
    net = in_turn(lambda: load_detector(b, args.data_dir) if tiny else
                  load_inception(args.inception, args.data_dir, args.resize)).to(device)
    target = measure_reference(b, net, args, device)
    gaussian, inception_score = measure(a, net, device, args.batch)
    whole = b.load or (a.cfg and b.name == a.cfg.dataset)       # B's size is no choice
    counts = [a.n] if whole else [a.n, b.n]
    name = "FD-tiny" if tiny else score_name(None if None in counts else min(counts))
    result = dict(inception_score=inception_score, score=name,
                  value=frechet_distance(*gaussian, *target))
    if tiny:        # as many test images as A has, if there are
        test = in_turn(lambda: b.load(False)[0])
        test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:a.n]]
        floor, _ = measure(images_in_memory("test images", test), net, device, args.batch)
        result |= dict(floor=frechet_distance(*floor, *target), floor_n=len(test),
                       detector_accuracy=net.accuracy.item())
    for key, side in dict(A=a, B=b).items():
        result[key] = dict(name=side.name, n=side.n, **side.facts)
    return result | dict(detector=net.kind, detector_sha256=net.hash, features=net.dim,
                         resize=net.resize, processes=WORLD, seconds=round(time.time() - begin, 1))


def report(r, path):
    """Two lines: the score, and how it came about. For the tiny detector a third. And warnings."""
    head, protocol = "{score} {value:.4f}".format(**r), ""
    if r["inception_score"]:
        head += "   Inception Score {:.3f} +- {:.3f}".format(*r["inception_score"])
    for key in "AB":
        side = r[key]
        words = [f"{name} {value}" for name, value in side.items() if name != "name"]
        protocol += f"{key} {side['name']}, {', '.join(words)}; "
        if side["n"] and side["n"] < r["features"]:
            print(f"WARNING: {side['name']} has {side['n']} images, too few for a covariance: "
                  "the score is much too high", file=sys.stderr)
    protocol += "detector {detector} {detector_sha256}, resize {resize}; {seconds} s".format(**r)
    print(f"{head}\nprotocol: {protocol}", flush=True)
    if "floor" in r:
        print("floor: FD-tiny {floor:.4f} for {floor_n} test images, about what a perfect model "
              "would get; the detector's test accuracy is {detector_accuracy:.2%}".format(**r))
    a, b = r["A"].get("pixels"), r["B"].get("pixels")
    if a and b and a != b:
        print(f"note: A has {a} pixels, B {b}: the score sees it", file=sys.stderr)
    if path:
        Path(path).write_text(json.dumps(r, indent=1))


def fail(message):
    """Ends the process with one line, status 2. torchrun then ends the others."""
    time.sleep(5 if LOCAL_RANK > 0 else 0)      # the first one says it
    tqdm.write(f"fid: {' '.join(str(message).split())}", file=sys.stderr)
    os._exit(2) if WORLD > 1 else sys.exit(2)


def parse_command_line(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("A", help="folder of images, .npz, checkpoint (.pt), or data set")
    add("B", nargs="?", help="the reference, likewise (the training images of checkpoint A)")
    add("--n", "--images", type=int, help="images to draw (50000; tiny 1000); torchrun: --images")
    add("--seed", type=int, default=0, help="image i has seed SEED + i (0)")
    add("--weights", choices=("ema", "model"), default="ema", help="averaged (ema) | raw (model)")
    add("--nfe", type=int, help="network evaluations per image (the run's)")
    add("--guidance", type=float, help="of classifier-free guidance, 1: none (the run's)")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), help="precision of drawing (the run's)")
    add("--vae", help="VA-VAE's weights, for dit_latent_sc.py (the run's)")
    add("--save", metavar="DIR", help="keep the images drawn from A, as PNGs in a new folder")
    add("--batch", type=int, default=64, help="images at a time (64; fewer are drawn more slowly)")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto")
    add("--data_dir", help="data sets, Inception, caches (checkpoint A's, else data)")
    add("--detector", choices=("inception", "tiny"), default="inception",
        help="tiny: a small classifier, trained on the reference; gives FD-tiny, which is not FID")
    add("--inception", metavar="FILE", help="its weights (in --data_dir, else downloaded)")
    add("--resize", choices=("torch", "tensorflow"), default="torch", help="as pytorch-fid | ADM's")
    add("--json", metavar="FILE", help="write the result and its protocol")
    args = parser.parse_args(argv)
    if not args.B and not args.A.endswith(".pt"):
        fail(f"compare {args.A} with what? B may be left out after a checkpoint only")
    args.n = args.n or (1000 if args.detector == "tiny" else 50000)
    return args


def start(word):
    """The device of this process. Joins the other processes, if torchrun started several."""
    if word == "auto":
        word = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if word != "cpu" and LOCAL_RANK >= getattr(torch, word).device_count():
        raise UserError(f"--device {word}: this machine has none for process {LOCAL_RANK + 1}")
    if WORLD > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE is {WORLD} without torchrun's other variables: use torchrun")
    if word == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD > 1:       # the others may wait for hours until the first has decoded ImageNet
        backend = "nccl" if word == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
    return torch.device(word, LOCAL_RANK) if word == "cuda" else torch.device(word)


def main(argv=None):
    args = parse_command_line(argv)
    try:
        result = evaluate(args, start(args.device))
        if RANK == 0:
            report(result, args.json)
    except (OSError, UserError, *[script.UserError for script in SCRIPTS.values()]) as error:
        fail(error)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    if WORLD > 1:       # gloo's threads outlive its group, and may abort Python at its end
        os._exit(0)
