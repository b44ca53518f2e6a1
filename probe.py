"""Linear probing: how well does one linear layer on frozen features classify?

Paper     Appendix A, Tables 10 and 11, Fig. 4 and 5: frozen averaged (ema) network, images noised to one time, features
          of one layer averaged over positions, one linear layer, Adam 4e-3 with a cosine to 0, 15 epochs on CIFAR and
          30 elsewhere; latents of ImageNet: 2e-3, batch 1440. The paper names no batch for pixels: 512 here, as its
          4e-3 is 4 times DDAE's for 128, and 128 for glyphs, where 512 would leave too few steps to converge.
Here      The cell (time, layer) is chosen on a tenth of the *training* images; the test set is used once, at the end.
          DDAE's code draws new flips and noise in every epoch: --draws 15 does so. By default fewer draws are made,
          kept in memory and used in turn, and the heads of all layers are trained together: features cost time, heads
          do not.
Also      Of each cell, a linear classifier in closed form (ridge): far above Adam's, it says that Adam ended early. Of
          the chosen one, the accuracy of a vote of the 20 nearest neighbours (Wu et al. 2018), how far apart the
          features of two draws of an image lie, and how evenly those of all are spread (Wang & Isola 2020).

Run       python probe.py runs/.../last.pt                            # all layers at the time of Table 10
          python probe.py runs/.../last.pt --grid                     # at several times as well
          python probe.py runs/.../last.pt --layers out_2 --draws 15  # one cell, as in the paper
          python probe.py runs/A/ckpt_*.pt runs/B/ckpt_*.pt           # a row for each; curves over layers (Fig. 5)
          python probe.py runs/A/last.pt runs/B/last.pt --tokens      # also of one random position (Fig. 4)
          python probe.py --script uvit_sc --init U-ViT.pth --dataset cifar10     # weights of others, official names
          torchrun --nproc_per_node=4 probe.py runs/.../last.pt       # images, then layers, shared by the processes
Writes    probe.json (of several: probes.json), probe.png (heat map of one checkpoint) and layers.png (curves), beside
          the last one or in --out.
"""
import argparse, functools, importlib, json, math, os, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

SCRIPTS = ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
CHUNK = 256     # images that the network sees at a time and that share streams of flips and noise


def fail(message):
    """Ends a run for a reason that the user can fix: one line, status 2."""
    if RANK > 0:
        time.sleep(10)      # torchrun ends all with the first to go: be it rank 0, if it has the fault as well
    print(f"probe: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


# ---- 1. Features -----------------------------------------------------------------------------------------------------

def kind(layer):        # out_2 is of kind out, token_2 of kind token: one random position of the same map
    return layer.split("_")[0]


@torch.inference_mode()
def extract(module, net, images, t, layers, seed, draw, flip=False, share=False):
    """Features of one draw of flips and noise: float16 (layers, N, D) on the CPU; with `share`, of every WORLD-th
    layer, those whose heads this process trains. Flips and noise are functions of (seed, draw, chunk), whoever
    computes them. Draws come in pairs that mirror opposite halves of the images: two show each of them both ways.

    Narrow layers are filled up with zeros, which change neither logits nor gradients. float16 halves the memory; it
    rounds at 5e-4, far below what the noise does to a feature.
    """
    device, chunks, mine = next(net.parameters()).device, math.ceil(len(images) / CHUNK), []
    last = layers[-1].replace("token", kind(module.Backbone.choices(net.cfg)["layer"][0]))
    quiet = None if RANK == 0 else True
    turns = range(RANK, math.ceil(chunks / WORLD) * WORLD, WORLD)       # as many for all: some do the last one again
    for c in tqdm(turns, desc=f"features at t = {t:g}", unit="chunk", leave=False, disable=quiet):
        c = min(c, chunks - 1)
        x, gen = images[c * CHUNK:(c + 1) * CHUNK].to(device), module.rng(seed, draw, c, 1, device=device)
        coins = torch.rand(len(x), generator=module.rng(seed, draw // 2, c, 2, device=device), device=device)
        x, _ = module.make_view(x, None, dict(flip=((coins < 0.5) ^ bool(draw % 2)) & flip))    # no augmentation
        noise = torch.randn(x.shape, generator=gen, device=device)
        place = torch.rand(len(x), generator=gen, device=device) if "token" in map(kind, layers) else None
        with module.autocast(net.cfg, device):
            feats = module.features(net, x, t, noise, last=last, place=place)
        width = max(feats[layer].shape[1] for layer in layers)
        feats = torch.stack([F.pad(feats[k], (0, width - feats[k].shape[1], 0, CHUNK - len(x))) for k in layers])
        mine.append(feats.half().cpu())                                         # (layers, CHUNK, D)
        if odd := [layer for layer, f in zip(layers, mine[-1]) if not f.isfinite().all()]:
            raise module.UserError(f"features of {odd[0]} at t = {t:g} exceed float16; leave it out with --layers")
    feats, own = torch.stack(mine, dim=1), []                                   # (layers, chunks, CHUNK, D)
    for i in range(len(layers)) if WORLD > 1 else []:
        parts = [torch.empty_like(feats[i], device=device) for _ in range(WORLD)]
        dist.all_gather(parts, feats[i].to(device))
        if not share or i % WORLD == RANK:
            own.append(torch.stack(parts, dim=1).flatten(0, 1).cpu())           # back in order: 0, 1, 2, ...
    feats = torch.stack(own) if own else feats[:0] if WORLD > 1 else feats
    return feats.flatten(1, 2)[:, :len(images)]


def cached(draw, args):
    """The function draw(k), which remembers unless each draw is used but once: then memory is that of one draw."""
    return functools.lru_cache(None if args.draws < args.epochs else 1)(draw)


# ---- 2. Heads --------------------------------------------------------------------------------------------------------

def fit(get, rows, labels, classes, args):
    """Trains one linear layer for each cell, all at once, on the images `rows`: get(epoch, rows) gives their features
    (cells, n, D). Returns weights (cells, D, classes) and biases (cells, 1, classes). Optimiser: Table 11.

    The sum of the cells' losses has independent gradients and Adam works by element, so this equals separate training.
    """
    gen, device = torch.Generator().manual_seed(args.seed), args.device
    cells, _, D = get(0, rows[:1]).shape
    bound = 1 / math.sqrt(D)        # the default of nn.Linear
    start = [(torch.rand(*shape, generator=gen) * 2 - 1) * bound for shape in ((1, D, classes), (1, 1, classes))]
    W, b = (v.repeat(cells, 1, 1).to(device).requires_grad_() for v in start)   # cells start alike, on any process
    optimizer = torch.optim.Adam([W, b], lr=args.lr, fused=True)
    for epoch in range(args.epochs):
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
        for some in rows[torch.randperm(len(rows), generator=gen)].split(args.batch):
            x, y = get(epoch, some).to(device).float(), labels[some].to(device)
            logits = torch.baddbmm(b, x, W)                                     # (cells, batch, classes)
            loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(cells), reduction="sum") / len(some)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return W.detach(), b.detach()


def ridge(get, rows, labels, classes, args, penalty=1e-4):
    """Another linear classifier: least squares of the classes, as 0 and 1, on standardised features, for each cell, in
    closed form. It has no step size, number of epochs, order or seed, and the scale of the features does not matter:
    where it is far above fit, fit has ended too early. It is not what fit converges to: cross-entropy, trained ten
    times as long, may do better. get as in fit; draw 0 is used. `penalty` times the squared weights keeps it solvable
    where features are dead; it is meant for many more images than features. Returns heads as fit does."""
    device = "cpu" if args.device.type == "mps" else args.device        # MPS has no float64
    cells, _, D = get(0, rows[:1]).shape
    shapes = (cells, D, D), (cells, D, classes), (cells, D, 1), (1, classes)
    xx, xy, sx, sy = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
    for some in rows.split(2000):
        x, y = get(0, some).to(device).double(), F.one_hot(labels[some], classes).to(device).double()
        xx, xy, sx, sy = xx + x.mT @ x, xy + x.mT @ y, sx + x.sum(1)[..., None], sy + y.sum(0)
    n = len(rows)
    mean, share = sx / n, sy / n
    scale = (xx.diagonal(dim1=1, dim2=2)[..., None] / n - mean.square()).clamp(min=0).sqrt() + 1e-6
    correlation = (xx / n - mean @ mean.mT) / (scale @ scale.mT) + penalty * torch.eye(D, device=device)
    W = torch.linalg.solve(correlation, (xy / n - mean @ share) / scale) / scale
    return W.float(), (share - mean.mT @ W).float()


def accuracy(heads, get, rows, labels):
    """Share of right answers in % of each cell, a list, on the images `rows`: get as in fit, at epoch 0."""
    W, b = heads
    right = [(torch.baddbmm(b, get(0, some).to(W.device).float(), W).argmax(-1).cpu() == labels[some]).sum(1)
             for some in rows.split(2000)]
    return [100 * n / len(rows) for n in sum(right).tolist()]


def neighbours(train, train_labels, test, test_labels, classes, device, k=20, T=0.07):
    """Accuracy in % of a vote of the k training images whose features (N, D) are nearest in angle, weighted by
    exp(cosine / T): Wu et al. 2018, with DINO's k."""
    train, right = F.normalize(train.to(device).float(), dim=1).T, 0
    for x, y in zip(test.split(256), test_labels.split(256)):
        near, who = (F.normalize(x.to(device).float(), dim=1) @ train).topk(min(k, train.shape[1]), dim=1)
        votes = torch.zeros(len(x), classes, device=device)
        votes.scatter_add_(1, train_labels.to(device)[who], ((near - 1) / T).exp())
        right += (votes.argmax(1).cpu() == y).sum().item()
    return 100 * right / len(test_labels)


def alignment_uniformity(a, b):
    """Of features of two draws of the same images, (n, D), on the unit sphere: the mean squared distance of pairs, and
    log E exp(-2 d^2) over the distances d of all images; lower is better for both (Wang & Isola 2020, Sec. 4.1)."""
    a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
    return (a - b).square().sum(1).mean().item(), torch.pdist(a).square().mul(-2).exp().mean().log().item()


# ---- 3. The protocol -------------------------------------------------------------------------------------------------

def probe(module, cfg, net, args):
    """The whole protocol for one network; returns the result as a dict of plain types."""
    with module.one_process_first():
        images, labels = module.load_data(cfg, train=True)
        test_images, test_labels = module.load_data(cfg, train=False)       # may be missing: better now than in an hour
    names, classes = list(args.layers), int(labels.max()) + 1
    if args.n and args.n < len(labels):
        some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(args.seed))[:args.n].sort()[0]
        images, labels = images[some], labels[some]
    N = len(labels)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(args.seed))
    tenth, everyone = max(1, N // 10), torch.arange(N)
    held, rest = order[:tenth], order[tenth:].sort()[0]
    draws = lambda t, layers, share: cached(
        lambda k: extract(module, net, images, t, layers, args.seed, k, cfg.flip, share), args)
    using = lambda draw, cell=slice(None): lambda epoch, rows: draw(epoch % args.draws)[cell, rows]

    # 1. Choose (time, layer) on held-out training images. Features of one time are kept at a time.
    table, exact, best = [], [], None
    for t in args.times:
        draw, scores, solved = draws(t, names, share=True), [math.nan] * len(names), [math.nan] * len(names)
        if args.choose:
            mine = accuracy(fit(using(draw), rest, labels, classes, args), using(draw), held, labels)
            also = accuracy(ridge(using(draw), rest, labels, classes, args), using(draw), held, labels)
            for rank, parts in enumerate(everywhere((mine, also))):
                scores[rank::WORLD], solved[rank::WORLD] = parts
        exact.append(solved)
        cell = max(range(len(names)), key=lambda i: scores[i])
        table.append(scores)
        if best is None or scores[cell] > best[0]:
            best = scores[cell], t, names[cell]
    held_out, t, layer = best

    # 2. Train the chosen cell's head on all training images, and one on raw pixels. Only then use the test images.
    # Ridge has a layer of its own, at the same time.
    best_ridge = max(zip(exact[args.times.index(t)], names))[1] if args.choose else layer
    chosen = [name for name in names if name in (layer, best_ridge)]
    cell, other = names.index(layer), names.index(best_ridge)
    if WORLD > 1 or args.draws == args.epochs or len(args.times) > 1:       # not all have it, or nobody any more
        draw, cell, other = draws(t, chosen, share=False), chosen.index(layer), chosen.index(best_ridge)
    head = fit(using(draw, slice(cell, cell + 1)), everyone, labels, classes, args)
    flat = lambda images: lambda epoch, rows: module.make_view(
        images[rows], None, dict(flip=torch.full((len(rows),), bool(epoch % 2) and cfg.flip)))[0].flatten(1)[None]
    raw = fit(flat(images), everyone, labels, classes, args) if args.raw else None
    exact_head = ridge(using(draw, slice(other, other + 1)), everyone, labels, classes, args)
    train = draw(0)[cell]
    tests = extract(module, net, test_images, t, chosen, args.seed, -1)
    test = tests[chosen.index(layer)]
    some = torch.randperm(len(test_labels), generator=torch.Generator().manual_seed(args.seed))[:8 * CHUNK]
    again = extract(module, net, test_images[some], t, [layer], args.seed, -2)[0]
    align, uniform = alignment_uniformity(test[some], again)
    all_test = torch.arange(len(test_labels))
    right = lambda head, name: accuracy(
        head, lambda _, rows: tests[None, chosen.index(name), rows], all_test, test_labels)[0]
    return dict(accuracy=right(head, layer), ridge=right(exact_head, best_ridge), ridge_layer=best_ridge,
                raw_pixels=accuracy(raw, flat(test_images), all_test, test_labels)[0] if raw else None,
                knn=neighbours(train, labels, test, test_labels, classes, args.device), alignment=align,
                uniformity=uniform, t=t, layer=layer, held_out=held_out if args.choose else None, times=args.times,
                layers=names, held_out_accuracy=table if args.choose else None,
                held_out_ridge=exact if args.choose else None, train_images=N, held_out_images=len(held),
                test_images=len(test_labels))


def everywhere(value):
    """What each process has, as a list in the order of processes."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


# ---- 4. Pictures -----------------------------------------------------------------------------------------------------

def format_table(result):
    """The held-out accuracies as text, the chosen cell with a star."""
    rows = [f"{'t':>8}" + "".join(f"{layer:>9}" for layer in result["layers"])]
    for t, scores in zip(result["times"], result["held_out_accuracy"]):
        stars = ["*" if (t, layer) == (result["t"], result["layer"]) else " " for layer in result["layers"]]
        rows.append(f"{t:>8g}" + "".join(f"{score:>8.2f}{star}" for score, star in zip(scores, stars)))
    return "\n".join(rows)


def save_heat_map(result, path, w=62, h=36):
    """The same as a picture: dark is low, yellow is high, the chosen cell is framed."""
    table = result["held_out_accuracy"]
    low, high = min(map(min, table)), max(map(max, table))
    image = Image.new("RGB", (max(w * (len(result["layers"]) + 1) + 10, 440), h * (len(table) + 1) + 30), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), "held-out accuracy (%) of a linear probe: time (rows) and layer (columns)", fill="black")
    for j, layer in enumerate(result["layers"]):
        draw.text((w * (j + 1) + 10, 30 + h // 3), layer, fill="black")
    for i, (t, scores) in enumerate(zip(result["times"], table)):
        y = 30 + h * (i + 1)
        draw.text((8, y + h // 3), f"t = {t:g}", fill="black")
        for j, score in enumerate(scores):
            s, x = (score - low) / max(high - low, 1e-9), w * (j + 1)
            chosen = (t, result["layers"][j]) == (result["t"], result["layer"])
            colour = tuple(int(a + (b - a) * s) for a, b in zip((40, 30, 90), (250, 210, 60)))
            draw.rectangle((x, y, x + w - 2, y + h - 2), fill=colour, outline="red" if chosen else None, width=3)
            draw.text((x + 14, y + h // 3), f"{score:.1f}", fill="white" if s < 0.6 else "black")
    image.save(path)


def save_curves(results, path, W=760, H=420):
    """Held-out accuracy over layers, at the chosen time: a hue for each run, darker for later checkpoints; discs are
    pooled features, squares random positions ("Random" in Fig. 4), triangles [CLS]."""
    hues = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207)]
    runs = list(dict.fromkeys(Path(r["checkpoint"]).parent for r in results))
    depth = max(int(layer.split("_")[1]) for r in results for layer in r["layers"])
    curves = []                                                     # (colour, kind, label, [(k, accuracy)])
    for r in results:
        scores, run = r["held_out_accuracy"][r["times"].index(r["t"])], Path(r["checkpoint"]).parent
        order = [s for s in results if Path(s["checkpoint"]).parent == run]
        fade = 0.65 * (1 - (order.index(r) + 1) / len(order))
        colour = tuple(int(v + (255 - v) * fade) for v in hues[runs.index(run) % len(hues)])
        for name in dict.fromkeys(map(kind, r["layers"])):
            points = [(int(k.split("_")[1]), v) for k, v in zip(r["layers"], scores) if kind(k) == name]
            curves.append((colour, name, f"{run.name} step {r['step']}: {name}", points))
    values = [v for *_, points in curves for _, v in points]
    low, high = math.floor(min(values)), math.ceil(max(values) + 1e-9)
    image = Image.new("RGB", (W + 300, max(H, 16 * len(curves) + 60)), "white")
    draw = ImageDraw.Draw(image)
    at = lambda k, v: (60 + (W - 90) * (k - 1) / max(depth - 1, 1), H - 50 - (H - 90) * (v - low) / max(high - low, 1))
    draw.text((8, 8), "held-out accuracy (%) of a linear probe over layers", fill="black")
    for i in range(5):
        (x, y), value = at(1, low + (high - low) * i / 4), low + (high - low) * i / 4
        draw.line([(x, y), (W - 30, y)], fill="#dddddd")
        draw.text((12, y - 6), f"{value:.1f}", fill="black")
    for k in range(1, depth + 1):
        draw.text((at(k, low)[0] - 3, H - 40), str(k), fill="black")
    draw.text((W // 2, H - 22), "layer", fill="black")

    def mark(x, y, name, colour):
        shape = dict(token=[(-4, -4), (4, -4), (4, 4), (-4, 4)], cls=[(0, -5), (5, 4), (-5, 4)])
        if name in shape:
            draw.polygon([(x + dx, y + dy) for dx, dy in shape[name]], fill=colour)
        else:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    for i, (colour, name, label, points) in enumerate(curves):
        draw.line([at(*p) for p in points], fill=colour, width=2)
        for p in points:
            mark(*at(*p), name, colour)
        mark(W, 46 + 16 * i, name, colour)
        draw.text((W + 12, 40 + 16 * i), label, fill="black")
    image.save(path)


# ---- 5. Command line -------------------------------------------------------------------------------------------------

def load_script(path):
    """The module that wrote a checkpoint, and the step of the checkpoint. Only the five scripts are ever imported."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)       # its tensors are not read
        script, step = state["script"], state["step"]
    except KeyError:
        fail(f"{path} has weights, but not of which script; with official names they need --script and --init")
    except Exception as error:      # torch.load fails in many ways
        fail(f"{path} is no checkpoint that can be read ({str(error).splitlines()[0]})")
    if script not in SCRIPTS:
        fail(f"{path} is a checkpoint of {script}, which is none of {', '.join(SCRIPTS)}")
    return importlib.import_module(script), step


def parse_command_line(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    argv = sys.argv[1:] if argv is None else argv
    if not any(word.startswith("--script") for word in argv):       # else words may be the values of a script's flags
        parser.add_argument("checkpoints", nargs="+", help="last.pt or ckpt_EPOCH.pt of one or more runs")
    parser.set_defaults(checkpoints=[])
    parser.add_argument("--script", choices=SCRIPTS, help="with --init, instead of checkpoints; its flags may follow")
    parser.add_argument("--init", metavar="FILE", help="weights with the official names of the network of --script")
    parser.add_argument("--times", type=float, nargs="+", help="in the units of the formulation (default: t_probe)")
    parser.add_argument("--layers", nargs="+", help="such as out_2 cls_2 token_2 (default: all but token_*)")
    parser.add_argument("--grid", action="store_true", help="search the formulation's usual times, too")
    parser.add_argument("--tokens", action="store_true", help="also one random position of each map (Fig. 4)")
    parser.add_argument("--n", "--images", type=int, help="training images, drawn at random, for the heads (all);"
                        " torchrun would take --n for its own")
    parser.add_argument("--draws", type=int, help="of flips and noise (2; DDAE: one for each epoch)")
    parser.add_argument("--epochs", type=int, help="of the linear layer (15 on CIFAR, 30 elsewhere: Table 11)")
    parser.add_argument("--batch", type=int, help="of the linear layer (512; ImageNet latents 1440; glyphs 128)")
    parser.add_argument("--lr", type=float, help="of Adam, at first (4e-3; 2e-3 on latents of ImageNet: Table 11)")
    parser.add_argument("--seed", type=int, default=0, help="of draws, held-out images and heads (0)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or raw weights (ema)")
    parser.add_argument("--raw", action=argparse.BooleanOptionalAction, default=True, help="a probe of the pixels, too")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="precision of features")
    parser.add_argument("--data_dir", help="where the data set lies (default: as in the run)")
    parser.add_argument("--vae", help="VA-VAE's weights, with which latents are compared (default: as in the run)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "mps"))
    parser.add_argument("--out", help="folder of the files written (default: that of the last checkpoint)")
    args, args.fields = parser.parse_known_args(argv)
    if args.fields and not args.script:
        fail(f"unrecognized arguments: {' '.join(args.fields)}")
    if bool(args.script) != bool(args.init):
        fail("--script and --init go together")
    limits = dict(n=(10, 10**9), draws=(1, 999), epochs=(1, 10**6), batch=(1, 10**9), lr=(0, 1000), seed=(0, 2**31))
    for name, (low, high) in limits.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            fail(f"--{name} {getattr(args, name)}: must lie between {low} and {high}")
    if args.grid and args.times:
        fail("--grid and --times: give one of them")
    return args


def settle(module, cfg, args):
    """The arguments for one network: what was not given follows its data set, and what is impossible ends the run."""
    args = argparse.Namespace(**vars(args))
    known, (low, high) = module.Backbone.choices(cfg)["layer"], module.Diffusion.limits["t_probe"]
    tokens = {layer: f"token_{layer.split('_')[1]}" for layer in known if kind(layer) != "cls"}
    known = [name for layer in known for name in (layer, tokens.get(layer)) if name]
    args.times = args.times or (list(module.Diffusion.probe_times) if args.grid else [cfg.t_probe])
    args.epochs = args.epochs or (15 if cfg.dataset.startswith("cifar") else 30)
    latents = hasattr(cfg, "tokenizer") and cfg.dataset != "glyphs"
    args.batch = args.batch or (1440 if latents else 128 if cfg.dataset == "glyphs" else 512)
    args.lr = (2e-3 if latents else 4e-3) if args.lr is None else args.lr
    args.draws = args.draws or min(args.epochs, 2)      # README shows what more would bring
    if args.draws > args.epochs:
        fail(f"--draws {args.draws}: only {args.epochs} could be used, one in each of --epochs {args.epochs}")
    if odd := [layer for layer in args.layers or [] if layer not in known]:
        fail(f"--layers {odd[0]}: must be of {', '.join(known)}")
    if odd := [t for t in args.times if not low <= t <= high]:
        fail(f"--times {odd[0]:g}: must lie between {low} and {high}")
    wanted = args.layers or [layer for layer in known if args.tokens or kind(layer) != "token"]
    args.layers = [layer for layer in known if layer in wanted]                 # in the order of computation
    args.choose = len(args.times) * len(args.layers) * max(len(args.checkpoints), 1) > 1
    args.device = module.start(cfg)
    return args


def load(path, args):
    """(module, cfg, net, step) of a checkpoint or, for None, of the weights --init; the step is then None."""
    if path:
        module, step = load_script(path)
        cfg, net = module.load_checkpoint(path, args.weights)
        given = dict(vars(cfg))
    else:
        module, step = importlib.import_module(args.script), None
        given = {"self_cond": "none", **module.parse_command_line(args.fields)[0]}
        net = module.build_net(module.make_config(**given))
        module.load_weights(net, args.init)
        cfg = net.cfg
        if RANK == 0:
            print(f"all {len(net.state_dict())} tensors of the network are in {args.init}, "
                  f"{sum(p.numel() for p in net.parameters()):,} parameters")
    given |= {name: getattr(args, name) for name in ("device", "amp", "data_dir", "vae") if getattr(args, name)}
    net.cfg = module.make_config(**given)
    return module, net.cfg, net.eval(), step


def main(argv=None):
    args, results = parse_command_line(argv), []
    for path in args.checkpoints or [None]:
        began, module = time.time(), None
        try:
            module, cfg, net, step = load(path, args)
            here = settle(module, cfg, args)
            result = probe(module, cfg, net.to(here.device), here)
        except (ValueError, OSError) as error:
            if type(error).__name__ != "UserError" and not isinstance(error, OSError):      # each script has its class
                raise
            fail(error)
        except KeyboardInterrupt:
            print("probe: interrupted; nothing is written before the end", file=sys.stderr)
            sys.exit(130)
        results.append(result | dict(
            checkpoint=str(path or args.init), script=module.SCRIPT, step=step, weights=args.weights,
            dataset=cfg.dataset, self_cond=cfg.self_cond, draws=here.draws, epochs=here.epochs, batch=here.batch,
            lr=here.lr, seed=args.seed, amp=args.amp, processes=WORLD, seconds=round(time.time() - began, 1)))
    try:
        if RANK == 0:
            report(results, Path(args.out or Path(args.checkpoints[-1] if args.checkpoints else args.init).parent))
    except OSError as error:
        fail(f"--out: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


def report(results, out):
    """Writes the files and prints the tables. Of several checkpoints, the best is chosen on held-out images; the paper
    reports the highest test accuracy (Appendix A: of epochs 800, 1000 and 1200), which is said as well."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = max(results, key=lambda r: r["held_out"] if len(results) > 1 else 0)
    accuracies = torch.tensor([r["accuracy"] for r in results])
    many = dict(results=results, chosen=chosen["checkpoint"], highest=accuracies.max().item())
    file = out / ("probes.json" if len(results) > 1 else "probe.json")      # one beside a checkpoint stays what it is
    file.write_text(json.dumps(many if len(results) > 1 else chosen, indent=1))
    for r in results:
        if len(r["times"]) * len(r["layers"]) > 1:
            print(f"{r['checkpoint']}: accuracy (%) on {r['held_out_images']} held-out training images")
            print(format_table(r))
            if len(results) == 1:
                save_heat_map(r, out / "probe.png")
    if max(len(r["layers"]) for r in results) > 1:
        save_curves(results, out / "layers.png")
    if len(results) > 1:
        print(f"{'held-out':>9}{'test':>9}{'ridge':>9}{'kNN':>9}  time, layer, checkpoint")
        for r in results:
            print(f"{r['held_out']:>9.2f}{r['accuracy']:>9.2f}{r['ridge']:>9.2f}{r['knn']:>9.2f}  t = {r['t']:g}, "
                  f"{r['layer']}, {r['checkpoint']}")
        print(f"chosen on held-out images: {chosen['checkpoint']}; test set: highest {many['highest']:.2f} %, "
              f"mean {accuracies.mean():.2f} +- {accuracies.std():.2f} %")
    r = chosen
    raw = "" if r["raw_pixels"] is None else f"raw pixels {r['raw_pixels']:.2f} %, "
    print(f"test accuracy {r['accuracy']:.2f} % at t = {r['t']:g}, {r['layer']} ({raw}ridge {r['ridge']:.2f} % at "
          f"{r['ridge_layer']}, 20 nearest neighbours {r['knn']:.2f} %, alignment {r['alignment']:.4f}, "
          f"uniformity {r['uniformity']:.3f})")
    print(f"protocol: {r['weights']} weights of step {r['step']}, {r['dataset']} {r['train_images']} + "
          f"{r['test_images']} images, {r['draws']} draws, {r['epochs']} epochs, batch {r['batch']}, lr {r['lr']:g}, "
          f"seed {r['seed']}; {r['seconds']} s; {file}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SystemExit as end:
        if WORLD > 1:       # gloo's threads outlive its group, and now and then abort Python when it takes itself apart
            sys.stdout.flush()
            os._exit(end.code or 0)
        raise
