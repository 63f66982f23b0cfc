"""Read a composed config, write the frozen one, and read it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sage.config.checks import check
from sage.config.schema import SCHEMAS, RunConfig
from sage.util.errors import UserError

CONFIG_FILE = "config.yaml"  # of a run directory: what runs
SUMMARY_FILE = "summary.json"  # written last: the run is finished
# Classes that earlier versions of sage kept elsewhere: a frozen config may name the old place.
MOVED = {
    "sage.curriculum.EasyToHard": "sage.static_curricula.EasyToHard",
    "sage.curriculum.StaticFilter": "sage.static_curricula.StaticFilter",
    "sage.generation.HF": "sage.answering.generation.HF",
    "sage.generation.VLLM": "sage.answering.vllm.VLLM",
}


def load(source: DictConfig | str | Path) -> RunConfig:
    """Read a composed config, or a run directory's frozen one, into its command's dataclass and check it.

    Raises:
        UserError: a key is unknown, missing, of the wrong type, out of range, or at odds with another.
    """
    if not isinstance(source, DictConfig):
        source = read_frozen(Path(source))
    try:
        cfg: RunConfig = OmegaConf.to_object(source)  # pyright: ignore
    except OmegaConfBaseException as e:
        raise UserError(str(e).splitlines()[0] + (f" (key {e.full_key})" if e.full_key else "")) from e
    check(cfg)
    return cfg


def read_frozen(run_dir: Path) -> DictConfig:
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    try:
        written: Any = OmegaConf.load(file)
        for group in ("curriculum", "generation"):
            if (target := written.get(group, {}).get("_target_")) in MOVED:
                written[group]["_target_"] = MOVED[target]
        return OmegaConf.merge(OmegaConf.structured(SCHEMAS[written["command"]]), written)  # pyright: ignore
    except (KeyError, TypeError, OmegaConfBaseException, yaml.YAMLError) as e:
        raise UserError(f"{file} is not a config that sage wrote: {str(e).splitlines()[0]}") from e


def freeze(cfg: RunConfig, run_dir: Path) -> None:
    """Write the one resolved config that every rank of a run reads.

    Raises:
        UserError: the directory already holds a run.
    """
    file = run_dir / CONFIG_FILE
    if file.exists():
        raise UserError(
            f"{run_dir} already holds a run: go on with `sage resume {run_dir}`, or choose another hydra.run.dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
