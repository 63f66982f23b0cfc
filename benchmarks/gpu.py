"""The first numbers of a GPU, in one command: does sage work there as on the CPU, and how fast is it?

    make gpu                                  # or: python benchmarks/gpu.py runs/gpu
    python benchmarks/gpu.py runs/gpu --again # measures everything anew

Each part runs in a process of its own for 15 minutes at most, and leaves FOLDER/PART.log. FOLDER/gpu.json
holds what came of each part. A second call repeats only the parts that failed. What is not installed here
(TRL, Liger's kernels, vLLM) is named as not compared. Without a GPU this says what is not run, runs the
kernels' tests in Triton's interpreter if Triton is there, and ends with status 0 if they pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from sage.util.files import write_json

HERE = Path(__file__).resolve().parent
LIMIT = 900  # seconds of a part
SAGE = ["sage", "sage, all logits"]
# TRL as it is, and at its best settings. What of it does not work here is listed as not measured.
TRL = [f"TRL, 16 pairs{settings}" for settings in ("", ", Liger", ", Liger, padding-free")]


def parts(folder: Path, gpu: bool) -> dict[str, list[str]]:
    """The command of each part, by its name."""
    python = sys.executable
    tests = HERE.parent / "tests"
    kernels = [python, "-m", "pytest", str(tests / "test_kernels.py")]
    if not gpu:
        return {"kernel tests, in the interpreter": kernels} if find_spec("triton") else {}
    contenders = SAGE + (TRL if find_spec("trl") else [])
    step = [python, str(HERE / "dpo_step.py"), "--shape", "0.5b", "--dtype", "bfloat16", "--rounds", "1"]
    step += ["--pairs", "32", "--steps", "6", "--tokens", "16384", "--max-length", "512"]
    kernel = [python, str(HERE / "kernel.py"), "--device", "cuda", "--dtype", "bfloat16"]
    for package, name in (("trl", "TRL"), ("liger_kernel", "Liger's kernels"), ("vllm", "vLLM")):
        if not find_spec(package):
            print(f"{name} is not installed ({package}): sage is NOT compared with it", flush=True)
    return {
        "doctor": [python, "-m", "sage", "doctor", f"json={folder / 'doctor.json'}"],
        "kernel tests": kernels,
        "runs, against the CPU": [python, "-m", "pytest", "-vv", "-n", "4", str(tests / "test_gpu.py")],
        "kernel": [*kernel, "--json", str(folder / "kernel.json")],
        "a DPO step": [
            *(*step, "--trl-micro-batches", "16", "--only", *contenders),
            *("--output", str(folder / "dpo_step.json")),
        ],
        "generation": [python, str(HERE / "backends.py"), "--output", str(folder / "backends.json")],
    }


def run(command: list[str], log: Path) -> tuple[str, float]:
    """What came of a part, and its seconds."""
    started = time.monotonic()
    environment = {**os.environ, "SAGE_TEST_GPU": "1"}  # otherwise tests/conftest.py hides GPUs
    with log.open("w") as out:
        try:
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, timeout=LIMIT, env=environment
            )
            outcome = "ok" if done.returncode == 0 else f"failed, status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"failed, not done in {LIMIT} s"
    return outcome, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--again", action="store_true", help="repeat the parts that are done, too")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "no GPU"
    print(device if gpu else "there is no GPU here: nothing is measured", flush=True)
    results = args.folder / "gpu.json"
    if not gpu:
        print(
            "NOT run: doctor on a GPU, kernels, a DPO step against TRL, generation against vLLM", flush=True
        )
    found = json.loads(results.read_text()) if results.exists() else {}
    if args.again or found.get("device") != device:  # the numbers of another machine are of no use here
        found = {"device": device, "torch": torch.__version__, "parts": {}}
    wanted = parts(args.folder, gpu)
    if not wanted:
        print("Triton is not installed, so its interpreter has nothing to run either")
    for name, command in wanted.items():
        if found["parts"].get(name, {}).get("outcome") != "ok":
            log = args.folder / f"{name.replace(',', '').replace(' ', '_')}.log"
            outcome, seconds = run(command, log)
            found["parts"][name] = {"outcome": outcome, "seconds": round(seconds, 1), "log": str(log)}
            write_json(results, found)  # so that a run that is killed here goes on with the next part
        part = found["parts"][name]
        print(f"{name:36} {part['outcome']:28} {part['seconds']:6.1f} s  {part['log']}", flush=True)
    write_json(results, found)
    print(f"all of it: {results}")
    if any(found["parts"][name]["outcome"] != "ok" for name in wanted):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
