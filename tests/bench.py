"""What the options cost, as ratios of training-step times: medians of interleaved steps, so that a busy machine disturbs
all alike. Not a test: no time is ever asserted. Where memory is slow to come from the system, ratios are steadier with
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 in the environment.

    python tests/bench.py                       # the paper's networks on noise of the size of CIFAR: 15 minutes on 2 cores
    python tests/bench.py --scripts uvit_sc dit_latent_sc --batch 8 --rounds 3
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
VARIANTS = {"baseline": dict(self_cond="none"), "self-conditioning": {}, "+ contrast": dict(cl=0.01),
            "+ augmentation": dict(aug=0.12), "+ both": dict(aug=0.12, cl=0.01)}


def make_step(script, cfg, device):
    """A function of the number of the step that does what one step of train() does."""
    learner = script.Learner(script.build_net(cfg), cfg).to(device).train()
    mean = copy.deepcopy(learner).eval().requires_grad_(False)
    optimizer, context, diffusion = script.make_optimizer(learner, cfg), script.autocast(cfg, device), script.Diffusion(cfg)
    x, y = torch.randint(0, 256, (cfg.batch, 3, 32, 32), dtype=torch.uint8, device=device), None
    if hasattr(cfg, "tokenizer"):
        x, y = torch.randn(cfg.batch, 2, 32, 16, 16, device=device).half(), torch.arange(cfg.batch, device=device)

    def step(n):
        gen = script.rng(n, device=device)
        noise, t = torch.randn((len(x), *x.shape[-3:]), generator=gen, device=device), diffusion.draw_t(cfg.batch, gen)
        start = time.perf_counter()
        x_0, labels = script.make_view(x, y, script.draw_view(cfg, script.rng(n, 3)))
        other = script.make_view(x, y, script.draw_view(cfg, script.rng(n, 4))) if cfg.cl else None
        views = time.perf_counter() - start
        with context:
            keys = mean.keys(*other, noise.flip(0)) if cfg.cl else None
            objective, _ = learner(x_0, labels, t, noise, keys)
        objective.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        script.update_ema(mean, learner, cfg.ema, n + 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, views
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=["edm_sc", "uvit_sc"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--extras", nargs="*", choices=[*VARIANTS][2:], default=[*VARIANTS][2:], help="beside baseline and "
                        "self-conditioning (all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name in args.scripts:
        script = importlib.import_module(name)
        dataset = "cifar10" if "cifar10" in script.RECIPES else "imagenet100"
        steps = {label: make_step(script, script.make_config(dataset, batch=args.batch, **fields), torch.device(args.device))
                 for label, fields in VARIANTS.items() if label in ("baseline", "self-conditioning", *args.extras)}
        times = {label: [] for label in steps}
        for n in range(args.rounds + 1):        # the first round warms up
            turn = n % len(steps)               # whoever comes first finds another state of the allocator
            for label in [*steps][turn:] + [*steps][:turn]:
                times[label].append(steps[label](n))
        print(f"{name}, {args.batch} images, {args.device}, {torch.get_num_threads()} threads, median of {args.rounds} rounds")
        for label, rows in times.items():
            reference = times["baseline" if label == "self-conditioning" else "self-conditioning"]
            ratios = [row[0] / base[0] for row, base in zip(rows[1:], reference[1:])]
            low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            seconds, views = (statistics.median(column) for column in zip(*rows[1:]))
            print(f"  {label:18} {seconds:7.3f} s a step   {ratio:5.3f} ({low:.3f} to {high:.3f}) x {'baseline' if reference is times['baseline'] else 'self-conditioning'}"
                  f"   views {100 * views / seconds:4.1f} % of the step", flush=True)


if __name__ == "__main__":
    main()
