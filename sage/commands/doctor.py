"""Does sage work on this machine? A table of what is here and of what was tried, with advice.

The ranks try things in processes of their own (`doctor_checks`), one per GPU, or two without a GPU. So
whatever crashes or hangs there is a row of the table.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sage.config import DoctorConfig
from sage.model.kernels import has_triton
from sage.model.kernels.recompute import bfloat16_in_hardware
from sage.training.wandb_log import absent
from sage.util.files import write_json
from sage.util.processes import free_memory, machine_memory, rank_environment, run_ranks
from sage.util.progress import activity, console
from sage.util.stopping import SIGNALS

OK, NOTE, FAILED = "ok", "note", "FAILED"
COLOURS = {OK: "green", NOTE: "yellow", FAILED: "red"}
GIB = 2**30
ROOM = 5 * GIB  # bytes on a disk; below this a first checkpoint may not fit
SHARED_MEMORY = GIB  # bytes of /dev/shm, through which NCCL's ranks on one machine talk
EXTRAS = ("lora", "vllm", "tensorboard", "demo")
PLAIN_WIDTH = 160  # columns of the table where the output is no terminal
SHOWN = 4  # packages that the table names if all fit
# Check -> what the table calls it, and what to do if it fails.
CHECKS = {
    "device": ("device", "end what else uses this GPU, or choose others with CUDA_VISIBLE_DEVICES"),
    "exchange": (
        "all-reduce",
        "NCCL_DEBUG=INFO sage doctor shows more; often /dev/shm is too small, or NCCL_P2P_DISABLE=1 helps",
    ),
    "head": ("head", "runs fall back to a slower head by themselves; model.head=tiled avoids the trial"),
    "attention": ("packed rows", "runs fall back to padded rows by themselves; or set data.packing=padded"),
    **{f"zero{n}": (f"training, ZeRO {n}", f"train with another engine than zero{n}") for n in range(4)},
    "generation": ("generation", "evaluate and build pairs with generation=vllm, or elsewhere"),
}


class Finding(NamedTuple):
    what: str
    state: str
    detail: str
    advice: str = ""


def doctor(cfg: DoctorConfig) -> None:
    """Print the table, and write it to `cfg.json` if that is set.

    Raises:
        SystemExit: something failed; its status is 1.
    """
    rows = list(facts(Path(cfg.cache_dir).expanduser()))
    rows += tried(torch.cuda.device_count())
    print_rows(rows)
    failed = [row.what for row in rows if row.state == FAILED]
    console.print(f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}" if failed else "all is well")
    if cfg.json:
        write_json(Path(cfg.json).expanduser(), {"failed": failed, "rows": [row._asdict() for row in rows]})
    if failed:
        raise SystemExit(1)


def print_rows(rows: Sequence[Finding]) -> None:
    table = Table(title="sage doctor", title_justify="left")
    for column in ("", "", "what is here, and what was tried", "advice"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.what, Text(row.state, COLOURS[row.state]), Text(row.detail), Text(row.advice))
    Console(width=None if console.is_terminal else PLAIN_WIDTH).print(table)


# --- what is here


def facts(cache_dir: Path) -> Iterator[Finding]:
    yield Finding("python", OK, f"{platform.python_version()}, {platform.system()} {platform.release()}")
    yield packages()
    yield optional_packages()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bfloat16 = "bfloat16" if bfloat16_in_hardware() else "no bfloat16"
    yield Finding("CPU", OK, f"{cores} cores, {bfloat16} in hardware, load {os.getloadavg()[0]:.1f}")
    yield memory()
    yield disk("disk of the cache", cache_dir, "cache_dir")
    yield disk("disk of runs", Path("."), "hydra.run.dir")
    yield gpus()
    yield compilers()
    if torch.cuda.is_available():
        yield nccl()
    yield weights_and_biases()


def packages() -> Finding:
    """The packages that sage needs, with their versions. One that is missing or does not fit fails."""
    found, wanting = [], []
    for requirement in required(""):
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wanting.append(f"'{requirement.name}{requirement.specifier}'")
        found.append(f"{requirement.name} {version or 'missing'}")
    if wanting:
        return Finding("packages", FAILED, ", ".join(found), f"pip install {' '.join(wanting)}")
    return Finding("packages", OK, ", ".join(found[:SHOWN]) + f" and {len(found) - SHOWN} more that fit")


def optional_packages() -> Finding:
    found, lacking = [], []
    for extra in EXTRAS:
        for name in (requirement.name for requirement in required(extra)):
            if version := version_of(name):
                found.append(f"{name} {version}")
            elif extra not in lacking:
                lacking.append(extra)
    if has_triton():
        found.append(f"triton {version_of('triton')}")
    advice = f"to have more: pip install 'sage-align[{','.join(lacking)}]'" if lacking else ""
    return Finding("optional packages", OK, ", ".join(found) or "none", advice)


def required(extra: str) -> list[Requirement]:
    """The requirements that sage's own metadata names for an extra; those of no extra for ""."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("sage-align") or []]
    return [r for r in wanted if (r.marker.evaluate({"extra": extra}) if r.marker else not extra)]


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory() -> Finding:
    """Memory that this process may use: a container may have less than its machine."""
    free, total = free_memory(), machine_memory()
    return Finding("memory", OK, f"{free / GIB:.1f} of {total / GIB:.1f} GiB free")


def disk(what: str, folder: Path, key: str) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as e:
        return Finding(what, FAILED, f"{folder} cannot be written: {e.strerror}", f"choose another {key}")
    low = free < ROOM
    return Finding(
        what,
        NOTE if low else OK,
        f"{free / GIB:.0f} GiB free in {folder.absolute()}",
        f"little room for checkpoints: choose another {key}" if low else "",
    )


def gpus() -> Finding:
    if count := torch.cuda.device_count():
        return Finding("GPUs", OK, f"{count}, CUDA {torch.version.cuda}, torch {torch.__version__}")
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for CPUs"
        remedy = "look at CUDA_VISIBLE_DEVICES and nvidia-smi, and install the torch that fits the driver"
        return Finding("GPUs", FAILED, f"torch {torch.__version__} {built}, and sees no GPU", remedy)
    return Finding("GPUs", OK, f"none, torch {torch.__version__}: training runs on the CPU")


def compilers() -> Finding:
    """What DeepSpeed and Triton compile with. Only GPUs and CPU offload need it."""
    found = {name: path for name in ("c++", "ninja", "nvcc") if (path := shutil.which(name))}
    detail = ", ".join(found) or "none"
    if "c++" not in found and torch.cuda.is_available():
        return Finding(
            "compilers", FAILED, detail, "Triton needs a C compiler: install gcc, or set model.head=tiled"
        )
    lacking = [name for name in ("c++", "ninja") if name not in found]
    if torch.cuda.is_available() and "nvcc" not in found:
        lacking.append("nvcc")
    advice = f"DeepSpeed's own Adam needs {' and '.join(lacking)}; else runs use torch's" if lacking else ""
    return Finding("compilers", NOTE if lacking else OK, detail, advice)


def nccl() -> Finding:
    version = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.exists() else 0
    low = free < SHARED_MEMORY and torch.cuda.device_count() > 1
    advice = "ranks talk through /dev/shm: start the container with --shm-size=8g" if low else ""
    return Finding("NCCL", NOTE if low else OK, f"{version}, /dev/shm {free / GIB:.1f} GiB", advice)


def weights_and_biases() -> Finding:
    if reason := absent():
        return Finding("W&B", NOTE, "runs are logged offline", reason)
    return Finding("W&B", OK, "logged in, and its server answers")


# --- what was tried


def tried(gpu_count: int) -> list[Finding]:
    """A row for each check, from one rank per GPU, or from two ranks on the CPU."""
    world = gpu_count or 2
    folder = Path(tempfile.mkdtemp(prefix="sage-doctor-"))
    where = f"{world} GPU{'s' * (world > 1)}" if gpu_count else f"{world} ranks on the CPU"
    with activity(f"trying what a run does, on {where}"):
        run_checks(folder, world)
    rows = [row_of(name, folder, world) for name in CHECKS]
    if all(row.state == OK for row in rows):
        shutil.rmtree(folder)
    else:
        rows.append(Finding("log", NOTE, f"{folder}/rank_N.log"))
    if not gpu_count:
        rows.append(Finding("Triton, FlexAttention", NOTE, "not tried: they need a GPU"))
    return rows


def run_checks(folder: Path, world: int) -> None:
    """Run all checks. After one that fails, the ranks start again with the next one."""
    remaining = list(CHECKS)
    while remaining:
        command = ["-m", "sage.commands.doctor_checks", str(folder), *remaining]
        status = run_ranks(world, command, rank_environment(world), "look at the table")
        if status - 128 in SIGNALS:
            shutil.rmtree(folder)
            raise SystemExit(status)
        if status == 0:
            return
        undone = next(name for name in remaining if not passed(folder, name, world))
        remaining = remaining[remaining.index(undone) + 1 :]


def outcomes(folder: Path, name: str, world: int) -> list[dict | None]:
    """What each rank found out; None where it ended before."""
    files = [folder / f"{name}.{rank}.json" for rank in range(world)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def passed(folder: Path, name: str, world: int) -> bool:
    return all(outcome and outcome["ok"] for outcome in outcomes(folder, name, world))


def row_of(name: str, folder: Path, world: int) -> Finding:
    what, advice = CHECKS[name]
    details, seconds = [], 0.0
    for rank, outcome in enumerate(outcomes(folder, name, world)):
        if outcome and not outcome["ok"]:
            return Finding(what, FAILED, f"rank {rank}: {outcome['detail']}", advice)
        if outcome:
            details.append(outcome["detail"])
            seconds = max(seconds, outcome["seconds"])
    if len(details) < world:
        return Finding(what, FAILED, "a rank crashed, or hung; the end of its log says where", advice)
    shown = dict.fromkeys(details) if name == "device" else details[:1]
    return Finding(what, OK, f"{'; '.join(shown)}, {seconds:.1f} s")
