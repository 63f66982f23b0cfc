"""What runs import and compute once, for the process that they are forked from."""

import gc

gc.disable()

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401, which compiles functions
import peft  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
from hydra.utils import get_method  # noqa: E402
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

from sage import cli, worker  # noqa: E402, F401

for job in worker.JOBS.values():
    get_method(job)
get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions
gc.freeze()  # nothing of this becomes garbage
gc.enable()
