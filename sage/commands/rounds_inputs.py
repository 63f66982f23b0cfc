"""What several rounds read: it must not change between them, and should not be what they train on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from sage.answering.attempts import BEGUN_FILE
from sage.answering.problems import read_problems, warn_of_known
from sage.commands.rounds_results import folder_of
from sage.config import SUMMARY_FILE, ModelConfig, RoundsConfig
from sage.data.pairs import load_data
from sage.data.source import resolve_path
from sage.model import loading
from sage.model.masters import MASTERS_FOLDER, has_fresh_adapter, key_of, sealed, trained_folder
from sage.training.optimizer_state import check_optimizer
from sage.util import checksums
from sage.util.checksums import digest


def claim_inputs(cfg: RoundsConfig, run_dir: Path) -> None:
    """Note fingerprints of what several rounds read, which must not change between them.

    Raises:
        UserError: one is not what it was when the rounds began.
    """

    def weights(model: ModelConfig) -> str:
        return loading.fingerprint(loading.resolve_model(model, cfg.cache_dir), model.adapter_path)

    problems = {"data.problems": cfg.data.problems}
    problems |= {f"benchmark.{name}": benchmark for name, benchmark in cfg.benchmark.items()}
    found: dict[str, str | None] = {"model.path": weights(cfg.model)}
    found["adapter of a round"] = "not merged" if cfg.model.lora else None
    begins = not (folder_of(run_dir, 1) / "train" / SUMMARY_FILE).exists()
    if begins and cfg.optimizer.continue_from is not None:  # round 1 reads it
        check_optimizer(cfg.optimizer)
        kept = sealed(Path(resolve_path(cfg.optimizer.continue_from)))
        found["optimizer.continue_from"] = digest(kept)
    if begins and not (cfg.model.dtype == "float32" or has_fresh_adapter(cfg.model)):  # and this
        folder = trained_folder(cfg.model, loading.resolve_model(cfg.model, cfg.cache_dir))
        kept = sealed(folder / MASTERS_FOLDER)
        found[f"{MASTERS_FOLDER} of {key_of(cfg.model)}"] = digest(kept) if kept else None
    found |= {
        f"{n}.path": digest([asdict(p) for p in read_problems(source)]) for n, source in problems.items()
    }
    if cfg.reference_model is not None:
        found["reference_model"] = weights(ModelConfig(cfg.reference_model))
    if cfg.data.eval_path is not None:
        found["data.eval_path"] = load_data(cfg.data, cfg.cache_dir, held_out=True).content
    checksums.claim(run_dir / BEGUN_FILE, found)


def warn_of_known_problems(cfg: RoundsConfig) -> None:
    """Say which benchmarks ask problems that the rounds train on. Only equal texts are found."""
    known = {" ".join(problem.prompt.split()) for problem in read_problems(cfg.data.problems)}
    for name, benchmark in cfg.benchmark.items():
        problems = read_problems(benchmark)[: cfg.benchmark_limit]
        common = sum(" ".join(problem.prompt.split()) in known for problem in problems)
        warn_of_known(name, common, len(problems), "data.problems")
