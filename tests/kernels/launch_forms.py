"""Launches the Triton kernels of a step for random batches, without running them, and checks the form of each launch.

python launch_forms.py NUM_BATCHES

Triton compiles another form of a kernel for an integer that is 1 or a multiple of 16 and for a pointer that is not
aligned, unless the kernel says that the argument varies. A form that is met by chance would be compiled in the middle
of a job. So every launch, also with odd numbers of sequences and odd widths of tables, must have a listed form, down to
these properties.

A script of its own, for test_triton.py, because TRITON_INTERPRET=1 has an effect only before triton is first imported.
"""

from __future__ import annotations

import importlib
import random
import sys
from typing import Any

import torch
from interpret import is_listed
from triton.runtime.interpreter import InterpretedFunction

from millrace.kernels._op import all_ops
from millrace.kernels._triton import TARGETS, Specialisation

BLOCK_SIZE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, VOCAB_SIZE, HIDDEN = 16, 128, 16, 8, 1024, 2048
MAX_NUM_SEQS, MAX_MODEL_LEN = 1024, 4096
OPS = (
    *("gather_batch", "rope_and_store", "store_kv", "paged_attention", "sample", "sample_shard", "top_logprobs"),
    *("rms_norm", "layer_norm", "silu_and_mul", "rms_norm_fp8", "gate_and_mul_fp8", "quantize_fp8"),
)
Launch = tuple[Any, dict[str, Any]]


def record_only(launches: list[Launch]) -> None:
    """Makes every launch append (kernel, arguments by name) to a list, and run nothing."""

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    InterpretedFunction.run = record


def triton_op(name: str) -> Any:
    """Returns the Triton implementation of an op."""
    return all_ops()[name].implementations()["cuda"]


def launch_step(draw: random.Random) -> None:
    """Launches the kernels of a step of a random batch, as the runner does."""
    num_seqs = draw.choice([1, 2, 3, 5, 15, 16, 17, 31, 48, 255, 256, draw.randint(1, MAX_NUM_SEQS)])
    num_decodes = draw.randint(0, num_seqs)
    counts = [1] * num_decodes + [draw.randint(2, 40) for _ in range(num_seqs - num_decodes)]
    num_tokens, max_blocks = sum(counts), draw.randint(1, MAX_MODEL_LEN // BLOCK_SIZE)
    num_shared = torch.zeros(1, dtype=torch.int32) if draw.random() < 0.3 else None
    batch = launch_gather(num_seqs, num_tokens, max_blocks)
    launch_layer(batch, num_tokens, num_decodes, num_shared, draw)
    launch_draw(draw.randint(1, num_seqs))


def launch_gather(num_seqs: int, num_tokens: int, max_blocks: int) -> tuple[torch.Tensor, ...]:
    """Launches `gather_batch` and returns its outputs."""
    tokens = torch.empty((MAX_NUM_SEQS, MAX_MODEL_LEN), dtype=torch.int32)
    blocks = torch.empty((MAX_NUM_SEQS, MAX_MODEL_LEN // BLOCK_SIZE), dtype=torch.int32)
    plan = torch.empty((4, num_seqs), dtype=torch.int32)
    return triton_op("gather_batch")(tokens, blocks, plan, num_tokens, max_blocks, BLOCK_SIZE)


def launch_layer(
    batch: tuple[torch.Tensor, ...],
    num_tokens: int,
    num_decodes: int,
    num_shared: torch.Tensor | None,
    draw: random.Random,
) -> None:
    """Launches norms, gates, rotation, store and attention of a layer on the outputs of `gather_batch`."""
    _, positions, slot_mapping, query_start_loc, seq_lens, block_tables = batch
    launch_rows(num_tokens)
    packed = torch.empty((num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM), dtype=torch.bfloat16)
    query, key, value = packed.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
    cache_dtype = draw.choice([torch.bfloat16, torch.float8_e4m3fn])
    caches = torch.empty((2, 4, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM), dtype=cache_dtype).unbind()
    is_scaled = cache_dtype.itemsize == 1 and draw.random() < 0.8
    scales = {"kv_scales": torch.ones((2, NUM_KV_HEADS))} if is_scaled else {}
    cos_sin = torch.empty((MAX_MODEL_LEN, HEAD_DIM), dtype=torch.float32)
    triton_op("rope_and_store")(query, key, value, *caches, slot_mapping, positions, cos_sin, **scales)
    triton_op("store_kv")(key, value, *caches, slot_mapping, **scales)
    triton_op("paged_attention")(
        query,
        *caches,
        block_tables,
        seq_lens,
        query_start_loc,
        HEAD_DIM**-0.5,
        draw.choice([0, 0, 1, 16, 1024]),
        num_decodes=num_decodes,
        num_shared=num_shared,
        deterministic=draw.random() < 0.1,
        **scales,
    )


def launch_rows(num_tokens: int) -> None:
    """Launches the norms and gates of a layer, in the dtype of the model and to 8 bits."""
    hidden, weight = torch.empty((num_tokens, HIDDEN), dtype=torch.bfloat16), torch.empty(HIDDEN, dtype=torch.bfloat16)
    for name in ("rms_norm", "rms_norm_fp8"):
        for residual in (None, hidden):
            triton_op(name)(hidden, weight, 1e-6, residual)
    triton_op("layer_norm")(hidden, weight, weight, 1e-6, hidden)
    triton_op("silu_and_mul")(hidden)
    triton_op("gate_and_mul_fp8")(hidden, "silu")
    triton_op("quantize_fp8")(hidden)


def launch_draw(num_lines: int) -> None:
    """Launches the kernels that draw tokens and compute log-probabilities, as `Sampler` does."""
    logits = torch.empty((num_lines, VOCAB_SIZE), dtype=torch.float32)
    index, positions = torch.zeros((2, num_lines), dtype=torch.int64).unbind()
    settings = [torch.empty(MAX_NUM_SEQS, dtype=dtype)[index] for dtype in (torch.float32, torch.int32)]
    seeds = torch.empty(MAX_NUM_SEQS, dtype=torch.int64)[index]
    triton_op("sample")(logits, settings[0], settings[1], settings[0], settings[0], seeds, positions)
    triton_op("sample_shard")(logits, VOCAB_SIZE, settings[0], settings[0], settings[0], seeds, positions)
    triton_op("top_logprobs")(logits, torch.zeros(num_lines, dtype=torch.int64), 5)


def chance(kernel: Any, arguments: dict[str, Any], form: Specialisation) -> list[str]:
    """Returns the arguments whose values make Triton compile a form other than the listed one."""
    of_any_value = kernel.kwargs["do_not_specialize"] or ()
    of_any_alignment = kernel.kwargs["do_not_specialize_on_alignment"] or ()
    wrong = []
    for name in form.types:
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            is_listed = name in of_any_alignment or value.data_ptr() % 16 == 0
        elif isinstance(value, int):
            is_listed = name in of_any_value or (value != 1 and (value % 16 == 0) == (name in form.multiples_of_16))
        else:
            is_listed = True
        if not is_listed:
            wrong.append(f"{name} = {value if isinstance(value, int) else value.data_ptr() % 16}")
    return wrong


def main(num_batches: int) -> None:
    """Launches batches, and fails with the launches that have no listed form."""
    launches: list[Launch] = []
    record_only(launches)
    forms: dict[Any, list[Specialisation]] = {}
    for name in OPS:
        module = importlib.import_module(f"millrace.kernels.{name}.triton")
        for form in module.specialisations(TARGETS["sm_90"]):
            forms.setdefault(form.kernel, []).append(form)
    wrong: dict[str, int] = {}
    launched: set[str] = set()
    for seed in range(num_batches):
        launch_step(random.Random(seed))
        for kernel, arguments in launches:
            assert is_listed(arguments, forms[kernel]), f"{kernel.__name__} has no listed form for {arguments}"
            for what in chance(kernel, arguments, forms[kernel][-1]):
                wrong[f"{kernel.__name__}: {what}"] = seed
        launched.update(kernel.__name__ for kernel, _ in launches)
        launches.clear()
    assert not wrong, wrong
    print(*sorted(launched))


if __name__ == "__main__":
    main(int(sys.argv[1]))
