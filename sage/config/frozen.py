"""Read a composed config, write the frozen one, and read it back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sage.config.checks import check
from sage.config.command import CommandConfig
from sage.config.keys import (
    flatten,
    known_keys,
    refusal,
    refuse_altered,
    refuse_ignored,
    refuse_overruled,
    unknown_keys,
)
from sage.config.registry import SCHEMAS
from sage.config.schema import TrainConfig
from sage.util.errors import UserError, first_line
from sage.util.files import write_text
from sage.util.locks import alive

CONFIG_FILE = "config.yaml"  # in a run directory: the config of the run
SUMMARY_FILE = "summary.json"  # written last: the run is finished

# Keys that may name a file or a folder.
PATHS = {"path", "eval_path", "adapter_path", "scores", "cache_dir", "margins_from", "reference_model"}
PATHS |= {"rejected_from", "continue_from"}

INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # one that no backslash escapes


def load(
    source: DictConfig | str | Path, typed: Sequence[str] = (), own: Sequence[Path] = ()
) -> CommandConfig:
    """Read a composed config, or a run directory's frozen one, into its command's dataclass and check it.

    `typed` are the overrides of the command line that the config was composed from, and `own` the user's
    folders of options.

    Raises:
        UserError: a key is unknown, missing, of the wrong type, out of range, or at odds with another; or
            `typed` sets a key that has no effect on this command.
    """
    if not isinstance(source, DictConfig):
        source = read_frozen(Path(source))
    schema: Any = OmegaConf.get_type(source)
    for key in unknown_keys(source):
        raise refusal(key, known_keys(schema), schema.command)
    try:
        cfg: CommandConfig = OmegaConf.to_object(source)  # pyright: ignore
    except OmegaConfBaseException as e:
        raise UserError(str(e).splitlines()[0] + (f" (key {e.full_key})" if e.full_key else "")) from e
    refuse_altered(cfg, typed)
    refuse_ignored(cfg.ignored(), typed, schema.command)
    refuse_overruled(cfg, typed, own)
    check(cfg)
    return cfg


def read_frozen(run_dir: Path) -> DictConfig:
    """The config of a run directory, with the keys and types of its command.

    Raises:
        UserError: there is none, or another version of sage wrote it, with other keys.
    """
    written = read_written(run_dir)
    try:
        return OmegaConf.merge(OmegaConf.structured(SCHEMAS[written["command"]]), written)  # pyright: ignore
    except OmegaConfBaseException as e:
        raise UserError(
            f"{run_dir / CONFIG_FILE} does not have the keys of this version of sage: {first_line(e)}; use "
            "the version that wrote it"
        ) from e


def read_written(run_dir: Path) -> dict[str, Any]:
    """The config of a run directory as it was written, by this version of sage or another."""
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no {CONFIG_FILE}")
    try:
        written: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
        if found := next((text for text in texts_in(written) if INTERPOLATION.search(text)), None):
            raise ValueError(f"{found!r} would be replaced, for example by a secret of the environment")
        if written["command"] not in SCHEMAS:
            raise ValueError(f"no command {written['command']!r}")
        return written
    except OSError:
        raise
    except Exception as e:  # a text that is no config fails in YAML, in OmegaConf or here, in many ways
        raise UserError(f"{file} is not a config that sage wrote: {first_line(e)}") from e


def freeze(cfg: CommandConfig, run_dir: Path) -> None:
    """Write the one resolved config that every rank of a run reads.

    Raises:
        UserError: the directory already holds a run that has done something.
    """
    if (run_dir / CONFIG_FILE).exists() and not untouched(run_dir):
        raise UserError(
            f"{run_dir} already holds a run: go on with `sage resume {run_dir}`, or choose another "
            "hydra.run.dir"
        )
    write(cfg, run_dir)


def write(cfg: CommandConfig, run_dir: Path) -> None:
    """Write the config, also over another one."""
    write_text(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(escaped(absolute(asdict(cfg))))))


def untouched(run_dir: Path) -> bool:
    """Whether a run has ended here before it did anything that is worth keeping, such as a first step."""
    unread = {CONFIG_FILE, "answers.jsonl", "dropped.jsonl"}
    files = [file for file in run_dir.rglob("*") if file.is_file() and file.stat().st_size]
    kept = [file for file in files if file.name not in unread and not file.name.startswith(".")]
    return not kept and not alive(run_dir)


def absolute(value: Any, name: str = "") -> Any:
    """A resolved config whose files and folders can be found from any folder.

    A name that is not here belongs to a hub or to an installed package, and stays.
    """
    if isinstance(value, dict):
        return {key: absolute(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [absolute(item, name) for item in value]
    if not isinstance(value, str) or name not in PATHS or value.startswith(("~", "pkg://")):
        return value
    here = (
        name == "cache_dir" or value.startswith(".") or os.path.exists(value) or glob(value, recursive=True)
    )
    return os.path.abspath(value) if here and value else value


def keep_budget(cfg: CommandConfig, run_dir: Path) -> None:
    """Take the number that `micro_batch_tokens=auto` has become in `run_dir`, if the run there has begun."""
    if isinstance(cfg, TrainConfig) and cfg.micro_batch_tokens == "auto" and (run_dir / CONFIG_FILE).exists():
        before = load(run_dir)
        if isinstance(before, TrainConfig):
            cfg.micro_batch_tokens = before.micro_batch_tokens


def differences(ours: CommandConfig, theirs: CommandConfig) -> list[str]:
    """Keys whose values differ, as a frozen config would hold them."""
    a, b = (dict(flatten(absolute(asdict(cfg)))) for cfg in (ours, theirs))
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def texts_in(value: Any) -> Iterator[str]:
    """Every text that a config holds."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)
    elif isinstance(value, str):
        yield value


def escaped(value: Any) -> Any:
    """A resolved config in which OmegaConf reads every `${` as text, not as an interpolation."""
    if isinstance(value, dict):
        return {name: escaped(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [escaped(item) for item in value]
    if isinstance(value, str):  # backslashes before `${` are doubled, and one more escapes it
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
