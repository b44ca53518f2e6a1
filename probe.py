"""Linear probing: how well does one linear layer on frozen features classify?

Paper   Appendix A, Tables 10 and 11, Fig. 4 and 5: frozen averaged (ema) network, images noised to
        one time, features of one layer averaged over positions, one linear layer, Adam 4e-3 with a
        cosine to 0, 15 epochs on CIFAR and 30 elsewhere; latents of ImageNet: 2e-3, batch 1440. No
        batch is named for pixels: 512 here, as 4e-3 is 4 times DDAE's rate for 128.
Here    The cell (time, layer) is chosen on a tenth of the *training* images; the test set is used
        once, at the end. DDAE draws new flips and noise in every epoch (--draws 15); here two draws
        are kept and used in turn, and all layers' heads are trained together. Also ridge regression
        of each cell: if far better, Adam has ended early; and a vote of the 20 nearest neighbours.
Run     python probe.py runs/.../last.pt                            # all layers, time of Table 10
        python probe.py runs/.../last.pt --layers out_2 --draws 15  # one cell, as in the paper
        python probe.py runs/A/last.pt runs/B/last.pt --tokens      # curves over layers (Fig. 4, 5)
        python probe.py --script uvit_sc --init U-ViT.pth --dataset cifar10    # weights of others
        torchrun --nproc_per_node=4 probe.py runs/.../last.pt       # images and layers are shared
Checkpoints come first. Settings of a script may follow: --device, --amp, --data_dir, --vae.
"""
import argparse, dataclasses, functools, importlib, json, math, os, shutil, sys, tempfile, time
from pathlib import Path

# OpenMP threads that wait are to sleep soon: where cores are shared, spinning costs most speed.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

SCRIPTS = ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CHUNK = 256                         # images that the network sees at a time, with one noise stream
IN_MEMORY = 4 * 10**9               # bytes of features that a process keeps; more go to a file


def fail(message):      # for a reason that the user can fix: one line, status 2
    print(f"probe: {message}", file=sys.stderr, flush=True)
    os._exit(2) if WORLD > 1 else sys.exit(2)


def everywhere(value):      # what each process has
    values = [value] * WORLD
    if WORLD > 1:
        torch.distributed.all_gather_object(values, value)
    return values


# ---- 1. Features ---------------------------------------------------------------------------------

def reserve(shape, folder):
    """A function that returns an array of float16. Beyond IN_MEMORY bytes, it lies in a file that
    ends with the process, and is mapped anew each time, so that what was read is let go."""
    size = 2 * math.prod(shape)
    if size <= IN_MEMORY:
        array = np.empty(shape, np.float16)
        return lambda: array
    need, free = WORLD * size / 1e9, shutil.disk_usage(folder).free / 1e9
    room = f"features take {need:.3g} GB in {folder}, where {free:.3g} GB are free"
    if need > free:
        fail(f"{room}: use fewer --layers, --draws or --images, or another --out")
    if RANK == 0:
        print(f"note: {room}, until the probe ends", flush=True)
    file = tempfile.TemporaryFile(dir=folder)
    return lambda: np.memmap(file, np.float16, "r+", shape=shape)


class Features:
    """Features at one time, (draws, N, layers, D). A draw is made when it is first asked for; all
    are kept, or one if each epoch has its own. share: every WORLD-th layer, with heads here."""
    def __init__(self, images, t, layers, args, draws, flip=False, share=False):
        self.images, self.t, self.layers, self.args, self.flip = images, t, layers, args, flip
        self.own = slice(RANK, None, WORLD) if share else slice(None)
        self.draws, self.array = draws, None
        self.held = [None] * (len(draws) if len(draws) < args.epochs else 1)

    @torch.inference_mode()
    def chunk(self, c, draw):       # (n, layers, D), a function of (seed, draw, c)
        module, net, device = self.args.module, self.args.net, self.args.device
        images = self.images[c * CHUNK:(c + 1) * CHUNK].to(device)
        gen = module.rng(self.args.seed, draw // 2, c, 2, device=device)
        coins = torch.rand(len(images), generator=gen, device=device) < 0.5
        view = torch.zeros(len(images), 9)      # no augmentation; latents read four columns
        view[:, 0] = (coins ^ bool(draw % 2)) & self.flip       # two draws: opposite halves
        x_0, _ = module.make_view(images, view)
        gen = module.rng(self.args.seed, draw, c, 1, device=device)
        eps = torch.randn(x_0.shape, generator=gen, device=device)
        place = torch.rand(len(images), generator=gen, device=device)

        def pool(k, h):         # also token_k, one position of each map (Fig. 4)
            tokens = net.positions(h)                               # (B, N, D)
            own = (place * tokens.shape[1]).long().view(-1, 1, 1)
            return net.pooled(k, h) | {f"token_{k}": tokens.take_along_dim(own, 1)[:, 0].float()}
        with module.autocast(net.cfg, device):
            feats = module.features(net, x_0, self.t, eps, last=self.layers[-1], pool=pool)
        # Narrow layers get zeros, which change little; float16 rounds off less than noise adds.
        feats = torch.nn.utils.rnn.pad_sequence([feats[layer].T for layer in self.layers])
        return feats.permute(2, 1, 0).clamp(-65504, 65504).half().cpu().numpy()

    def compute(self, slot, draw):      # the processes compute a chunk each and exchange them
        N, chunks = len(self.images), math.ceil(len(self.images) / CHUNK)
        for turn in tqdm(range(0, chunks, WORLD), "features", disable=RANK > 0 or None):
            feats = self.chunk(min(turn + RANK, chunks - 1), draw)      # none left: the last again
            for c, part in enumerate(everywhere(feats)[:chunks - turn], turn):
                part = part[:, self.own]
                if self.array is None:
                    self.array = reserve((len(self.held), N, *part.shape[1:]), self.args.folder)
                self.array()[slot, c * CHUNK:(c + 1) * CHUNK] = part
        self.held[slot] = draw

    def get(self, epoch, rows, layers=slice(None)):     # (layers, n, D) of some images
        draw = self.draws[epoch % len(self.draws)]
        slot = draw % len(self.held)
        if self.held[slot] != draw:
            self.compute(slot, draw)
        feats = [self.array()[slot][some.numpy(), layers] for some in rows.split(64)]   # few pages
        return torch.from_numpy(np.concatenate(feats)).transpose(0, 1).contiguous()

    def of(self, layer):    # get for one layer
        i = self.layers.index(layer)
        return functools.partial(self.get, layers=slice(i, i + 1))


# ---- 2. Heads: get(epoch, rows) gives the features (cells, n, D) of some images in an epoch ------

def fit(get, rows, labels, args):
    """Trains one linear layer for each cell, all at once, on the images `rows` (Table 11). The
    cells' gradients are independent and Adam works by element: this equals separate training.
    args: seed, device, epochs, lr, batch. -> W (cells, D, classes), b (cells, 1, classes)."""
    gen, classes = torch.Generator().manual_seed(args.seed), int(labels.max()) + 1
    cells, _, D = get(0, rows[:1]).shape
    heads = []
    for shape in (1, D, classes), (1, 1, classes):
        start = (torch.rand(*shape, generator=gen) * 2 - 1) * (1 / math.sqrt(D))    # as nn.Linear
        heads.append(start.repeat(cells, 1, 1).to(args.device).requires_grad_())    # all alike
    W, b = heads
    optimizer = torch.optim.Adam(heads, fused=True)
    for epoch in range(args.epochs):
        cosine = math.cos(math.pi * epoch / args.epochs)
        optimizer.param_groups[0]["lr"] = args.lr * (1 + cosine) / 2
        for some in rows[torch.randperm(len(rows), generator=gen)].split(args.batch):
            x, y = get(epoch, some).to(args.device).float(), labels[some].to(args.device)
            logits = torch.baddbmm(b, x, W).flatten(0, 1)           # (cells * batch, classes)
            loss = F.cross_entropy(logits, y.repeat(cells), reduction="sum") / len(some)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return W.detach(), b.detach()


def ridge(get, rows, labels, args, penalty=1e-4):
    """Other heads of the same shapes: least squares of the classes, as 0 and 1, on standardised
    features of epoch 0, in closed form. args: device. penalty helps where features are dead."""
    device = "cpu" if args.device.type == "mps" else args.device        # MPS has no float64
    xx = xy = 0
    for some in rows.split(2000):
        x = F.pad(get(0, some).to(device).double(), (0, 1), value=1)    # the last column: ones
        y = F.one_hot(labels[some], int(labels.max()) + 1).to(device).double()
        xx = xx + x.mT @ x / len(rows)                                  # (cells, D + 1, D + 1)
        xy = xy + x.mT @ y / len(rows)                                  # (cells, D + 1, classes)
    mean, share = xx[:, :-1, -1:], xy[:, -1:]
    covariance = xx[:, :-1, :-1] - mean @ mean.mT
    scale = covariance.diagonal(dim1=1, dim2=2)[..., None].clamp(min=0).sqrt() + 1e-6
    correlation = covariance / (scale @ scale.mT) + penalty * torch.eye(scale.shape[1]).to(scale)
    W = torch.linalg.solve(correlation, (xy[:, :-1] - mean @ share) / scale) / scale
    return W.float(), (share - mean.mT @ W).float()


def accuracy(heads, get, labels, rows):     # of each cell, a list in %, on the images `rows`
    (W, b), right = heads, 0
    for some in rows.split(2000):
        logits = torch.baddbmm(b, get(0, some).to(W.device).float(), W)
        right = right + (logits.argmax(-1).cpu() == labels[some]).sum(1)
    return [100 * n / len(rows) for n in right.tolist()]


def neighbours(get, labels, test, test_labels, device, k=20, T=0.07):
    """Accuracy in % of a vote of the k training images whose features are nearest in angle to those
    of a test image, test (n, D). A vote counts exp(cosine / T): Wu et al. 2018, with DINO's k."""
    test = F.normalize(test.to(device).float(), dim=1)
    best = torch.empty(len(test), 0, device=device)             # cosines (n, k)
    votes = torch.empty_like(best, dtype=torch.long)            # and their classes
    for rows in torch.arange(len(labels)).split(500):
        train = F.normalize(get(0, rows)[0].to(device).float(), dim=1)
        best, which = torch.cat([best, test @ train.T], dim=1).topk(min(k, len(labels)), dim=1)
        y = labels[rows].to(device).expand(len(test), -1)
        votes = torch.cat([votes, y], dim=1).gather(1, which)
    score = torch.zeros(len(test), int(labels.max()) + 1, device=device)
    score.scatter_add_(1, votes, ((best - 1) / T).exp())
    return 100 * (score.argmax(1).cpu() == test_labels).sum().item() / len(test)


# ---- 3. The protocol -----------------------------------------------------------------------------

def pixels(module, images, flip, epoch, rows):      # mirrored in every other epoch
    view = torch.zeros(len(rows), 9)
    view[:, 0] = epoch % 2 * flip
    return module.make_view(images[rows], view)[0].flatten(1)[None]


def probe(cfg, args):
    """The whole protocol for one network; returns the result as a dict of plain types."""
    with args.module.one_process_first():
        images, labels = args.module.load_data(cfg, train=True)
        test_images, test_labels = args.module.load_data(cfg, train=False)
    if labels.min() == labels.max():
        fail(f"{cfg.dataset} has images of one class only, so there is nothing to tell apart")
    N, gen = len(labels), torch.Generator()
    order = torch.randperm(N, generator=gen.manual_seed(args.seed))
    if 0 < args.n < N:
        N, some = args.n, order[:args.n].sort()[0]
        images, labels = images[some], labels[some]
        order = torch.randperm(N, generator=gen.manual_seed(args.seed))
    # 1. Choose (time, layer) on held-out training images; for ridge another layer, at this time.
    held, rest = order[:max(1, N // 10)], order[max(1, N // 10):].sort()[0]
    t, layer, ridge_layer, best = args.times[0], args.layers[0], args.layers[0], None
    table, ridge_table, draws = [], [], range(args.draws)
    for time_ in args.times if args.choose else []:
        feats = Features(images, time_, args.layers, args, draws, cfg.flip, share=True)
        for train, rows in (fit, table), (ridge, ridge_table):
            heads = train(feats.get, rest, labels, args)
            rows.append([0] * len(args.layers))
            for rank, part in enumerate(everywhere(accuracy(heads, feats.get, labels, held))):
                rows[-1][rank::WORLD] = part
        if best is None or max(table[-1]) > best:
            t, best = time_, max(table[-1])
            layer = args.layers[table[-1].index(best)]
            ridge_layer = max(zip(ridge_table[-1], args.layers))[1]
    # 2. Train the heads of the chosen layers on all training images; only then use the test images.
    chosen = [name for name in args.layers if name in (layer, ridge_layer)]
    everyone, tests = torch.arange(N), torch.arange(len(test_labels))
    if not args.choose or WORLD > 1 or len(args.times) > 1 or args.draws == args.epochs:
        feats = Features(images, t, chosen, args, draws, cfg.flip)      # not all kept, or not here
    head = fit(feats.of(layer), everyone, labels, args)
    ridge_head = ridge(feats.of(ridge_layer), everyone, labels, args)
    test = Features(test_images, t, chosen, args, draws=[-1])
    knn = neighbours(feats.of(layer), labels, test.of(layer)(0, tests)[0], test_labels, args.device)
    result = dict(
        accuracy=accuracy(head, test.of(layer), test_labels, tests)[0], raw_pixels=None, knn=knn,
        ridge=accuracy(ridge_head, test.of(ridge_layer), test_labels, tests)[0], t=t, layer=layer,
        ridge_layer=ridge_layer, times=args.times, layers=args.layers, held_out=best,
        held_out_accuracy=table or None, held_out_ridge=ridge_table or None, train_images=N,
        held_out_images=len(held), test_images=len(tests))
    if args.raw:
        head = fit(functools.partial(pixels, args.module, images, cfg.flip), everyone, labels, args)
        get = functools.partial(pixels, args.module, test_images, cfg.flip)
        result["raw_pixels"] = accuracy(head, get, test_labels, tests)[0]
    return result


# ---- 4. Pictures, command line -------------------------------------------------------------------

def save_heat_map(result, path, w=62, h=36):        # the chosen cell is framed in red
    table = np.array(result["held_out_accuracy"])
    shade = (table - table.min()) / max(np.ptp(table), 1e-9)
    image = Image.new("RGB", (max(w * table.shape[1] + 70, 400), h * len(table) + 40), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), "held-out accuracy (%) of a linear probe, by time and layer", "black")
    for i, t in enumerate(result["times"]):
        draw.text((8, 44 + h * i), f"t = {t:g}", "black")
        for j, layer in enumerate(result["layers"]):
            x, y = 66 + w * j, 36 + h * i
            frame = "red" if (t, layer) == (result["t"], result["layer"]) else None
            colour = f"hsl({260 - 220 * shade[i, j]:.0f}, 50%, {20 + 30 * shade[i, j]:.0f}%)"
            draw.rectangle((x, y, x + w - 2, y + h - 2), colour, frame, width=3)
            draw.text((x + 8, y + 4), f"{layer}\n{table[i, j]:.1f}", "white")
    image.save(path)


def save_curves(results, path, W=700, H=330):       # at the chosen times
    curves = {}     # label: [(number of the layer, accuracy)]
    for r in results:
        for layer, score in zip(r["layers"], r["held_out_accuracy"][r["times"].index(r["t"])]):
            kind, k = layer.split("_")
            label = f"{Path(r['checkpoint']).parent.name} step {r['step']}: {kind}"
            curves.setdefault(label, []).append((int(k), score))
    points = np.array(sum(curves.values(), []))
    (_, low), (depth, high) = points.min(axis=0), points.max(axis=0)
    image = Image.new("RGB", (W + 350, max(H + 90, 16 * len(curves) + 60)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), "held-out accuracy (%) of a linear probe over layers", "black")
    draw.text((8, 34), f"{high:.1f}", "black")
    draw.text((8, 34 + H), f"{low:.1f}", "black")
    for k in range(1, int(depth) + 1):
        draw.text((47 + W * k / depth, H + 50), str(k), "black")
    for i, (label, line) in enumerate(curves.items()):
        colour = f"hsl({360 * i // len(curves)}, 75%, 42%)"
        draw.text((W + 70, 34 + 16 * i), label, colour)
        line = (np.array(line) - (0, high)) * (W / depth, -H / max(high - low, 1e-9)) + (50, 40)
        draw.line(line.ravel().tolist(), colour, width=2)
        for x, y in line:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    image.save(path)


def load(path, args, words):        # a checkpoint or --init: module, config, network, step
    try:        # mmap: the tensors are not read
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        script, step = state["script"], state["step"]
    except Exception as error:      # torch.load fails in many ways
        script, step = str(error), None
    if "script" in args and script in SCRIPTS:
        fail(f"{path} is a checkpoint of {script}: leave out --script and --init")
    script = vars(args).get("script", script)
    if script not in SCRIPTS:       # others are not imported
        fail(f"{path} is no checkpoint of {', '.join(SCRIPTS)} ({' '.join(script.split())[:200]}); "
             "weights with the official names need --script and --init")
    module = importlib.import_module(script)
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail
    for f in dataclasses.fields(module.Config):
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        if "script" in args or f.name in ("device", "amp", "data_dir", "vae"):
            parser.add_argument(f"--{f.name}", **how)
    given = vars(parser.parse_args(words))
    if "script" in args:
        net = module.build_net(module.make_config(**{"self_cond": "none", **given}))
        module.load_weights(net, path)
    else:
        _, net = module.load_checkpoint(path, args.weights, **given)
    return module, net.cfg, net.eval(), step


def probe_one(path, args, words, many):     # of a checkpoint or --init: the result
    began = time.time()
    module, cfg, net, step = load(path, args, words)
    defaults = dict(n=0, epochs=15 if cfg.dataset.startswith("cifar") else 30, batch=512, lr=4e-3,
                    times=list(module.Diffusion.probe_times) if args.grid else [cfg.t_probe])
    if cfg.dataset == "glyphs":     # a minute on two cores; with enough steps
        defaults |= dict(n=10000, batch=32)
    elif hasattr(cfg, "tokenizer"):
        defaults |= dict(batch=1440, lr=2e-3)
    known = []
    for layer in module.layers(cfg):
        kind, k = layer.split("_")      # token_2 is one position of the map of out_2
        known += [layer] if kind == "cls" else [layer, f"token_{k}"]
    defaults["layers"] = [k for k in known if args.tokens or not k.startswith("token")]
    args = argparse.Namespace(**{**defaults, **vars(args)}, module=module, amp=cfg.amp)
    low, high = module.Diffusion.t_range
    odd = [name for name in args.layers if name not in known]
    odd += [f"t = {t:g}" for t in args.times if not low <= t <= high]
    if odd:
        fail(f"{odd[0]}: layers are {', '.join(known)}, times lie between {low} and {high}")
    args.layers = [name for name in known if name in args.layers]   # in the order of computation
    args.choose = many or len(args.times) * len(args.layers) > 1
    args.draws, args.device = min(args.draws, args.epochs), module.start(cfg)
    args.net = net.to(args.device)
    args.folder.mkdir(parents=True, exist_ok=True)
    result = probe(cfg, args)
    for name in "draws", "epochs", "batch", "lr", "seed", "weights", "amp":
        result[name] = vars(args)[name]
    return dict(result, checkpoint=path, script=module.SCRIPT, step=step, dataset=cfg.dataset,
                self_cond=cfg.self_cond, processes=WORLD, seconds=int(time.time() - began))


def report(results, folder):
    """Files and lines. r: the checkpoint best on held-out images (the paper's: on the test set)."""
    for r in results:
        for t, scores in zip(r["times"], r["held_out_accuracy"] or []):
            print(f"held out, t = {t:g}:", *map("{} {:.2f}".format, r["layers"], scores))
        raw = f", raw pixels {r['raw_pixels']:.2f} %" if r["raw_pixels"] is not None else ""
        print(f"{r['checkpoint']}: test accuracy {r['accuracy']:.2f} % at t = {r['t']:g}, "
              f"{r['layer']} (ridge {r['ridge']:.2f} % at {r['ridge_layer']}, 20 neighbours "
              f"{r['knn']:.2f} %{raw})")
    r = max(results, key=lambda r: r["held_out"] or 0)
    file, contents = folder / "probe.json", r
    if len(results) > 1:
        tests = torch.tensor([r["accuracy"] for r in results])
        file = folder / "probes.json"       # a probe.json beside a checkpoint stays what it is
        contents = dict(results=results, chosen=r["checkpoint"], highest=tests.max().item())
        print(f"chosen on held-out images: {r['checkpoint']}; on the test set, the highest is "
              f"{tests.max():.2f} %, the mean {tests.mean():.2f} +- {tests.std():.2f} %")
    elif r["held_out_accuracy"]:
        save_heat_map(r, folder / "probe.png")
    if len(r["layers"]) > 1:
        save_curves(results, folder / "layers.png")
    file.write_text(json.dumps(contents, indent=1))
    print("protocol: {weights} weights of step {step}, {dataset}, {train_images} training and "
          "{test_images} test images, {draws} draws, {epochs} epochs, batch {batch}, lr {lr:g}, "
          "seed {seed}; {seconds} s;".format(**r), file)


def main(argv=sys.argv[1:]):
    parser = argparse.ArgumentParser(usage=__doc__, argument_default=argparse.SUPPRESS,
                                     allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("--script", choices=SCRIPTS, help="with --init, not checkpoints; its settings may follow")
    add("--init", help="weights with the official names of the network of --script")
    add("--times", type=float, nargs="+", help="in units of the formulation (t_probe)")
    add("--grid", action="store_true", default=False, help="search the formulation's usual times")
    add("--layers", nargs="+", help="such as out_2 cls_2 token_2 (all but token_*)")
    add("--tokens", action="store_true", default=False, help="also one random position of each map")
    add("--n", "--images", type=int, help="training images (all; glyphs 10000); torchrun: --images")
    add("--draws", type=int, default=2, help="of flips and noise (2; DDAE: one for each epoch)")
    add("--epochs", type=int, help="of the heads (15 on CIFAR, 30 elsewhere: Table 11)")
    add("--batch", type=int, help="of the heads (512; latents of images 1440; glyphs 32)")
    add("--lr", type=float, help="of Adam, at first (4e-3; latents of images 2e-3: Table 11)")
    add("--seed", type=int, default=0, help="of draws, held-out images and heads (0)")
    add("--weights", choices=("ema", "model"), default="ema", help="averaged or raw weights (ema)")
    add("--raw", action=argparse.BooleanOptionalAction, default=True, help="probe the pixels, too")
    add("--out", help="folder for probe.json (of several: probes.json), probe.png and layers.png")
    first = [word.startswith("-") for word in [*argv, "-"]].index(True)
    args, words = parser.parse_known_args(argv[first:])
    if ("script" in args) != ("init" in args) or ("script" in args) == (first > 0):
        fail("give one or more checkpoints first, or --script and --init")
    paths = argv[:first] or [args.init]
    args.folder = Path(args.out if "out" in args else Path(paths[-1]).parent)
    try:
        results = [probe_one(path, args, words, many=len(paths) > 1) for path in paths]
        if RANK == 0:
            report(results, args.folder)
    except (ValueError, OSError) as error:
        if type(error) is ValueError:       # not a script's UserError, but a mistake of ours
            raise
        fail(error)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    if WORLD > 1:       # gloo's threads outlive its group, and may abort Python at its end
        os._exit(0)
