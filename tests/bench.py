"""What options cost, as ratios of times. Not a test: no time is ever asserted.

Steps that are compared run in turns, so that a busy machine disturbs all alike; medians are printed
with their quartiles. Where memory is slow to come from the system, ratios are steadier with
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 in the environment.

    python tests/bench.py                                       # all of it: an hour on two cores
    python tests/bench.py --scripts uvit_sc --batch 8 --rounds 3
"""
import argparse
import copy
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
SCRIPTS = ("ddpm_sc", "edm_sc", "rf_sc", "uvit_sc", "dit_latent_sc")
VARIANTS = {    # what is measured: fields, in proportion to
    "baseline": (dict(self_cond="none"), None),
    "self-conditioning": ({}, "baseline"),
    "+ contrast": (dict(cl=0.01), "self-conditioning"),
    "+ augmentation": (dict(aug=0.12), "self-conditioning"),
    "+ both": (dict(aug=0.12, cl=0.01), "self-conditioning"),
    "bf16": (dict(amp="bf16"), "self-conditioning"),
}


def wait(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def in_turns(works, rounds):
    """Seconds of each of some functions of the number of the round, {name: [seconds]}, after one round
    of warming up."""
    times = {name: [] for name in works}
    for n in range(rounds + 1):
        turn = n % len(works)           # whoever comes first finds another state of the allocator
        for name in [*works][turn:] + [*works][:turn]:
            start = time.perf_counter()
            works[name](n)
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(seconds, base):
    """Median and quartiles of what a step takes in proportion to another of the same round."""
    ratios = [a / b for a, b in zip(seconds, base)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def config(script, args, **fields):
    dataset = "cifar10" if "cifar10" in script.RECIPES else "imagenet100"
    return script.make_config(dataset, batch=args.batch, device=args.device, **fields)


def random_images(script, cfg, device):
    if script.SCRIPT == "dit_latent_sc":
        return torch.randn(cfg.batch, 2, *script.latent_shape(cfg), device=device).half()
    shape = (cfg.batch, 3, cfg.size, cfg.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def make_step(script, cfg, device):
    """A function of the number of the step that does what one step of train() does."""
    student = script.Student(script.build_net(cfg), cfg).to(device).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer, diffusion = script.make_optimizer(student, cfg), script.Diffusion(cfg)
    images = random_images(script, cfg, device)
    y = torch.arange(cfg.batch, device=device) % 10

    def step(n):
        random = script.draw_random(cfg, diffusion, n, images.shape[-3:], device)
        objective, _ = script.training_step(cfg, diffusion, student, teacher, images, y, **random)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        script.update_ema(teacher, student, cfg.ema, n + 1)
        wait(device)
    return step


def steps(script, args, device):
    works = {name: make_step(script, config(script, args, **fields), device)
             for name, (fields, _) in VARIANTS.items()}
    times = in_turns(works, args.rounds)
    for name, (_, base) in VARIANTS.items():
        if base:
            print(f"  step, {name:18} {ratio(times[name], times[base])} x {base}", flush=True)


@torch.no_grad()
def features(script, args, device):
    """Up to the layer of Table 10 against all of them."""
    cfg = config(script, args)
    net = script.build_net(cfg).to(device).eval()
    x = random_images(script, cfg, device)
    x, _ = script.make_view(x, torch.zeros(cfg.batch, 9))

    def work(last):
        def run(n):
            script.features(net, x, cfg.t_probe, x, last=last)
            wait(device)
        return run
    times = in_turns({"all": work(None), "some": work(cfg.layer)}, args.rounds)
    print(f"  features up to {cfg.layer:9} {ratio(times['some'], times['all'])} x all", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="*", default=SCRIPTS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    for name in args.scripts:
        script = importlib.import_module(name)
        device = script.start(script.make_config(device=args.device))
        print(f"{name}, batch {args.batch} on {device}, median of {args.rounds} rounds (quartiles)")
        steps(script, args, device)
        features(script, args, device)


if __name__ == "__main__":
    main()
