"""Arguments of `LLM` of any type and size give an engine that serves, or a short error that names the argument."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import ANYTHING, fuzz, only_user_errors
from millrace.engine.config import IGNORED, ONLY, EngineConfig
from millrace.engine.llm import LLM
from running import one

pytestmark = pytest.mark.soak

PROCESSES = {"num_threads", "tensor_parallel_size", "pipeline_parallel_size"}
"""Arguments whose sizes up to 1024 are allowed and start so many threads or processes, which no test wants."""

SIZES = st.sampled_from([0, -1, 1, 2, 7, 16, 64, 256, 257, 2**20, 2**31 - 1, 2**31, 2**50, 2**63, "auto", "1k", 0.5])
REST = st.sampled_from([0, -1, 1, 2**31, 10**9, True, "1", 1.5])
FIELDS = sorted({field.name for field in dataclasses.fields(EngineConfig)} - {"model"} - PROCESSES)
VALUES = st.sampled_from(["float32", "generate", "pooling", "vllm", "dummy", "int8", "fp8", "cpu", True, False])


@given(
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING | SIZES | VALUES, max_size=3),
    st.dictionaries(st.sampled_from(sorted(PROCESSES)), REST, max_size=1),
    st.dictionaries(st.sampled_from(sorted({**IGNORED, **ONLY})) | st.text(max_size=5), ANYTHING, max_size=1),
)
@fuzz
def test_arguments_of_any_type_and_size_serve_or_are_refused(tiny_model, fields, processes, others):
    small = {"device": "cpu", "kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 4}
    with only_user_errors(), LLM(str(tiny_model("llama")), **{**others, **small, **processes, **fields}) as llm:
        if llm.llm_engine.task.name == "generate":
            assert one(llm, [5, 6, 7], max_tokens=3).finish_reason
        else:
            llm.encode([[5, 6, 7]], use_tqdm=False, pooling_task=llm.llm_engine.task.name)
        llm.llm_engine.check_integrity()


@given(ANYTHING)
@fuzz
def test_a_model_of_any_type_is_refused(model):
    with only_user_errors():
        LLM(model)
