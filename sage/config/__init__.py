"""The schema of every command, its checks, and the frozen config of a run."""

from sage.config.checks import build, check, check_target, walk
from sage.config.command import CommandConfig, RunConfig
from sage.config.frozen import CONFIG_FILE, SUMMARY_FILE, differences, freeze, load, read_frozen, write
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
    key,
)
from sage.config.keys import groups, known_keys, nearest, refusal, unknown_keys
from sage.config.schema import (
    SCHEMAS,
    BuildPairsConfig,
    EvalConfig,
    InspectConfig,
    ScoreConfig,
    TrainConfig,
    VerifyConfig,
)

__all__ = [
    "CONFIG_FILE",
    "SCHEMAS",
    "SUMMARY_FILE",
    "BuildPairsConfig",
    "ChatConfig",
    "CommandConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "InspectConfig",
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
    "VerifyConfig",
    "build",
    "check",
    "check_target",
    "differences",
    "freeze",
    "groups",
    "key",
    "known_keys",
    "load",
    "nearest",
    "read_frozen",
    "refusal",
    "unknown_keys",
    "walk",
    "write",
]
