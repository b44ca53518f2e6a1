"""What the machine is asked for: times as ratios, and as shares of what it can do. Not a test: no time is ever asserted.

Steps that are compared run in turns, so that a busy machine disturbs all alike; medians are printed with their quartiles. Where
memory is slow to come from the system, ratios are steadier with MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=8000000000 in the environment.

    python tests/bench.py                                               # all of it: an hour on two cores
    python tests/bench.py steps --scripts uvit_sc --batch 8 --rounds 3  # a part: steps, amp, use, growth
    torchrun --nproc_per_node=2 tests/bench.py growth                   # the same batches on two processes
"""
import argparse
import copy
import functools
import importlib
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SCRIPTS = ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")
VARIANTS = {"baseline": dict(self_cond="none"), "self-conditioning": {}, "+ contrast": dict(cl=0.01),
            "+ augmentation": dict(aug=0.12), "+ both": dict(aug=0.12, cl=0.01)}


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turns(works, rounds):
    """Seconds of each of some functions of the number of the round, {name: [seconds]}, after one round of warming up."""
    times = {name: [] for name in works}
    for n in range(rounds + 1):
        turn = n % len(works)           # whoever comes first finds another state of the allocator
        for name in [*works][turn:] + [*works][:turn]:
            start = time.perf_counter()
            works[name](n)
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(seconds, base):
    """Median and quartiles of what a step takes in proportion to another of the same round, as text."""
    ratios = [a / b for a, b in zip(seconds, base)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


@functools.lru_cache
def peak(device, dtype, n=2048):
    """FLOP/s of a matrix product, the best of ten: what a step is measured against."""
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        wait(torch.device(device))
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / min(seconds)


def make_step(script, cfg, device):
    """A function of the number of the step that does what one step of train() does."""
    learner = script.Learner(script.build_net(cfg), cfg).to(device).train()
    mean = copy.deepcopy(learner).eval().requires_grad_(False)
    optimizer, context, diffusion = script.make_optimizer(learner, cfg), script.autocast(cfg, device), script.Diffusion(cfg)
    model = learner
    if script.WORLD > 1:
        model = torch.nn.parallel.DistributedDataParallel(learner)
    share = cfg.batch // script.WORLD
    x, y = torch.randint(0, 256, (share, 3, cfg.size, cfg.size), dtype=torch.uint8, device=device), None
    if hasattr(cfg, "tokenizer"):
        x, y = torch.randn(share, 2, *script.latent_shape(cfg), device=device).half(), torch.arange(share, device=device)

    def step(n):
        gen = script.rng(n, device=device)
        noise, t = torch.randn((share, *learner.net_input), generator=gen, device=device), diffusion.draw_t(share, gen)
        part = lambda view: {k: v[:share] for k, v in view.items()}
        x_0, labels = script.make_view(x, y, part(script.draw_view(cfg, script.rng(n, 3))))
        other = script.make_view(x, y, part(script.draw_view(cfg, script.rng(n, 4)))) if cfg.cl else None
        with context:
            keys = mean.keys(*other, noise.flip(0)) if cfg.cl else None
            objective, _ = model(x_0, labels, t, noise, keys)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        script.update_ema(mean, learner, cfg.ema, n + 1)
        wait(device)
    learner.net_input = x.shape[-3:]
    return step


def config(script, args, **fields):
    return script.make_config("cifar10" if "cifar10" in script.RECIPES else "imagenet100",
                              **dict(batch=args.batch, device=args.device) | fields)


def flops(work):
    """Floating-point operations of the matrix products, convolutions and attention in a function."""
    with FlopCounterMode(display=False) as counter:
        work(0)
    return counter.get_total_flops()


def steps(name, script, args, device):
    """Whole training steps, of the options as ratios, and their FLOP/s as a share of the peak."""
    works = {label: make_step(script, config(script, args, **fields), device) for label, fields in VARIANTS.items()
             if label in ("baseline", "self-conditioning", *args.extras)}
    count = {label: flops(work) for label, work in works.items()}
    times = in_turns(works, args.rounds)
    for label, seconds in times.items():
        base = "baseline" if label == "self-conditioning" else "self-conditioning"
        middle = statistics.median(seconds)
        share = count[label] / middle / peak(args.device, torch.float32)
        print(f"  {label:18}{middle:8.3f} s a step, {ratio(seconds, times[base])} x {base}, {100 * share:.0f} % of the peak", flush=True)


def amp(name, script, args, device):
    """bf16 against float32."""
    works = {kind: make_step(script, config(script, args, amp=kind), device) for kind in ("off", "bf16")}
    count, times = flops(works["off"]), in_turns(works, args.rounds)
    share = count / statistics.median(times["bf16"]) / peak(args.device, torch.bfloat16)
    print(f"  bf16 {ratio(times['bf16'], times['off'])} x float32; {100 * share:.0f} % of the peak of bf16", flush=True)


def use(name, script, args, device):
    """Sampling and features: seconds an image and evaluation."""
    cfg = config(script, args)
    net, n = script.build_net(cfg).to(device).eval(), 16
    x = torch.randn(n, *(script.latent_shape(cfg) if hasattr(cfg, "tokenizer") else (3, cfg.size, cfg.size)), device=device)
    layers = script.Backbone.choices(cfg)["layer"]
    diffusion = script.Diffusion(script.make_config(**vars(cfg) | dict(nfe=3)))
    works = {"one evaluation in sampling": lambda _: diffusion.sample(net, x),
             "all features": lambda _: script.features(net, x, cfg.t_probe, x),
             f"features up to {layers[len(layers) // 2]}": lambda _: script.features(net, x, cfg.t_probe, x, last=layers[len(layers) // 2])}
    for label, seconds in in_turns(works, args.rounds).items():
        each = statistics.median(seconds) / n / (3 if "evaluation" in label else 1)
        print(f"  {label:28}{1000 * each:8.1f} ms an image", flush=True)


def growth(name, script, args, device):
    """A training step by batch and, with torchrun, processes; by the side of the images."""
    sizes = [dict(batch=b) for b in (1, 4, 16, 64) if b % script.WORLD == 0] + [
        dict(dataset="folder", size=s, batch=4, patch=4) if name == "uvit_sc" else dict(dataset="folder", size=s, batch=4)
        for s in (16, 32, 64)] * (name != "dit_latent_sc")
    for fields in sizes:
        dataset = fields.pop("dataset", None)
        cfg = script.make_config(dataset, device=args.device, **fields) if dataset else config(script, args, **fields)
        seconds = statistics.median(in_turns({"": make_step(script, cfg, device)}, max(1, args.rounds // 2))[""])
        if script.RANK == 0:
            print(f"  batch {cfg.batch:3} of {cfg.size:3} pixels, {script.WORLD} processes{seconds:9.3f} s a step, "
                  f"{1000 * seconds / cfg.batch:7.1f} ms an image", flush=True)


def evaluation(args, device):
    """Statistics for FID and Inception Score, and linear heads, by the number of images: both are linear, and memory flat."""
    import fid
    import probe
    for n in (2500, 5000, 10000):
        x, statistic = torch.randn(100, 2048, device=device), fid.Statistics(n, 2048, 1008, device)
        seconds = in_turns({"": lambda _: [statistic.add(x, x[:, :1008], i) for i in range(0, n, 100)]}, 1)[""]
        print(f"  FID and IS statistics of {n:6} images {seconds[0]:7.2f} s", flush=True)
    for n in (5000, 10000, 20000):
        x, y = torch.randn(12, n, 256).half(), torch.arange(n) % 10
        arguments = argparse.Namespace(seed=0, device=device, lr=4e-3, epochs=1, batch=512)
        seconds = in_turns({"": lambda _: probe.fit(lambda epoch, rows: x[:, rows], torch.arange(n), y, 10, arguments)}, 1)[""]
        print(f"  12 heads, an epoch of {n:6} images     {seconds[0]:7.2f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["steps", "amp", "use", "growth", "evaluation"],
                        help="steps, amp, use, growth, evaluation (all)")
    parser.add_argument("--scripts", nargs="*", default=SCRIPTS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--extras", nargs="*", choices=[*VARIANTS][2:], default=[*VARIANTS][2:], help="beside baseline and "
                        "self-conditioning (all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        print(f"{args.device}, {torch.get_num_threads()} threads; peak of matrix products {peak(args.device, torch.float32) / 1e9:.0f} GFLOP/s "
              f"in float32, {peak(args.device, torch.bfloat16) / 1e9:.0f} in bf16")
    if "evaluation" in args.parts and rank == 0:
        evaluation(args, torch.device(args.device))
    for name in args.scripts:
        script = importlib.import_module(name)
        device = script.start(script.make_config(device=args.device))
        for part in [part for part in args.parts if part != "evaluation"]:
            if rank == 0:
                print(f"{name}, {part}, batch {args.batch}, median of {args.rounds} rounds (quartiles)")
            dict(steps=steps, amp=amp, use=use, growth=growth)[part](name, script, args, device)
    if rank:
        return
    memory = torch.cuda.max_memory_allocated() if args.device == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of all this {memory / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
