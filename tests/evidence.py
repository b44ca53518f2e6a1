"""The paper's claims as small experiments: a queue of runs that can be stopped at any time and goes on where it stopped.

    python tests/evidence.py                # works through the queue, on one core; start it once for each core
    python tests/evidence.py list           # what is done and what is not
    python tests/evidence.py readme         # writes the tables into README.md, from assets/results/
    python tests/evidence.py pictures       # draws samples of the runs of seed 0

A run is a name such as "uvit cls aug cl" and a seed. Data: Fashion-MNIST in 16 x 16
pixels; dit_latent_sc.py reads no such files and has glyphs. A run trains, then is measured: denoising loss
on all test images with fixed times and noise; linear probe of all layers, the layer chosen on held-out training images; FD-tiny of
1,000 samples. The line of assets/results/runs.jsonl holds what was measured, on which machine, and the commands that repeat it.
"""
import collections
import contextlib
import fcntl
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "assets" / "results" / "runs.jsonl"

# ---- 1. The runs -----------------------------------------------------------------------------------------------------

FASHION = "--dataset fashion_mnist --size 16 --warmup 0.1"
SCRIPTS = {     # model: script, settings, budget, and that of "long" and "longer" runs; --nfe: of the samples, fewer than the paper's
    "ddpm": ("ddpm_sc", f"{FASHION} --nfe 25", "--steps 1000", "--steps 2000"),
    "edm": ("edm_sc", f"{FASHION} --nfe 19", "--steps 1000", "--steps 2000"),
    "rf": ("rf_sc", f"{FASHION} --nfe 20", "--steps 1000", "--steps 2000"),
    "uvit": ("uvit_sc", f"{FASHION} --nfe 25", "--epochs 1", "--epochs 2", "--epochs 4"),
    "dit": ("dit_latent_sc", "--dataset glyphs --uncond --nfe 20", "--epochs 3", "--epochs 6"),
    "rf-glyphs": ("rf_sc", "--dataset glyphs --warmup 0.1 --nfe 20", "--steps 1000", "--steps 2000"),
    "dit-cond": ("dit_latent_sc", "--dataset glyphs --guidance 1 --nfe 20", "--epochs 3", "--epochs 6"),
}
OPTIONS = {     # a word of a run's name: flags
    "aug": "--aug 0.12", "cl": "--cl 0.01", "plain": "--cl_head plain", "min": "--cl_target min", "gap": "--cl_feature gap",
    **{method: f"--self_cond {method}" for method in ("none", "add", "adaptive", "cls")},
    "A": "", "C": "", "zero": "", "detach": "", "one": "", "narrow": "",       # edits of edm_sc.py, see ARRANGEMENTS
    "long": "", "longer": "",       # the same run, two and four times as long: it goes on where the shorter one ended
}
TABLE2 = [f"{model} {method}" for model, method in zip(("uvit", "edm", "ddpm", "rf", "dit"), ("cls", *["adaptive"] * 4))]
BASELINES = [f"{name.split()[0]} none" for name in TABLE2]
TABLE3 = [f"edm {sc}{more}" for sc in ("none", "adaptive") for more in ("", " aug", " aug cl")]
TABLE3 += [f"uvit {sc}{more}" for sc in ("none", "cls") for more in ("", " aug", " cl", " aug cl")]
TABLE3 = [f"{name} gap" if "none" in name and " cl" in name and "uvit" in name else name for name in TABLE3]
TABLES = {      # table: rows of (run, what it is compared with)
    "table2": [(name, base) for method, baseline in zip(TABLE2, BASELINES) for name, base in ((baseline, None), (method, baseline))],
    "table3": [(name, None if name in BASELINES else f"{name.split()[0]} none") for name in TABLE3],
    "table7a": [(f"{model} {method}", None if method == "none" else f"{model} none") for model in ("ddpm", "edm", "rf")
                for method in ("none", "add", "adaptive")],
    "table7bce": [("edm adaptive aug cl", None), ("edm adaptive aug cl plain", "edm adaptive aug cl"),
                  ("edm adaptive aug cl min", "edm adaptive aug cl"), ("uvit cls aug cl", None), ("uvit cls aug cl gap", "uvit cls aug cl")],
    "classes": [("dit none", None), ("dit adaptive", "dit none"), ("dit-cond none", "dit none"),
                ("dit-cond adaptive", "dit-cond none")],
    "glyphs": [("rf-glyphs none", None), ("rf-glyphs adaptive", "rf-glyphs none"), ("dit none", None), ("dit adaptive", "dit none"),
               ("dit add", "dit none")],
    "arrangement": [("edm none", None), *[(f"edm adaptive{word}", "edm none") for word in ("", " A", " C", " zero", " detach", " one")]],
}
BOTH = [name for pair in zip(BASELINES, TABLE2) for name in pair]
LONG = [f"{name} long" for name in ("edm none", "edm adaptive", "uvit none", "uvit cls")]
LONGER = ["uvit none longer", "uvit cls longer"]
PAIRS = [*zip(BASELINES, TABLE2), *zip(LONG[::2], LONG[1::2]), (*LONGER,), ("edm none narrow long", "edm adaptive narrow long"),
         ("rf-glyphs none", "rf-glyphs adaptive"), ("dit-cond none", "dit-cond adaptive"), *((f"{model} none", f"{model} add") for model in ("edm", "ddpm", "rf", "dit"))]
TABLES["length"] = [(name, f"{name.split()[0]} none {name.split()[-1]}" if "none" not in name else None) for name in LONG + LONGER]
TABLES["width"] = [("edm none narrow long", None), ("edm adaptive narrow long", "edm none narrow long")]
QUEUE = [       # groups in the order of work; within one, seed by seed, so that a queue that is stopped has whole comparisons
    (range(1), BOTH + LONG),
    (range(3), BOTH),
    (range(3), [name for name, _ in TABLES["arrangement"] if "one" not in name.split()]),
    (range(1), [name for name, _ in TABLES["glyphs"]]),
    (range(1), [name for name, _ in TABLES["width"]]),
    (range(5), ["uvit none", "uvit cls"]),
    (range(3), [name for name in TABLE3 if "edm" not in name]),
    (range(3), [name for name, _ in TABLES["table7a"]]),
    (range(3), ["edm adaptive one"]),
    (range(3), [name for name in TABLE3 if "edm" in name]),
    (range(3), [name for name, _ in TABLES["table7bce"]]),
    (range(5), ["edm none", "edm adaptive"]),
    (range(3), [name for key in ("glyphs", "classes") for name, _ in TABLES[key]]),
    (range(3), LONG),
    (range(3), [name for name, _ in TABLES["width"]]),
    (range(5), ["dit-cond none", "dit-cond adaptive"]),
    (range(3), LONGER),
]

# The three arrangements that have the parameters which the paper counts: W f times a two-layer s(t), as in the scripts; A, a two-layer
# projection of f times a linear function of the sinusoids; C, W f times such a function, and then one more linear layer. And three
# variants of the scripts': W = 0 at first, f without gradient, and a scale that begins near 1 instead of 0. Last, with and without
# self-conditioning, a narrower UNet.
SCALE = '''class Scale(TimeEmbedding):
    def __init__(self, width, E):
        super().__init__(width, E)
        self.lin2 = nn.Identity()

    def forward(self, c):
        angles = c.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(self.frequencies) / (self.frequencies - 1))
        return self.lin1(torch.cat([angles.sin(), angles.cos()], dim=1))


def group_norm(C):
'''
ARRANGEMENTS = {    # edits of edm_sc.py
    "A": {"def group_norm(C):\n": SCALE, "self.sc_time = TimeEmbedding(": "self.sc_time = Scale(",
          "self.sc_proj = nn.Linear(self.D, E)": "self.sc_proj = nn.Sequential(nn.Linear(self.D, E), nn.SiLU(), nn.Linear(E, E))"},
    "C": {"def group_norm(C):\n": SCALE, "self.sc_time = TimeEmbedding(": "self.sc_last = nn.Linear(E, E); self.sc_time = Scale(",
          "e = e + s * self.sc_proj(f)": "e = e + self.sc_last(s * self.sc_proj(f))"},
    "zero": {"self.sc_proj = nn.Linear(self.D, E)": "self.sc_proj = nn.Linear(self.D, E); [nn.init.zeros_(p) for p in self.sc_proj.parameters()]"},
    "detach": {"f = h.mean(dim=(2, 3))": "f = h.mean(dim=(2, 3)).detach()"},
    "one": {"e = e + s * self.sc_proj(f)": "e = e + (1 + s) * self.sc_proj(f)"},
    "narrow": {'"unet_tiny": (32, (1, 2, 4),': '"unet_tiny": (32, (1, 2, 2),'},
}


def jobs():
    return list(dict.fromkeys((name, seed) for seeds, names in QUEUE for seed in seeds for name in names))


def commands(name, seed):
    """What a run consists of, for a shell at the project's root: (preparation,) training, loss, probe, FD."""
    model, *words = name.split()
    script, settings, *budgets = SCRIPTS[model]
    budget = budgets[2 if "longer" in words else 1 if "long" in words else 0]
    words = [word for word in words if "long" not in word]
    flags = " ".join(OPTIONS[word] for word in words if OPTIONS[word])
    arrangement = next((word for word in words if word in ARRANGEMENTS), None)
    out, up, go = f"runs/evidence/{'-'.join([model, *words])}-s{seed}", "", "OMP_NUM_THREADS=1 python"
    if arrangement:
        out, up, go = out.removeprefix("runs/evidence/"), "../../../", f"cd runs/evidence/arrangement{arrangement} && {go}"
    return [f"python tests/evidence.py prepare {arrangement}"] * bool(arrangement) + [f"{go} {line}" for line in (
        f"{script}.py {settings} {budget} {flags} --seed {seed} --data_dir {up}data --out {out}",
        f"{up}tests/evidence.py loss {out}/last.pt",
        f"probe.py {out}/last.pt --n 10000 --batch 128 --draws 2 --no-raw",
        f"fid.py {out}/last.pt --detector tiny --n 1000 --json {out}/fid.json")]


# ---- 2. The work -----------------------------------------------------------------------------------------------------

def prepare(arrangement):
    """A folder with edited copies of the scripts that an arrangement needs: each script needs no other file."""
    folder = ROOT / "runs" / "evidence" / f"arrangement{arrangement}"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {file: (ROOT / file).read_text() for file in ("edm_sc.py", "probe.py", "fid.py")}
    for old, new in ARRANGEMENTS[arrangement].items():
        assert texts["edm_sc.py"].count(old) == 1, old
        texts["edm_sc.py"] = texts["edm_sc.py"].replace(old, new)
    for file, text in texts.items():
        if not (folder / file).exists() or (folder / file).read_text() != text:     # another worker may be reading it
            (folder / f"{file}.{os.getpid()}").write_text(text)
            os.replace(folder / f"{file}.{os.getpid()}", folder / file)


def run(name, seed):
    """Trains, if need be on from where a stopped run was, and measures: a dict of plain values."""
    lines, seconds = commands(name, seed), []
    for line in lines:
        began = time.time()
        done = subprocess.run(line.replace("python ", f"{sys.executable} "), shell=True, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{line}\n{done.stderr[-3000:]}")
        seconds.append(round(time.time() - began))
    folder = f"arrangement{lines[0].split()[-1]}" if "prepare" in lines[0] else ""
    out = ROOT / "runs" / "evidence" / folder / Path(lines[-1].split()[-1]).parent.name
    loss, probe, fid = (json.loads((out / f"{kind}.json").read_text()) for kind in ("loss", "probe", "fid"))
    curve, exact = (dict(zip(probe["layers"], probe[key][0])) for key in ("held_out_accuracy", "held_out_ridge"))
    return dict(name=name, seed=seed, loss=loss["loss"], loss_by_time=loss["by_time"], exchanged=loss["exchanged"],
                accuracy=probe["accuracy"], ridge=probe["ridge"], knn=probe["knn"], t=probe["t"], layer=probe["layer"],
                ridge_layer=probe["ridge_layer"],
                held_out=curve, held_out_ridge=exact, fd_tiny=fid["value"], floor=fid["floor"],
                parameters=loss["parameters"], seconds=seconds[-4:], machine=loss["machine"], commands=lines)


def measure_loss(path):
    """Writes loss.json beside a checkpoint: the mean denoising loss of all test images, one time and noise for each, the same for all
    networks of a formulation; by quarters of the training times; by how many per cent the loss of 2,000 of them rises where f is
    another image's; and the number of parameters."""
    import torch
    sys.path.insert(0, os.getcwd())
    module = importlib.import_module(torch.load(path, map_location="cpu", weights_only=True)["script"])
    cfg, net = module.load_checkpoint(path)
    images, classes = module.load_data(cfg, train=False)
    known = hasattr(cfg, "uncond") and not cfg.uncond       # a network that is told the class
    diffusion, batch = module.Diffusion(cfg), 500

    def measure(count, pairs=False):
        losses, quarters = [], []
        for i in range(0, min(count, len(images)), batch):
            gen, n = module.rng(0, i, 6), len(images[i:i + batch])
            view = dict(flip=torch.zeros(n, dtype=torch.bool)) | (dict(told=torch.ones(n, dtype=torch.bool)) if known else {})
            x, told = module.make_view(images[i:i + batch], classes[i:i + batch] if known else None, view)
            t, noise = diffusion.draw_t(n, gen), torch.randn(x.shape, generator=gen)
            if pairs:           # of images at one time, for `exchange`
                order = t.argsort()
                x, t, noise, told = x[order], t[order][::2].repeat_interleave(2), noise[order], told[order] if known else None
            losses.append(diffusion.loss((lambda x, c: net(x, c, told)) if known else net, x, t, noise))
            quarters.append(sum((t > limit).long() for limit in diffusion.quartiles))
        loss, quarter = torch.cat(losses), torch.cat(quarters)
        return [loss.mean().item(), *(loss[quarter == k].mean().item() for k in range(4))]

    with torch.inference_mode():
        mean, *by_time = measure(len(images))
        own = measure(2000, pairs=True)
        others = measure(2000, pairs=True) if exchange(net) else None
    Path(path).with_name("loss.json").write_text(json.dumps(dict(
        loss=mean, by_time=by_time, exchanged=[100 * (b / a - 1) for a, b in zip(own, others)] if others else None,
        machine=f"{torch.cpu.get_capabilities()['cpu_name']}, torch {torch.__version__}",
        parameters=sum(p.numel() for p in net.parameters()))))


def exchange(net):
    """From now on, what conditions the decoder is of another image: two by two, images 0 and 1, 2 and 3, ... of a batch exchange it;
    they should be at the same time, since f depends on it, too. UNet, DiT: the f that W is given. U-ViT: the [CLS] that all other
    tokens read in every block; without [CLS], the time token, which reads the patches as well and can play the same part. Returns
    whether there is such a thing."""
    def swap(f):
        return f.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)

    def others(h, token):
        h = h.clone()
        h[:, token] = swap(h[:, token])
        return h

    def wrap(block, token):
        plain = block.forward

        def forward(h, mask, *skip):
            out = plain(others(h, token), mask, *(others(s, token) for s in skip))
            out[:, token] = plain(h, mask, *skip)[:, token]
            return out
        block.forward = forward

    if hasattr(net, "sc_proj"):
        net.sc_proj.register_forward_pre_hook(lambda _, inputs: swap(inputs[0]))
    elif hasattr(net, "mid_block"):
        for block in (*net.in_blocks, net.mid_block, *net.out_blocks):
            wrap(block, int(net.cls))
    return hasattr(net, "sc_proj") or hasattr(net, "mid_block")


@contextlib.contextmanager
def alone(path):
    """Whether this process is the only one here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def results():
    """{(name, seed): what was measured}."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(r["name"], r["seed"]): r for r in map(json.loads, lines)}


def work():
    """Does what is to be done and nobody else is at, until there is nothing left."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    while True:
        for name, seed in jobs():
            with alone(ROOT / "runs" / "evidence" / f"{name.split(' long')[0].replace(' ', '-')}-s{seed}.lock") as mine:
                if not mine or (name, seed) in results():
                    continue
                result = run(name, seed)
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(result) + "\n")
            print(f"{name}, seed {seed}: loss {result['loss']:.5f}, probe {result['accuracy']:.2f} % ({result['layer']}), "
                  f"FD-tiny {result['fd_tiny']:.2f}, {result['seconds']} s", flush=True)
            break
        else:
            return


# ---- 3. The tables ---------------------------------------------------------------------------------------------------

STUDENT = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160), 2))   # 97.5 % quantile, n pairs


def cell(values, digits):
    mean = statistics.mean(values)
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def difference(pairs, digits, relative=False):
    """Mean of the paired differences and half the width of its 95 % confidence interval; bold if 0 is outside."""
    values = [100 * (b / a - 1) if relative else b - a for a, b in pairs]
    if len(values) < 2:
        return f"{values[0]:+.{digits}f}" if values else ""
    mean, half = statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


def by_name():
    """{name: {seed: result}}."""
    found = collections.defaultdict(dict)
    for (name, seed), r in results().items():
        found[name][seed] = r
    return found


def table_of_times():
    """Fig. 6 by noise level: paired differences of the loss by quarters of the training times."""
    found, lines = by_name(), ["| difference of the test loss, % | least noise | second quarter | third | most noise |", "|---|---|---|---|---|"]
    for base, method in PAIRS:
        if shared := sorted(set(found[base]) & set(found[method])):
            pairs = [[(found[base][s]["loss_by_time"][k], found[method][s]["loss_by_time"][k]) for s in shared] for k in range(4)]
            lines.append(f"| `{method}` | " + " | ".join(difference(quarter, 2, True) for quarter in pairs) + " |")
    return "\n".join(lines)


def table_of_layers():
    """Fig. 5: held-out accuracy over the layers of the baselines, and paired differences; and those of the closed form."""
    found, lines = by_name(), ["| held-out accuracy, % |" + "".join(f" layer {k} |" for k in range(1, 7)), "|---|" + "---|" * 6]
    for base, method in zip(BASELINES, TABLE2):
        if shared := sorted(set(found[base]) & set(found[method])):
            layers = list(found[base][shared[0]]["held_out"])
            more = [layer for layer in found[method][shared[0]]["held_out"] if layer not in layers]
            pairs, exact = ([[(found[base][s][key][k], found[method][s][key][k]) for s in shared] for k in layers]
                            for key in ("held_out", "held_out_ridge"))
            for name, cells in ((f"`{base}`", [cell([a for a, _ in pair], 1) for pair in pairs]),
                                (f"`{method}`", [difference(pair, 1) for pair in pairs]),
                                (f"`{method}`, ridge", [difference(pair, 1) for pair in exact]),
                                *((f"`{method}`, `[CLS]`" + name, [cell([found[method][s][key][k] for s in shared], 1) for k in more])
                                  for name, key in (("", "held_out"), (", ridge", "held_out_ridge")) if more)):
                lines.append("| " + " | ".join([name, *cells] + [""] * (6 - len(cells))) + " |")
    return "\n".join(lines)


def table_of_exchange():
    """What the condition is worth: by how much the loss rises where it is another image's."""
    found, lines = by_name(), ["| rise of the test loss, % | seeds | all times | least noise | second quarter | third | most noise |",
                               "|---|---|---|---|---|---|---|"]
    for name in ("uvit none", *TABLE2, *dict.fromkeys(name for key in ("length", "width", "arrangement", "table7a", "glyphs") for name, _ in TABLES[key])):
        rows = [r["exchanged"] for r in found[name].values() if r["exchanged"]]
        if rows and not any(line.startswith(f"| `{name}` ") for line in lines):
            lines.append(f"| `{name}` | {len(rows)} | " + " | ".join(cell(values, 1) for values in zip(*rows)) + " |")
    return "\n".join(lines)


def table_together():
    """Differences that self-conditioning makes, over several kinds of pairs at once, seeds 0 to 2: half of the interval of all pairs, and
    in brackets that of the three means of a seed's pairs. Bold where 0 is outside both."""
    def both(names, key):
        relative, triples = key == "loss", [[(found[a][s], found[b][s]) for a, b in names if s in found[a] and s in found[b]] for s in range(3)]
        pairs = [(a[key], b[key]) for triple in triples for a, b in triple]
        change = lambda a, b: 100 * (b / a - 1) if relative else b - a
        means = [(0, statistics.mean(change(a[key], b[key]) for a, b in triple)) for triple in triples]
        one, two = difference(pairs, 2, relative), difference(means, 2)
        text = f"{one.strip('*')} ({two.strip('*').split()[-1]})"
        return f"**{text}**" if "**" in one and "**" in two else text
    found, unets = by_name(), ("edm", "ddpm", "rf")
    lines = ["| together | pairs | test loss, % | probe | ridge | 20 neighbours | FD-tiny |", "|---|---|---|---|---|---|---|"]
    for what, names in (
            ("`adaptive`: EDM, DDPM, RF", [(f"{model} none", f"{model} adaptive") for model in unets]),
            ("`add`: EDM, DDPM, RF", [(f"{model} none", f"{model} add") for model in unets]),
            ("EDM `adaptive`: plain, `aug`, `aug cl`", [(f"edm none{more}", f"edm adaptive{more}") for more in ("", " aug", " aug cl")]),
            ("U-ViT `cls`: plain, `aug`, `cl`, `aug cl`", [(f"uvit none{more}{' gap' * ('cl' in more)}", f"uvit cls{more}")
                                                           for more in ("", " aug", " cl", " aug cl")])):
        count = sum(s in found[a] and s in found[b] for a, b in names for s in range(3))
        lines.append(f"| {what} | {count} | " + " | ".join(both(names, key) for key in ("loss", "accuracy", "ridge", "knn", "fd_tiny")) + " |")
    return "\n".join(lines)


def chance(text):
    """How many differences of the tables in a text are bold. Rows that stand in two tables count once."""
    rows = [(line.split("|")[1], cell) for line in set(text.splitlines()) for cell in line.split("|") if re.match(r" \**[+-].* ± ", cell)]
    bold = [row for row, cell in rows if "**" in cell]
    special = lambda names: sum(bool(re.search(r" (aug|cl)\b", name)) for name in names)       # augmentation or contrast
    rest = len(rows) - special(row for row, _ in rows)
    return (f"Of the {len(rows)} differences with an interval, {len(bold)} are bold, {special(bold)} of them in rows with augmentation or "
            f"contrast. Of the other {rest}, {len(bold) - special(bold)} are bold; chance alone would give about {rest / 20:.0f}. They share runs "
            "and baselines, so these counts are no test.")


def total():
    done = results()
    return (f"{len(done)} of the {len(jobs())} runs in the queue are done; they took {sum(sum(r['seconds']) for r in done.values()) / 3600:.1f} hours "
            "on one core each, beside other work, training and measuring (of runs that were stopped, the last part is counted).")


def table(rows):
    """A Markdown table: mean and standard deviation over seeds, and paired differences (same seeds) with their interval."""
    found = by_name()
    lines = ["| run | seeds | test loss | difference, % | probe, % | difference | ridge, % | difference | FD-tiny | difference |",
             "|---|" + "---|" * 9]
    for name, base in rows:
        runs, others = found[name], found[base] if base else {}
        if not runs:
            continue
        shared = sorted(set(runs) & set(others))
        pairs = lambda key: [(others[s][key], runs[s][key]) for s in shared]
        columns = [(cell([r[key] for r in runs.values()], digits), difference(pairs(key), 2, key == "loss"))
                   for key, digits in (("loss", 5), ("accuracy", 2), ("ridge", 2), ("fd_tiny", 2))]
        lines.append(f"| `{name}` | {len(runs)} | " + " | ".join(text for column in columns for text in column) + " |")
    return "\n".join(lines)


def fill(text):
    """README with its tables as the results have them: between <!-- evidence NAME --> and <!-- end -->."""
    def replace(match):
        special = dict(time=table_of_times, layers=table_of_layers, exchange=table_of_exchange, together=table_together, total=total)
        return match[1] + (special[match[2]]() if match[2] in special else table(TABLES[match[2]])) + "\n" + match[3]
    text = re.sub(r"(<!-- evidence (?!chance)(\w+) -->\n).*?(<!-- end -->)", replace, text, flags=re.S)
    return re.sub(r"(<!-- evidence chance -->\n).*?(<!-- end -->)", lambda match: f"{match[1]}{chance(text)}\n{match[2]}", text, flags=re.S)


def draw_pictures(n=16, scale=2):
    """assets/with_and_without.png: samples of the runs of seed 0, with and without self-conditioning, from the same noise."""
    from PIL import Image, ImageDraw
    sys.path.insert(0, str(ROOT))
    names = [name for pair in zip(BASELINES, TABLE2) for name in pair]
    picture = Image.new("RGB", (120 + 17 * scale * n, 18 * scale * len(names)), "white")
    for row, name in enumerate(names):
        module = importlib.import_module(SCRIPTS[name.split()[0]][0])
        cfg, net = module.load_checkpoint(ROOT / "runs" / "evidence" / f"{name.replace(' ', '-')}-s0" / "last.pt")
        top = 18 * scale * row + scale * (row % 2 == 0)
        ImageDraw.Draw(picture).text((6, top + 10), name, fill="black")
        for i, image in enumerate(module.sample(net, cfg, range(n))):
            tile = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
            picture.paste(tile.resize((16 * scale, 16 * scale), Image.NEAREST), (120 + 17 * scale * i, top))
    picture.save(ROOT / "assets" / "with_and_without.png")


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["work"]
    if what == "loss":
        measure_loss(*rest)
    elif what == "prepare":
        prepare(*rest)
    elif what == "pictures":
        draw_pictures()
    elif what == "list":
        for job in jobs():
            print("done" if job in results() else "    ", *job)
    elif what == "readme":
        (ROOT / "README.md").write_text(fill((ROOT / "README.md").read_text()))
    else:
        work()
