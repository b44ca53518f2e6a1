"""The paper's claims on two CPU cores: a queue of small runs that can be stopped at any time and goes on where it stopped.

    python tests/evidence.py                    # works through the queue; a second one beside it shares the work
    python tests/evidence.py list               # what is done and what is not
    python tests/evidence.py table              # mean, standard deviation and paired differences, as in the README

Each run trains, then is measured: held-out denoising loss (all test images, fixed noise and times), linear probe of all layers
(chosen on held-out training images), FD-tiny of 2,000 samples. A line of assets/results/NAME.jsonl holds the result and the
command that made it; the weights stay in runs/evidence/.
"""
import contextlib
import fcntl
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "assets" / "results"
BUDGET = dict(ddpm_sc="--epochs 1", edm_sc="--epochs 1", rf_sc="--epochs 1", uvit_sc="--epochs 3", dit_latent_sc="--epochs 3")
FASHION = "--dataset fashion_mnist --size 16"
EXPERIMENTS = {     # name: rows of (label, script, flags), the baseline first; every row with these seeds
    "table2": (range(3), [(f"{script} {sc}", script, f"{FASHION} {BUDGET[script]} --self_cond {sc}") for script, method in (
        ("ddpm_sc", "adaptive"), ("edm_sc", "adaptive"), ("rf_sc", "adaptive"), ("uvit_sc", "cls")) for sc in ("none", method)]),
}


def run(name, label, script, flags, seed):
    """Trains, if need be on from where a stopped run was, and measures; None if another process is at it."""
    out = f"runs/evidence/{name}-{label.replace(' ', '-')}-s{seed}"
    command = f"python {script}.py {flags} --seed {seed} --out {out}"
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    call = lambda words: subprocess.run([sys.executable, *shlex.split(words)[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    trained = call(command)
    if "is being written by another run" in trained.stderr:
        return None
    assert trained.returncode == 0, trained.stderr[-2000:]
    for words in (f"python probe.py {out}/last.pt --no-raw", f"python fid.py {out}/last.pt --detector tiny --n 2000 --json {out}/fid.json"):
        done = call(words)
        assert done.returncode == 0, done.stderr[-2000:]
    probe, fid = (json.loads((ROOT / out / f"{kind}.json").read_text()) for kind in ("probe", "fid"))
    loss, by_time = held_out_loss(script, ROOT / out / "last.pt")
    return dict(experiment=name, label=label, seed=seed, command=command, loss=loss, loss_by_time=by_time, accuracy=probe["accuracy"],
                knn=probe["knn"], layer=probe["layer"], t=probe["t"], layers=probe["layers"], curve=probe["held_out_accuracy"][0],
                fd_tiny=fid["value"], floor=fid["floor"])


def held_out_loss(script, checkpoint):
    """Denoising loss on all test images, one draw of time and noise for each, the same for all networks of a formulation; and by
    quarter of the training times (Fig. 6)."""
    import torch
    module = importlib.import_module(script)
    cfg, net = module.load_checkpoint(checkpoint)
    images, classes = module.load_data(cfg, train=False)
    diffusion, losses, quarters = module.Diffusion(cfg), [], []
    with torch.inference_mode():
        for i in range(0, len(images), 500):
            gen, n = module.rng(0, i, 6), len(images[i:i + 500])
            x, told = module.make_view(images[i:i + 500], classes[i:i + 500], dict(flip=torch.zeros(n, dtype=torch.bool)))
            t, noise = diffusion.draw_t(n, gen), torch.randn(x.shape, generator=gen)
            losses.append(diffusion.loss(lambda x, c: net(x, c, told), x, t, noise))
            quarters.append(sum((t > limit).long() for limit in diffusion.quartiles))
    loss, quarter = torch.cat(losses), torch.cat(quarters)
    return loss.mean().item(), [loss[quarter == k].mean().item() for k in range(4)]


def done(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def jobs():
    """All that is to be done, seed by seed, so that a queue that is stopped early has whole rows."""
    for name, (seeds, rows) in EXPERIMENTS.items():
        for seed in seeds:
            for label, script, flags in rows:
                yield name, label, script, flags, seed


def work():
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, label, script, flags, seed in jobs():
        if any((r["label"], r["seed"]) == (label, seed) for r in done(name)):
            continue
        result = run(name, label, script, flags, seed)
        if result:
            with open(RESULTS / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{name}, {label}, seed {seed}: loss {result['loss']:.5f}, probe {result['accuracy']:.2f} % ({result['layer']}), "
                  f"FD-tiny {result['fd_tiny']:.2f}", flush=True)


def spread(values):
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.4g}"


def table(name):
    """Rows of label, runs, loss, accuracy and FD-tiny (mean and standard deviation), and the paired differences to the row above."""
    results, lines, before = done(name), [], None
    for label, *_ in EXPERIMENTS[name][1]:
        rows = {r["seed"]: r for r in results if r["label"] == label}
        if rows:
            lines.append("| " + " | ".join([label, str(len(rows)), *(spread([r[k] for r in rows.values()]) for k in ("loss", "accuracy", "fd_tiny"))]) + " |")
            pairs = [(before[s], rows[s]) for s in rows if before and s in before and before[s]["command"].split()[1] == rows[s]["command"].split()[1]]
            if pairs:
                lines.append("| difference | " + " | ".join([str(len(pairs)), *(spread([b[k] - a[k] for a, b in pairs]) for k in ("loss", "accuracy", "fd_tiny"))]) + " |")
        before = rows
    return "\n".join(["| | runs | held-out loss | probe, % | FD-tiny |", "|---|---|---|---|---|", *lines])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    what = sys.argv[1] if len(sys.argv) > 1 else "work"
    if what == "list":
        for name, label, _, _, seed in jobs():
            print("done" if any((r["label"], r["seed"]) == (label, seed) for r in done(name)) else "    ", name, label, seed)
    elif what == "table":
        print("\n\n".join(f"{name}\n\n{table(name)}" for name in EXPERIMENTS))
    else:
        work()
