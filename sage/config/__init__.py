"""The schema of every command, its checks, and the frozen config of a run."""

from sage.config.checks import check, check_target, walk
from sage.config.frozen import CONFIG_FILE, RENAMED, SUMMARY_FILE, freeze, load, read_frozen
from sage.config.groups import (
    ChatConfig,
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PairColumns,
    PairingConfig,
    ProblemsConfig,
    SamplingConfig,
    TrackingConfig,
)
from sage.config.schema import SCHEMAS, BuildPairsConfig, EvalConfig, RunConfig, ScoreConfig, TrainConfig

__all__ = [
    "CONFIG_FILE",
    "RENAMED",
    "SCHEMAS",
    "SUMMARY_FILE",
    "BuildPairsConfig",
    "ChatConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PairColumns",
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
