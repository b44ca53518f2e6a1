"""Linear probing: how well does one linear layer on frozen features classify?

Paper     Appendix A, Tables 10 and 11, Fig. 4 and 5: frozen averaged (ema) network, images noised to one time, features
          of one layer averaged over positions, one linear layer, Adam 4e-3 with a cosine to 0, batch 512, 15 epochs on
          CIFAR and 30 elsewhere. Latents of ImageNet: batch 1440, 2e-3. Glyphs, which are ours: batch 128: in batches
          of 512, 20,000 images make too few steps for heads to converge.
Here      The cell (time, layer) is chosen on a tenth of the *training* images; the test set is read once, at the end.
          The paper draws new flips and noise in every epoch: --draws 15 does so. By default fewer draws are made, kept
          in memory and used in turn, and the heads of all cells are trained together: features cost time, heads do not.

Run       python probe.py runs/.../last.pt                            # all layers at the time of Table 10
          python probe.py runs/.../last.pt --grid                     # at several times as well
          python probe.py runs/.../last.pt --layers out_2 --draws 15  # one cell, as in the paper
Writes    probe.json and probe.png, a heat map, beside the checkpoint or in --out.
"""
import argparse, importlib, json, math, sys, time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

SCRIPTS = ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")


def fail(message):
    """The end of a run that the user can mend: one line, status 2."""
    print(f"probe: {message}", file=sys.stderr)
    sys.exit(2)


def load_script(path):
    """The module that wrote a checkpoint, and the step of the checkpoint. Only the five scripts are ever imported."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        script, step = state["script"], state["step"]
    except Exception as error:      # a missing or damaged file makes torch.load stumble in many ways
        fail(f"{path} is no checkpoint that can be read ({str(error).splitlines()[0]})")
    if script not in SCRIPTS:
        fail(f"{path} is a checkpoint of {script}, which is none of {', '.join(SCRIPTS)}")
    return importlib.import_module(script), step


def extract(module, net, images, t, layers, seed, flip=False, batch=250):
    """Features of one draw of flips and noise, both functions of `seed`: float16 (layers, N, D) on the CPU.

    Narrow layers are filled up with zeros, which change neither logits nor gradients. float16 halves the memory; it
    rounds at 5e-4, far below what the noise does to a feature.
    """
    device, out = next(net.parameters()).device, []
    gen = torch.Generator(device).manual_seed(seed)
    for x in tqdm(images.split(batch), desc=f"features at t = {t:g}", unit="batch", leave=False, disable=None):
        flips = torch.rand(len(x), generator=gen, device=device) < 0.5 * flip
        x, _ = module.make_view(x.to(device), None, dict(flip=flips))       # no augmentation, no class
        noise = torch.randn(x.shape, generator=gen, device=device)
        feats = module.features(net, x, t, noise, last=layers[-1])
        width = max(feats[layer].shape[1] for layer in layers)
        out.append(torch.stack([F.pad(feats[k], (0, width - feats[k].shape[1])) for k in layers]).half().cpu())
    return torch.cat(out, dim=1)


def fit(draws, labels, classes, args):
    """Trains one linear layer for each cell, all at once, on draws [(cells, N, D)] used in turn, one per epoch.

    The sum of the cells' losses has independent gradients and Adam works by element, so this equals separate training.
    Returns weights (cells, D, classes) and biases (cells, 1, classes). Optimiser, schedule and batch: Table 11.
    """
    gen = torch.Generator().manual_seed(args.seed)
    (cells, N, D), device = draws[0].shape, args.device
    bound = 1 / math.sqrt(D)        # the default of nn.Linear
    W = ((torch.rand(cells, D, classes, generator=gen) * 2 - 1) * bound).to(device).requires_grad_()
    b = ((torch.rand(cells, 1, classes, generator=gen) * 2 - 1) * bound).to(device).requires_grad_()
    optimizer = torch.optim.Adam([W, b], lr=args.lr, fused=True)
    labels = labels.to(device)
    for epoch in range(args.epochs):
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
        feats = draws[epoch % len(draws)].to(device)
        for rows in torch.randperm(N, generator=gen).to(device).split(args.batch):
            logits = torch.baddbmm(b, feats[:, rows].float(), W)                    # (cells, batch, classes)
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(cells), reduction="sum") / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return W.detach(), b.detach()


def accuracy(heads, feats, labels):
    """Share of right answers in % of each cell, a list. feats (cells, N, D)."""
    W, b = heads
    right = [(torch.baddbmm(b, x.to(W.device).float(), W).argmax(-1).cpu() == y).sum(1)
             for x, y in zip(feats.split(2000, dim=1), labels.split(2000))]
    return [100 * n / len(labels) for n in sum(right).tolist()]


def probe(module, cfg, net, args):
    """The whole protocol for one network; returns the result as a dict of plain types."""
    images, labels = module.load_data(cfg, train=True)
    names, classes, N = list(args.layers), int(labels.max()) + 1, len(labels)
    held = torch.zeros(N, dtype=torch.bool)
    held[torch.randperm(N, generator=torch.Generator().manual_seed(args.seed))[:N // 10]] = True

    # 1. Choose (time, layer) on held-out training images. Only the best cell's features are kept from time to time.
    table, best = [], (-1.0, None, None, None)
    for t in args.times:
        draws = [extract(module, net, images, t, names, args.seed * 1000 + k, cfg.flip) for k in range(args.draws)]
        scores = [math.nan]
        if len(args.times) * len(names) > 1:
            heads = fit([d[:, ~held] for d in draws], labels[~held], classes, args)
            scores = accuracy(heads, draws[0][:, held], labels[held])
        table.append(scores)
        cell = max(range(len(names)), key=lambda i: scores[i])
        if best[1] is None or scores[cell] > best[0]:
            best = scores[cell], t, names[cell], [d[cell:cell + 1].clone() for d in draws]
    _, t, layer, draws = best

    # 2. Train the chosen cell's head on all training images, and one on raw pixels. Only then read the test set.
    heads = fit(draws, labels, classes, args)
    view = lambda images, flip: module.make_view(images, None, dict(flip=torch.full((len(images),), flip)))[0]
    flat = lambda images, flip: view(images, flip).flatten(1)[None]
    pixels = [flat(images, flip) for flip in (False, True)[:1 + cfg.flip]]
    raw_heads = fit(pixels, labels, classes, args)
    test_images, test_labels = module.load_data(cfg, train=False)
    test = extract(module, net, test_images, t, [layer], seed=args.seed * 1000 + 999)
    return dict(accuracy=accuracy(heads, test, test_labels)[0],
                raw_pixels=accuracy(raw_heads, flat(test_images, False), test_labels)[0],
                t=t, layer=layer, times=args.times, layers=names, held_out_accuracy=table,
                train_images=N, held_out_images=int(held.sum()), test_images=len(test_labels))


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


def parse_command_line(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    parser.add_argument("checkpoint", help="last.pt or ckpt_EPOCH.pt of a run")
    parser.add_argument("--times", type=float, nargs="+", help="in the units of the formulation (default: t_probe)")
    parser.add_argument("--layers", nargs="+", help="such as out_2 cls_2 (default: all)")
    parser.add_argument("--grid", action="store_true", help="search the formulation's usual times, too")
    parser.add_argument("--draws", type=int, default=3, help="draws of flips and noise (3); the paper: one an epoch")
    parser.add_argument("--epochs", type=int, help="of the linear layer (15 on CIFAR, 30 elsewhere: Table 11)")
    parser.add_argument("--batch", type=int, help="of the linear layer (512; ImageNet latents 1440; glyphs 128)")
    parser.add_argument("--lr", type=float, help="of Adam, at first (4e-3; 2e-3 on latents of ImageNet: Table 11)")
    parser.add_argument("--seed", type=int, default=0, help="of draws, held-out images and heads (0)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="averaged or raw weights (ema)")
    parser.add_argument("--data_dir", help="where the data set lies (default: as in the run)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "mps"))
    parser.add_argument("--out", help="folder of probe.json and probe.png (default: that of the checkpoint)")
    args = parser.parse_args(argv)
    limits = dict(draws=(1, 999), epochs=(1, 10**6), batch=(1, 10**9), lr=(0, 1000), seed=(0, 2**31))
    for name, (low, high) in limits.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            fail(f"--{name} {getattr(args, name)}: must lie between {low} and {high}")
    if args.grid and args.times:
        fail("--grid and --times: give one of them")
    return args


def main(argv=None):
    args, began = parse_command_line(argv), time.time()
    module, step = load_script(args.checkpoint)
    try:
        cfg, net = module.load_checkpoint(args.checkpoint, args.weights)
        cfg = module.make_config(**{**vars(cfg), "device": args.device, "data_dir": args.data_dir or cfg.data_dir})
        known, (low, high) = module.Backbone.choices(cfg)["layer"], module.Diffusion.limits["t_probe"]
        args.times = args.times or (list(module.Diffusion.probe_times) if args.grid else [cfg.t_probe])
        args.epochs = args.epochs or (15 if cfg.dataset.startswith("cifar") else 30)
        latents = hasattr(cfg, "tokenizer") and cfg.dataset != "glyphs"
        args.batch = args.batch or (1440 if latents else 128 if cfg.dataset == "glyphs" else 512)
        args.lr = (2e-3 if latents else 4e-3) if args.lr is None else args.lr
        if args.draws > args.epochs:
            fail(f"--draws {args.draws}: only {args.epochs} could be used, one in each of --epochs {args.epochs}")
        if odd := [layer for layer in args.layers or [] if layer not in known]:
            fail(f"--layers {odd[0]}: must be of {', '.join(known)}")
        if odd := [t for t in args.times if not low <= t <= high]:
            fail(f"--times {odd[0]:g}: must lie between {low} and {high}")
        args.layers = [layer for layer in known if layer in (args.layers or known)]     # in the order of computation
        args.device = module.start(cfg)
        result = probe(module, cfg, net.to(args.device), args)
    except module.UserError as error:
        fail(error)
    result |= dict(checkpoint=str(args.checkpoint), step=step, weights=args.weights, dataset=cfg.dataset,
                   self_cond=cfg.self_cond, draws=args.draws, epochs=args.epochs, batch=args.batch, lr=args.lr,
                   seed=args.seed, seconds=round(time.time() - began, 1))
    out = Path(args.out or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").write_text(json.dumps(result, indent=1))
    if len(args.times) * len(args.layers) > 1:
        save_heat_map(result, out / "probe.png")
        print(f"accuracy (%) on {result['held_out_images']} held-out training images\n{format_table(result)}")
    print(f"test accuracy {result['accuracy']:.2f} % at t = {result['t']:g}, {result['layer']} "
          f"(raw pixels {result['raw_pixels']:.2f} %)")
    print(f"protocol: {args.weights} weights of step {step}, {cfg.dataset} {result['train_images']} + "
          f"{result['test_images']} images, {args.draws} draws, {args.epochs} epochs, batch {args.batch}, "
          f"lr {args.lr:g}, seed {args.seed}; {result['seconds']} s; {out / 'probe.json'}")


if __name__ == "__main__":
    main()
