"""Every command of README.md, run as pasted but as small as can be, in a copy of the project without network: python -m pytest -q -s
tests/test_readme_slow.py --slow. Data are made up, in the true formats; networks tiny, one step, two processes."""
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, write_cifar
from test_data import write_idx

TINY = {"ddpm_sc.py": "--backbone unet_tiny --layer out_2", "uvit_sc.py": "--backbone uvit_tiny --patch 8 --layer out_1",
        "dit_latent_sc.py": "--backbone dit_tiny --layer block_3 --size 32 --tokenizer unshuffle --cell 8"}
TINY["edm_sc.py"] = TINY["rf_sc.py"] = TINY["ddpm_sc.py"]
LATENTS = "--size 32 --tokenizer unshuffle --cell 8"


def picture(rng, side=32):
    return Image.fromarray(rng.randint(0, 256, (side, side, 3), np.uint8))


def make_up(home):
    """What the commands expect to find: data sets, folders, statistics, weights of others."""
    import fid
    import uvit_sc
    rng, data = np.random.RandomState(0), home / "data"
    write_cifar(data)
    for part, n in (("train", 64), ("t10k", 32)):
        write_idx(data / f"{part}-images-idx3-ubyte.gz", rng.randint(0, 256, (n, 28, 28), np.uint8))
        write_idx(data / f"{part}-labels-idx1-ubyte.gz", (np.arange(n) % 10).astype(np.uint8))
    with zipfile.ZipFile(data / "tiny-imagenet-200.zip", "w") as archive:
        names = [f"train/n{c}/images/n{c}_{i}.JPEG" for c in range(4) for i in range(4)] + [f"val/images/val_{i}.JPEG" for i in range(8)]
        for name in names:
            file = io.BytesIO()
            picture(rng, 64).save(file, "JPEG")
            archive.writestr(f"tiny-imagenet-200/{name}", file.getvalue())
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "".join(f"val_{i}.JPEG\tn{i % 4}\t0\t0\t1\t1\n" for i in range(8)))
    classes = {"imagenet100": uvit_sc.IMAGENET100, "ILSVRC2012": uvit_sc.IMAGENET100, "photos": ["cats", "dogs"],
               "imagenet": [f"n{i:08d}" for i in range(1000)]}
    for root, names in classes.items():
        for split in ("train", "val"):
            for name in names:
                folder = (data if root.startswith("imagenet") else home) / root / split / name
                folder.mkdir(parents=True)
                for i in range(8 if len(names) == 2 else 1):
                    picture(rng).save(folder / f"{i}.png")
    for folder in ("samples", "images"):
        (home / folder).mkdir()
        for i in range(8):
            picture(rng).save(home / folder / f"{i}.png")
    np.savez(home / "ref.npz", arr_0=rng.randint(0, 256, (8, 32, 32, 3), np.uint8))
    np.savez(home / "VIRTUAL_imagenet256_labeled.npz", mu=rng.randn(2048), sigma=np.diag(rng.rand(2048)), mu_s=rng.randn(2023), sigma_s=np.diag(rng.rand(2023)))
    for name in ("a.npz", "b.npz"):
        np.savez(home / name, mu=rng.randn(2048), sigma=np.diag(rng.rand(2048)))
    torch.manual_seed(0)
    torch.save(fid.Inception().state_dict(), home / "FILE")
    torch.save(uvit_sc.build_net(uvit_sc.make_config("cifar10", self_cond="none")).state_dict(), home / "U-ViT.pth")


def shrink(line):
    """The command as small as can be. Last values of a flag count, so most is appended."""
    line = line.replace("/ILSVRC2012", "ILSVRC2012").replace("HOST:", "localhost:").replace("$HEAD:", "localhost:")
    line = re.sub(r"--nnodes=\S+", "--nnodes=1", line.removeprefix("srun ")).replace("$SLURM_JOB_ID", "1")
    line = re.sub(r"--nproc_per_node=\d", "--nproc_per_node=2", line)
    script = re.search(r"\w+\.py", line)[0]
    folder = "runs/L" if re.search("guidance|dit_latent|imagenet256", line) else "runs/A"
    for name in re.findall(r"runs/\.\.\./(\w+\.pt)", line):
        if not os.path.exists(f"{folder}/{name}"):
            shutil.copy(f"{folder}/last.pt", f"{folder}/{name}")
    line = line.replace("runs/...", folder)
    if "--encode" in line:
        line += f" {LATENTS}"
    elif script in TINY and "--sample" not in line:
        line += f" {TINY[script]} --steps 1 --batch 8 --nfe 2 --warmup 0 --cl_hidden 32"
    elif script == "fid.py":
        line += " --images 16" * (".pt" in line) + " --inception FILE" * ("--detector" not in line and "--inception" not in line)
    elif "glyphs" in line:
        line += " --n 500"
    return re.sub("^python", sys.executable, re.sub("^torchrun", "python -m torch.distributed.run", line))


@pytest.mark.slow
def test_every_command_runs(tmp_path, capsys):
    home = tmp_path / "clone"
    shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns("runs", "data", ".git", ".venv", ".pytest_cache", "__pycache__"))
    make_up(home)
    os.chdir(home)
    once = f"{sys.executable} {{}} --steps 1 --batch 8 --nfe 2"
    for line in ("uvit_sc.py --out runs/uvit_sc-glyphs-cls-s0", f"uvit_sc.py --dataset cifar100 {TINY['uvit_sc.py']} --out runs/A", f"uvit_sc.py --dataset cifar100 {TINY['uvit_sc.py']} --out runs/B",
                 f"dit_latent_sc.py --encode --dataset imagenet {LATENTS}", f"dit_latent_sc.py --dataset imagenet {TINY['dit_latent_sc.py']} --out runs/L"):
        subprocess.run(f"{sys.executable} {line}" if "--encode" in line else once.format(line), shell=True, check=True, capture_output=True)
    text = (home / "README.md").read_text()
    for name, command in re.findall(r'^([A-Z])="(.*)"$', text, re.M):
        text = re.sub(rf"\${name}\b", lambda _: command, text.replace(f'{name}="{command}"', ""))
    count, failed, lines = 0, [], [line.split(" #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines = [line for line in lines if line and not line.startswith("HEAD=")]
    for line in lines:
        if "venv" in line or "pytest" in line or "&" in line:       # continuous integration runs them; ten hours of evidence
            continue
        if line.startswith(("less", "diff")):
            done = subprocess.run(line, shell=True, capture_output=True, text=True)
            assert done.returncode == line.startswith("diff") and done.stdout
        else:
            small = shrink(line)
            done = subprocess.run(small, shell=True, capture_output=True, text=True, timeout=300, env=dict(os.environ, OMP_NUM_THREADS="1"))
            with capsys.disabled():
                print("ok  " if done.returncode == 0 else f"{done.returncode}   ", line, flush=True)
            failed += [f"{small}\n{done.stdout[-1000:]}\n{done.stderr[-1500:]}"] if done.returncode else []
        count += 1
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "load_checkpoint" in b)
    exec(compile(block, "README.md", "exec"), {})
    assert count > 50 and not failed, "\n\n".join(failed)
