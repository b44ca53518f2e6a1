"""The experiments of docs/evidence.md: networks that differ in one setting, over many seeds.

    python docs/evidence.py work         # does the runs that docs/results/claim.jsonl lacks, one by
                                         # one on one thread; start it twice to use two cores
    python docs/evidence.py work "dit adaptive" 3       # this run alone
    python docs/evidence.py tables       # writes the tables into docs/evidence.md and README.md
    python docs/evidence.py picture      # draws docs/claim.png; needs the folders of seed 0

A run trains, computes the test loss and calls fid.py and probe.py. Workers do not do the same run:
it belongs to the one that made its folder, runs/evidence/NAME-sSEED. To do it again delete that
folder and its line. The scripts of the plan are those of commit 8503cb8. To go on with them (to
repeat them, do not copy claim.jsonl):

    git worktree add ../claim 8503cb8 && cp docs/evidence.py ../claim/docs/
    cp docs/results/claim.jsonl ../claim/docs/results/ && cd ../claim && python docs/evidence.py work
"""
import importlib
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results/claim.jsonl"
QUIET = "--save_every 0 --sample_every 0"
CLOTHES = f"uvit_sc.py --dataset fashion_mnist --size 16 --epochs 4 {QUIET}"
RUNS = {  # name: command, number of seeds
    "dit-cond none": (f"dit_latent_sc.py --self_cond none {QUIET}", 12),
    "dit-cond adaptive": (f"dit_latent_sc.py --self_cond adaptive {QUIET}", 12),
    "dit-cond adaptive1": (f"dit_latent_sc.py --self_cond adaptive1 {QUIET}", 12),
    "dit none": (f"dit_latent_sc.py --uncond --self_cond none {QUIET}", 12),
    "dit adaptive": (f"dit_latent_sc.py --uncond --self_cond adaptive {QUIET}", 12),
    "dit adaptive1": (f"dit_latent_sc.py --uncond --self_cond adaptive1 {QUIET}", 12),
    "clothes none": (f"{CLOTHES} --self_cond none", 8),
    "clothes cls": (f"{CLOTHES} --self_cond cls", 8),
    "contrast old": (f"uvit_sc.py --aug 0.12 --cl 0.01 {QUIET}", 5),        # see `old_projector`
    "contrast new": (f"uvit_sc.py --aug 0.12 --cl 0.01 {QUIET}", 5),
}
LAYERS = dict(dit="block_4", clothes="out_1", contrast="cls_1")             # that are probed


def family(name):
    return re.match(r"\w+", name)[0]


def old_projector(script):
    """The projector until commit cd23a8b: it added the time, by a linear layer with PyTorch's start,
    and BatchNorm took it from the keys, which all have one time. The other weights start alike."""
    import torch
    start = script.Projector.__init__

    def __init__(self, D, hidden, E):
        start(self, D, hidden, E)
        with torch.random.fork_rng():
            self.time.reset_parameters()

    def forward(self, f, e):
        return self.mlp(f + self.time(e.detach()))

    script.Projector.__init__, script.Projector.forward = __init__, forward


def test_loss(path):
    """Denoising loss of all test images, each at four times and noises that are the same for all
    networks of a formulation: the mean, and the mean over the quarter of the times with most noise."""
    import torch
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(torch.load(path, weights_only=True)["script"])
    cfg, net = script.load_checkpoint(path)
    images, labels = script.load_data(cfg, train=False)
    diffusion, losses, times = script.Diffusion(cfg), [], []
    with torch.inference_mode():
        for i in range(0, 4 * len(images), 250):
            rows = torch.arange(i, i + 250) % len(images)
            gen = torch.Generator().manual_seed(i)
            x_0, _ = script.make_view(images[rows], torch.zeros(250, 9))      # as they are
            t, eps = diffusion.draw_t(250, gen), torch.randn(x_0.shape, generator=gen)
            x_in, c_noise = diffusion.inputs(diffusion.add_noise(x_0, t, eps), t)
            prediction, _ = net(x_in, c_noise, labels[rows])
            losses.append(diffusion.loss(prediction, x_0, eps, t))
            times.append(t)
    losses, times = torch.cat(losses), torch.cat(times)
    noisiest = losses[times.argsort()[-len(times) // 4:]]
    return losses.mean().item(), noisiest.mean().item()


def do(name, seed, folder):
    """One run, from its training to its line; `failed` instead of figures if a command failed."""
    command, clock, seconds = f"{RUNS[name][0]} --seed {seed} --out {folder}", time.time(), []

    def run(words):
        with open(folder / "output.txt", "a") as file:
            subprocess.run([sys.executable, *shlex.split(words)], cwd=ROOT, check=True, stdout=file,
                           stderr=file, env=dict(os.environ, OMP_NUM_THREADS="1"))
        seconds.append(round(time.time() - clock))

    log = ["git", "log", "-1", "--format=%h", "--", "*_sc.py", "probe.py", "fid.py"]
    commit = subprocess.check_output(log, cwd=ROOT, text=True)      # that last changed a script
    if name == "contrast old":
        code = ("import sys; sys.path[:0] = ['.', 'docs']; import evidence, uvit_sc; "
                "evidence.old_projector(uvit_sc); sys.exit(uvit_sc.main(sys.argv[1:]))")
        run(f'-c "{code}" {command.split(" ", 1)[1]}')
    else:
        run(command)
    run(f"fid.py {folder}/last.pt --detector tiny --n 4000 --json {folder}/fid.json")
    run(f"probe.py {folder}/last.pt --layers {LAYERS[family(name)]} --no-raw")
    loss, noisiest = test_loss(folder / "last.pt")
    fid, probe = (json.loads((folder / f"{file}.json").read_text()) for file in ("fid", "probe"))
    return dict(name=name, seed=seed, fd_tiny=fid["value"], loss=loss, noisiest=noisiest,
                ridge=probe["ridge"], accuracy=probe["accuracy"], layer=probe["layer"],
                command=command.replace(f"{ROOT}/", ""), commit=commit.strip(), seconds=seconds,
                detector=fid["detector_sha256"], floor=fid["floor"])


def work(wanted=None, wanted_seed=None):
    """What is left of RUNS, a seed of all networks of a family before the next seed."""
    order = [family(name) for name in RUNS]
    todo = [(order.index(family(name)), seed, name)
            for name in RUNS for seed in range(RUNS[name][1])]
    for _, seed, name in sorted(todo, key=lambda run: run[:2]):
        folder = ROOT / f"runs/evidence/{name.replace(' ', '-')}-s{seed}"
        done = [(line["name"], line["seed"]) for line in read_results()]
        asked = wanted in (None, name) and wanted_seed in (None, str(seed))
        if not asked or (name, seed) in done:
            continue
        try:
            folder.mkdir(parents=True)
        except FileExistsError:                                     # another worker's
            continue
        try:
            line = do(name, seed, folder)
        except subprocess.CalledProcessError as error:
            line = dict(name=name, seed=seed, failed=str(error))
        with open(RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


# The questions of the plan: two networks, the primary figure, what is asked.
QUESTIONS = {
    "1a": ("dit-cond adaptive", "dit-cond none", "fd_tiny", "samples, told the classes"),
    "1b": ("dit adaptive", "dit none", "fd_tiny", "samples, not told"),
    "2": ("clothes cls", "clothes none", "fd_tiny", "samples of U-ViT with [CLS]"),
    "3a": ("dit-cond adaptive", "dit-cond none", "ridge", "features, told the classes"),
    "3b": ("dit adaptive", "dit none", "ridge", "features, not told"),
    "3c": ("clothes cls", "clothes none", "ridge", "features of U-ViT"),
    "4": ("dit adaptive1", "dit adaptive", "fd_tiny", "`adaptive1` instead of `adaptive`, samples"),
    "5": ("contrast new", "contrast old", "ridge", "the projector's correction, features"),
}
FIGURES = dict(fd_tiny="FD-tiny, log %", loss="test loss, log %", noisiest="noisiest quarter, log %",
               ridge="ridge, points", accuracy="probe, points")
BETTER = dict(fd_tiny=-1, loss=-1, noisiest=-1, ridge=1, accuracy=1)
SMALL = dict(fd_tiny=5, ridge=0.5)                                  # gains that would not matter
T_975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
         10: 2.228, 11: 2.201}                                      # Student's t, degrees of freedom


def differences(one, other, key):
    """{seed: difference of two networks}: points, or per cent by logarithms; NaN if a run failed."""
    found = {}
    for line in read_results():
        runs = found.setdefault(line["name"], {})
        assert line["seed"] not in runs, line
        runs[line["seed"]] = line.get(key, math.nan)
    a, b = found.get(one, {}), found.get(other, {})
    pairs = {seed: (a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())}
    if "%" in FIGURES[key]:
        return {seed: 100 * math.log(x / y) for seed, (x, y) in pairs.items()}
    return {seed: x - y for seed, (x, y) in pairs.items()}


def compare(label, key):
    """{seed: difference} of a question."""
    one, other, _, _ = QUESTIONS[label]
    found = differences(one, other, key)
    if label == "4":                                                # the mean of both kinds of DiT
        told = differences(*(name.replace("dit", "dit-cond") for name in (one, other)), key)
        found = {seed: (found[seed] + told[seed]) / 2 for seed in sorted(found) if seed in told}
    return found


def interval(values):
    """Mean and half of its 95 % interval."""
    n = len(values)
    return statistics.mean(values), T_975[n - 1] * statistics.stdev(values) / n ** 0.5


def verdict(label, values):
    """By the rules of the plan."""
    key = QUESTIONS[label][2]
    if any(map(math.isnan, values)):
        return "undecided: a run failed"
    mean, half = interval(values)
    gain = mean * BETTER[key]
    if gain - half > 0:
        return "**held**"
    if gain + half < 0 or abs(mean) + half < SMALL[key]:
        return "**not held**"
    return "undecided"


def tables():
    """The tables between the marks of the page and of README, from the results alone. No interval
    is shown before all seeds are there."""
    rows, seeds, short = [], [], []
    for label, (one, other, key, what) in QUESTIONS.items():
        values = list(compare(label, key).values())
        if len(values) < RUNS[one][1]:
            rows.append(f"| {label} | {what} | | still running: {len(values)} of {RUNS[one][1]} | |")
            short.append(f"| {what} | | still running |")
            continue
        cells = {figure: interval(list(compare(label, figure).values())) for figure in FIGURES}
        words = {figure: "{} {:+.2f} ± {:.2f}".format(FIGURES[figure], *cells[figure])
                 for figure in FIGURES}
        others = "; ".join(words[figure] for figure in FIGURES if figure != key)
        rows.append(f"| {label} | {what} | {words[key]} | {verdict(label, values)} | {others} |")
        mean, half = cells[key]
        figure = f"ridge {mean:+.1f} ± {half:.1f} points"
        if key == "fd_tiny":
            ends = (math.exp(value / 100) for value in (mean, mean - half, mean + half))
            figure = "FD-tiny × {:.2f} ({:.2f} to {:.2f})".format(*ends)
        short.append(f"| {what} | {figure} | {verdict(label, values)} |")
        seeds.append(f"| {label} | {', '.join(f'{value:+.2f}' for value in values)} |")
    page = ["| | question | primary figure | verdict | beside it |", "|---|---|---|---|---|", *rows]
    if seeds:
        page += ["", "| | the primary figure's difference, seed by seed |", "|---|---|", *seeds]
    write(ROOT / "docs/evidence.md", page)
    write(ROOT / "README.md", ["| question | difference, 95 % interval | verdict |", "|---|---|---|",
                               *short])


def strip_plot(width=770, row=34, left=160):
    """FD-tiny of all seeds of 1a and 1b on a logarithmic axis: a point is a seed, a line joins the
    two networks of a seed, a bar is the mean of the logarithms."""
    from PIL import Image, ImageDraw, ImageFont
    strips, colours = [], ("#999999", "#1f77b4")
    for label, where in (("1a", "told the digit"), ("1b", "not told")):
        one, other, _, _ = QUESTIONS[label]
        for words, name in (("without f", other), ("with f", one)):
            lines = [line for line in read_results() if line["name"] == name]
            assert len(lines) == RUNS[name][1], f"runs of {name} are missing"
            lines.sort(key=lambda line: line["seed"])
            strips.append((f"{words}, {where}", [math.log(line["fd_tiny"]) for line in lines]))
    low = min(min(values) for _, values in strips)
    high = max(max(values) for _, values in strips)

    def place(value):
        return left + (value - low) / (high - low) * (width - left - 20)

    image = Image.new("RGB", (width, row * len(strips) + 30), "white")
    draw, font, bottom = ImageDraw.Draw(image), ImageFont.load_default(11), row * len(strips)
    draw.text((6, bottom + 6), "FD-tiny, less is better", "black", font)
    for tick in (0.25, 0.5, 1, 2, 4, 8):
        if low <= math.log(tick) <= high:
            x = place(math.log(tick))
            draw.line((x, 0, x, bottom), "#eeeeee")
            draw.text((x, bottom + 6), f"{tick:g}", "black", font, anchor="ma")
    for i in range(0, len(strips), 2):
        y = row * i + row // 2
        for a, b in zip(strips[i][1], strips[i + 1][1]):
            draw.line((place(a), y, place(b), y + row), "#cccccc")
    for i, (words, values) in enumerate(strips):
        y, mean = row * i + row // 2, place(statistics.mean(values))
        draw.text((6, y - 7), words, "black", font)
        for x in map(place, values):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colours[i % 2], "white")
        draw.line((mean, y - 10, mean, y + 10), "black", width=2)
    return image


def picture(left=160):
    """docs/claim.png: digits that the networks of seed 0 draw from the same noise, and the strips."""
    from PIL import Image, ImageDraw, ImageFont
    sys.path.insert(0, str(ROOT))
    import dit_latent_sc as script
    strips = strip_plot(left=left)
    image = Image.new("RGB", (strips.width, 4 * 64 + strips.height), "white")
    image.paste(strips, (0, 4 * 64))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    names = {"dit-cond none": "without f, told the digit",
             "dit-cond adaptive": "with f, told the digit",
             "dit none": "without f, not told", "dit adaptive": "with f, not told"}
    for i, (name, words) in enumerate(names.items()):
        folder = ROOT / f"runs/evidence/{name.replace(' ', '-')}-s0"
        cfg, net = script.load_checkpoint(folder / "last.pt")
        digits = script.sample(net, cfg, range(10))
        row = digits.permute(2, 0, 3, 1).flatten(1, 2).numpy()
        image.paste(Image.fromarray(row).resize((600, 60), 0), (left, 64 * i))
        draw.text((6, 64 * i + 24), words, "black", font)
    image.save(ROOT / "docs/claim.png")


def write(path, lines):
    before, found, rest = path.read_text("utf-8").partition("<!-- claim -->\n")
    if found:
        text = "\n".join(lines)
        end = rest[rest.index("<!-- end claim -->"):]
        path.write_text(f"{before}{found}{text}\n{end}", "utf-8")


def read_results():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    elif sys.argv[1:2] == ["tables"]:
        tables()
    elif sys.argv[1:2] == ["picture"]:
        picture()
    else:
        sys.exit(__doc__)
