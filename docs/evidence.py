"""The experiments of docs/evidence.md: networks that differ in one setting, over many seeds.

    python docs/evidence.py work         # does the runs that docs/results/claim.jsonl lacks, one by
                                         # one on one thread; start it twice to use two cores
    python docs/evidence.py work "dit adaptive" 3       # this run alone
    python docs/evidence.py tables       # writes the tables into docs/evidence.md and README.md

A run trains, computes the test loss and calls fid.py and probe.py. Workers do not do the same run:
it belongs to the one that made its folder, runs/evidence/NAME-sSEED. Delete that to do it again.
"""
import importlib
import json
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


def question(name):
    return re.match(r"\w+", name)[0]


def old_projector(script):
    """The projector until commit cd23a8b: it added the time, and BatchNorm took it from the keys."""
    def forward(self, f, e):
        return self.mlp(f + self.time(e.detach()))

    script.Projector.forward = forward


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
            x_0, _ = script.make_view(images[rows], torch.zeros(250, 9))
            t, eps = diffusion.draw_t(250, gen), torch.randn(x_0.shape, generator=gen)
            x_in, c_noise = diffusion.inputs(diffusion.add_noise(x_0, t, eps), t)
            prediction, _ = net(x_in, c_noise, labels[rows])
            losses.append(diffusion.loss(prediction, x_0, eps, t))
            times.append(t)
    losses, times = torch.cat(losses), torch.cat(times)
    noisiest = losses[times.argsort()[-len(times) // 4:]]
    return losses.mean().item(), noisiest.mean().item()


def do(name, seed, folder):
    """One run, from its training to its line."""
    command, clock, seconds = f"{RUNS[name][0]} --seed {seed} --out {folder}", time.time(), []

    def run(words):
        with open(folder / "output.txt", "a") as file:
            subprocess.run([sys.executable, *shlex.split(words)], cwd=ROOT, check=True, stdout=file,
                           stderr=file, env=dict(os.environ, OMP_NUM_THREADS="1"))
        seconds.append(round(time.time() - clock))

    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    if name == "contrast old":
        code = ("import sys; sys.path[:0] = ['.', 'docs']; import evidence, uvit_sc; "
                "evidence.old_projector(uvit_sc); sys.exit(uvit_sc.main(sys.argv[1:]))")
        run(f'-c "{code}" {command.split(" ", 1)[1]}')
    else:
        run(command)
    run(f"fid.py {folder}/last.pt --detector tiny --n 4000 --json {folder}/fid.json")
    run(f"probe.py {folder}/last.pt --layers {LAYERS[question(name)]} --no-raw")
    loss, noisiest = test_loss(folder / "last.pt")
    fid, probe = (json.loads((folder / f"{file}.json").read_text()) for file in ("fid", "probe"))
    return dict(name=name, seed=seed, fd_tiny=fid["value"], loss=loss, noisiest=noisiest,
                ridge=probe["ridge"], accuracy=probe["accuracy"], layer=probe["layer"],
                command=command.replace(f"{ROOT}/", ""), commit=commit.strip(), seconds=seconds)


def work(wanted=None, wanted_seed=None):
    """What is left of RUNS, a seed of all networks of a question before the next seed."""
    todo = [(question(name), seed, name) for name in RUNS for seed in range(RUNS[name][1])]
    order = [question(name) for name in RUNS]
    for _, seed, name in sorted(todo, key=lambda run: (order.index(run[0]), run[1])):
        folder = ROOT / f"runs/evidence/{name.replace(' ', '-')}-s{seed}"
        done = [(line["name"], line["seed"]) for line in read_results()]
        other = wanted and (name, seed) != (wanted, int(wanted_seed))
        if other or (name, seed) in done:
            continue
        try:
            folder.mkdir(parents=True)
        except FileExistsError:                                     # another worker's
            continue
        line = do(name, seed, folder)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def read_results():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        sys.exit(__doc__)
