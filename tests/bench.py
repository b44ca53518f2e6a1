"""What options cost, as ratios of the times of a training step. Not a test: no time is asserted.

Steps that are compared run in turns, so that a busy machine disturbs all alike.

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
PAIRS = {       # what is measured: fields of it, and of what it is compared with
    "self-conditioning": ({}, dict(self_cond="none")),
    "contrast": (dict(cl=0.01), {}),
    "augmentation": (dict(aug=0.12), {}),
    "both": (dict(aug=0.12, cl=0.01), {}),
    "bf16": (dict(amp="bf16"), {}),
}


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


def make_step(script, cfg, device):
    """A function of the number of the step that does what one step of train() does."""
    student = script.Student(script.build_net(cfg), cfg).to(device).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer, diffusion = script.make_optimizer(student, cfg), script.Diffusion(cfg)
    images = torch.randint(0, 256, (cfg.batch, 3, cfg.size, cfg.size), dtype=torch.uint8)
    if script.SCRIPT == "dit_latent_sc":
        images = torch.randn(cfg.batch, 2, *script.latent_shape(cfg)).half()
    images = images.to(device)
    y = torch.arange(cfg.batch, device=device) % 10

    def step(n):
        random = script.draw_random(cfg, diffusion, n, images.shape[-3:], device)
        objective, _ = script.training_step(cfg, diffusion, student, teacher, images, y, **random)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        script.update_ema(teacher, student, cfg.ema, n + 1)
        if device.type != "cpu":
            torch.accelerator.synchronize()
    return step


def measure(script, args, device):
    dataset = "cifar10" if "cifar10" in script.RECIPES else "imagenet100"
    for name, fields in PAIRS.items():
        works = []
        for some in fields:
            cfg = script.make_config(dataset, batch=args.batch, device=args.device, **some)
            works.append(make_step(script, cfg, device))
        ratios = [a / b for a, b in in_turns(*works, args.rounds)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"  {name:18} x {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


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
        measure(script, args, device)


if __name__ == "__main__":
    main()
