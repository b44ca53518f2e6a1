"""What options cost, as ratios of the times of a training step. Not a test: no time is asserted.

Steps that are compared run in turns, so that a busy machine disturbs all alike.

    python tests/bench.py                                       # all of it: an hour on two cores
    python tests/bench.py --scripts uvit_sc --batch 8 --rounds 3

On a GPU: images/s of the networks of Tables 2 to 6 at the paper's batch, alone, eager and compiled.
Writes docs/results/gpu-NAME.json, and the tables of all such files into docs/gpu.md.

    python tests/bench.py --device cuda
"""
import argparse, copy, dataclasses, gc, importlib, json, re, statistics, sys, time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")
PAIRS = {       # what is measured: fields of it, and of what it is compared with
    "self-conditioning": ({}, dict(self_cond="none")),
    "contrast": (dict(cl=0.01), {}),
    "augmentation": (dict(aug=0.12), {}),
    "both": (dict(aug=0.12, cl=0.01), {}),
    "bf16": (dict(amp="bf16"), {}),
    "mask of Fig. 2(b)": (dict(aug=0.12), dict(aug=0.12, aug_mask=0)),      # U-ViT alone
}
IMAGES = dict(cifar100=50_000, tiny_imagenet=100_000, imagenet100=126_689, imagenet=1_281_167)
ROWS = [  # tables, script, data set, fields; CIFAR-10 costs what CIFAR-100 does
    ("2", "ddpm_sc", "cifar100", {}),
    ("2", "edm_sc", "cifar100", {}),
    ("2", "rf_sc", "cifar100", {}),
    ("2", "edm_sc", "cifar100", dict(backbone="ddpmpp")),
    ("2", "uvit_sc", "cifar100", {}),
    ("3", "edm_sc", "cifar100", dict(aug=0.12)),
    ("3", "edm_sc", "cifar100", dict(aug=0.12, cl=0.01)),
    ("3", "edm_sc", "cifar100", dict(backbone="ddpmpp", aug=0.12, cl=0.01)),
    ("3", "uvit_sc", "cifar100", dict(aug=0.12)),
    ("3", "uvit_sc", "cifar100", dict(aug=0.12, aug_mask=0)),
    ("3", "uvit_sc", "cifar100", dict(aug=0.12, cl=0.01)),
    ("4", "edm_sc", "tiny_imagenet", {}),
    ("4", "uvit_sc", "tiny_imagenet", {}),
    ("4", "edm_sc", "imagenet100", {}),
    ("4", "uvit_sc", "imagenet100", {}),
    ("5", "dit_latent_sc", "imagenet100", {}),
    ("5, 6", "dit_latent_sc", "imagenet", {}),
]


def in_turns(one, two, rounds):
    """Seconds of two functions of the number of the round, [(one, two)], after a round of warming
    up."""
    times = []
    for n in range(rounds + 1):
        seconds = [0, 0]
        for k in (n % 2, 1 - n % 2):            # who comes first has another state of memory
            start = time.perf_counter()
            (one, two)[k](n)
            seconds[k] = time.perf_counter() - start
        times.append(seconds)
    return times[1:]


def make_step(script, cfg, device, compiled=False, wait=True):
    """A function of the number of the step that does what one step of train() does, and waits for
    the GPU, which train() does at log lines alone."""
    student = script.Student(script.build_net(cfg), cfg).to(device).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer, diffusion = script.make_optimizer(student, cfg), script.Diffusion(cfg)
    images = torch.randint(0, 256, (cfg.batch, 3, cfg.size, cfg.size), dtype=torch.uint8)
    if script.SCRIPT == "dit_latent_sc":
        images = torch.randn(cfg.batch, 2, *script.latent_shape(cfg)).half()
    images = images.to(device)
    if compiled:
        student.net.compile()
    y = torch.arange(cfg.batch, device=device) % 10

    def step(n):
        random = script.draw_random(cfg, diffusion, n, images.shape[-3:], device)
        objective, _ = script.training_step(cfg, diffusion, student, teacher, images, y, **random)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        script.update_ema(teacher, student, cfg.ema, n + 1)
        if wait and device.type != "cpu":
            torch.accelerator.synchronize()
    return step


def measure(script, args, device):
    dataset = "cifar10" if "cifar10" in script.RECIPES else "imagenet100"
    for name, fields in PAIRS.items():
        if "aug_mask" in fields[1] and script.SCRIPT != "uvit_sc":
            continue
        works = []
        for some in fields:
            cfg = script.make_config(dataset, batch=args.batch, device=args.device, **some)
            works.append(make_step(script, cfg, device))
        ratios = [a / b for a, b in in_turns(*works, args.rounds)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"  {name:18} x {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


def measure_row(row, args, device, peak):
    """Whole training steps on random images, in the precision that the script chooses."""
    table, name, dataset, fields = row
    script, found = importlib.import_module(name), {}
    cfg = script.make_config(dataset, device=args.device, **fields)
    total = cfg.epochs * IMAGES[dataset]
    cfg.batch = args.batch or cfg.batch // (8 if name == "dit_latent_sc" else 4)    # of one GPU
    with FlopCounterMode(display=False) as counter:
        make_step(script, dataclasses.replace(cfg, batch=2), device)(0)
    gflop = counter.get_total_flops() / 2e9
    for kind in ("eager", "compiled"):
        step = None                                             # its memory, for the next
        gc.collect()
        torch.compiler.reset()                                  # else shapes become symbols
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            step = make_step(script, cfg, device, compiled=kind == "compiled", wait=False)
            for n in range(5):                                  # compiles, chooses kernels
                step(n)
            seconds = []
            for turn in range(args.rounds):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for n in range(10):
                    step(n)
                torch.cuda.synchronize()
                seconds.append((time.perf_counter() - start) / 10)
        except RuntimeError as error:                           # no room, no compiler, ...
            found[kind] = dict(error=str(error)[:300])
            continue
        speed = cfg.batch / statistics.median(seconds)
        found[kind] = dict(images_per_second=speed, tflops=speed * gflop / 1e3,
                           share=speed * gflop / 1e3 / peak, hours=total / speed / 3600,
                           memory_gb=torch.cuda.max_memory_allocated() / 1e9)
    words = [f"{name}.py --dataset {dataset}", *(f"--{k} {v}" for k, v in fields.items())]
    return dict(table=table, command=" ".join(words), batch=cfg.batch, gflop=gflop, **found)


def matrix_peak(dtype):
    """TFLOP/s of a matrix product of 8192 x 8192, the best of ten."""
    a, best = torch.randn(8192, 8192, device="cuda", dtype=dtype), 0
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = max(best, 2 * 8192 ** 3 / (time.perf_counter() - start) / 1e12)
    return best


def measure_gpu(args, device):
    """The file of this card; rows that were measured before and are not now stay."""
    name, script = torch.cuda.get_device_name(), importlib.import_module("uvit_sc")
    dtype = script.autocast(script.make_config(), device).fast_dtype
    path = ROOT / "docs/results" / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    peak = matrix_peak(dtype)
    for row in ROWS:
        if row[1] in args.scripts:
            new = measure_row(row, args, device, peak)
            rows = [old for old in rows if old["command"] != new["command"]] + [new]
            print(json.dumps(new), flush=True)
            card = dict(card=name, torch=torch.__version__, precision=str(dtype)[6:],
                        matrix_peak_tflops=peak, rows=rows)
            path.write_text(json.dumps(card, indent=1))
    write_tables(ROOT / "docs/gpu.md")


def write_tables(page):
    """A table for each card between the marks of the page."""
    text = ""
    for path in sorted((ROOT / "docs/results").glob("gpu-*.json")):
        card = json.loads(path.read_text())
        text += (f"\n{card['card']}, torch {card['torch']}, {card['precision']}; a matrix product "
                 f"reaches {card['matrix_peak_tflops']:.0f} TFLOP/s.\n\n| table | command | batch "
                 "| eager, images/s | compiled | TFLOP/s | of the peak | GB | hours on 1, 4, 8 |\n"
                 + "|---" * 9 + "|\n")
        for row in card["rows"]:
            kinds = [row["eager"], row["compiled"]]
            speeds = [f"{kind['images_per_second']:,.0f}" if "error" not in kind else "failed"
                      for kind in kinds]
            best = [kind for kind in kinds if "error" not in kind]
            cells = [row["table"], f"`{row['command']}`", str(row["batch"]), *speeds]
            if best:
                best = best[-1]
                hours = ", ".join(f"{best['hours'] / n:.0f}" for n in (1, 4, 8))
                cells += [f"{best['tflops']:.1f}", f"{best['share']:.0%}",
                          f"{best['memory_gb']:.1f}", hours]
            text += f"| {' | '.join(cells)} |\n"
    start, end = "<!-- measured -->\n", "<!-- end -->"
    before, rest = page.read_text("utf-8").split(start)
    text = before + start + (text or "\nNo card yet.\n") + "\n" + end + rest.split(end)[1]
    page.write_text(text, "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="*", default=SCRIPTS)
    parser.add_argument("--batch", type=int, help="16; on a GPU the paper's share of one of 4 or 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.device not in ("auto", "cpu"):
        return measure_gpu(args, torch.device(args.device))
    args.batch = args.batch or 16
    for name in args.scripts:
        script = importlib.import_module(name)
        device = script.start(script.make_config(device=args.device))
        print(f"{name}, batch {args.batch} on {device}, median of {args.rounds} rounds (quartiles)")
        measure(script, args, device)


if __name__ == "__main__":
    main()
