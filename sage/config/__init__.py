"""The schema of every command, its checks, and the frozen config of a run."""

from sage.config.checks import check, check_target, walk
from sage.config.frozen import CONFIG_FILE, SUMMARY_FILE, freeze, load, read_frozen
from sage.config.groups import (
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PairingConfig,
    ProblemsConfig,
    SamplingConfig,
    TrackingConfig,
)
from sage.config.schema import SCHEMAS, BuildPairsConfig, EvalConfig, RunConfig, ScoreConfig, TrainConfig

__all__ = [
    "CONFIG_FILE",
    "SCHEMAS",
    "SUMMARY_FILE",
    "BuildPairsConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PairingConfig",
    "ProblemsConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoreConfig",
    "TrackingConfig",
    "TrainConfig",
    "check",
    "check_target",
    "freeze",
    "load",
    "read_frozen",
    "walk",
]
