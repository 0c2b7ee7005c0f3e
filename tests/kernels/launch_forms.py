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
from typing import Any, NamedTuple

import torch
from interpret import is_listed
from triton.runtime.interpreter import InterpretedFunction

from millrace.kernels._op import all_ops
from millrace.kernels._triton import TARGETS, Specialisation
from millrace.kernels.experts import CodedMatrices

BLOCK_SIZE, VOCAB_SIZE = 16, 1024
MAX_NUM_SEQS, MAX_MODEL_LEN = 1024, 4096
OPS = (
    *("gather_batch", "rope_and_store", "store_kv", "paged_attention", "sample", "sample_shard", "top_logprobs"),
    *("rope_and_store_latent", "latent_attention"),
    *("short_conv", "state_scan", "gated_delta"),
    *("rms_norm", "layer_norm", "silu_and_mul", "rms_norm_fp8", "gate_and_mul_fp8", "quantize_fp8", "experts"),
    *("quantize_int8", "scaled_int8_linear", "fp8_linear", "group_linear", "lora"),
    "varlen_attention",
)
Launch = tuple[Any, dict[str, Any]]


class Shape(NamedTuple):
    """The sizes of a model: of its heads, its hidden states and its limit of scores."""

    head_dim: int
    num_heads: int
    num_kv_heads: int
    hidden: int
    softcap: float = 0.0


SHAPES = (
    Shape(128, 16, 8, 1024),  # Qwen3-0.6B
    Shape(128, 28, 4, 3584),  # Qwen2.5-7B: 7 query heads for each KV head
    Shape(128, 64, 1, 8192),  # Llama-3-70B on 8 ranks has one KV head; here with all query heads
    Shape(64, 32, 8, 2048),  # Llama-3.2-1B
    Shape(256, 8, 4, 2304, softcap=50.0),  # Gemma-2-2B
    Shape(96, 32, 32, 3072),  # heads whose size is no power of two
)


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
    launch_layer(draw.choice(SHAPES), batch, num_tokens, num_decodes, num_shared, draw)
    launch_texts(draw.choice(SHAPES), batch[3], num_tokens, draw)
    launch_latents(batch, draw.choice([16, 128]), num_tokens, num_decodes, draw)
    launch_states(batch, num_seqs, num_tokens, num_decodes)
    launch_draw(draw.randint(1, num_seqs))


def launch_gather(num_seqs: int, num_tokens: int, max_blocks: int) -> tuple[torch.Tensor, ...]:
    """Launches `gather_batch` and returns its outputs."""
    tokens = torch.empty((MAX_NUM_SEQS, MAX_MODEL_LEN), dtype=torch.int32)
    blocks = torch.empty((MAX_NUM_SEQS, MAX_MODEL_LEN // BLOCK_SIZE), dtype=torch.int32)
    plan = torch.empty((4, num_seqs), dtype=torch.int32)
    return triton_op("gather_batch")(tokens, blocks, plan, num_tokens, max_blocks, BLOCK_SIZE)


def launch_layer(
    shape: Shape,
    batch: tuple[torch.Tensor, ...],
    num_tokens: int,
    num_decodes: int,
    num_shared: torch.Tensor | None,
    draw: random.Random,
) -> None:
    """Launches norms, gates, rotation, store and attention of a layer on the outputs of `gather_batch`."""
    _, positions, slot_mapping, query_start_loc, seq_lens, block_tables = batch
    launch_rows(num_tokens, shape.hidden)
    launch_products(num_tokens, shape.hidden, draw.random() < 0.5)
    launch_experts(num_tokens, draw)
    launch_codes(num_tokens, shape.hidden, draw)
    launch_adapters(num_tokens, shape.hidden, draw)
    num_kv_heads, head_dim = shape.num_kv_heads, shape.head_dim
    packed = torch.empty((num_tokens, shape.num_heads + 2 * num_kv_heads, head_dim), dtype=torch.bfloat16)
    query, key, value = packed.split((shape.num_heads, num_kv_heads, num_kv_heads), dim=1)
    cache_dtype = draw.choice([torch.bfloat16, torch.float8_e4m3fn])
    caches = torch.empty((2, 4, num_kv_heads, BLOCK_SIZE, head_dim), dtype=cache_dtype).unbind()
    is_scaled = cache_dtype.itemsize == 1 and draw.random() < 0.8
    scales = {"kv_scales": torch.ones((2, num_kv_heads))} if is_scaled else {}
    cos_sin = torch.empty((MAX_MODEL_LEN, head_dim), dtype=torch.float32)
    options = {**scales, "interleaved": draw.random() < 0.3}
    triton_op("rope_and_store")(query, key, value, *caches, slot_mapping, positions, cos_sin, **options)
    triton_op("store_kv")(key, value, *caches, slot_mapping, **scales)
    triton_op("paged_attention")(
        query,
        *caches,
        block_tables,
        seq_lens,
        query_start_loc,
        shape.head_dim**-0.5,
        draw.choice([0, 0, 1, 16, 1024]),
        softcap=shape.softcap,
        num_decodes=num_decodes,
        num_shared=num_shared,
        deterministic=draw.random() < 0.1,
        **scales,
    )


def launch_texts(shape: Shape, query_start_loc: torch.Tensor, num_tokens: int, draw: random.Random) -> None:
    """Launches the attention of an encoder, with or without a bias of distances."""
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    parts = torch.empty((num_tokens, sum(heads), shape.head_dim), dtype=torch.bfloat16).split(heads, dim=1)
    bias = torch.empty((shape.num_heads, draw.choice([1, 257]))) if draw.random() < 0.3 else None
    window, longest = draw.choice([0, 1, 64, 128]), draw.choice([40, MAX_MODEL_LEN])
    options = {"softcap": shape.softcap, "distance_bias": bias}
    triton_op("varlen_attention")(*parts, query_start_loc, longest, shape.head_dim**-0.5, window, **options)


def launch_latents(
    batch: tuple[torch.Tensor, ...], num_heads: int, num_tokens: int, num_decodes: int, draw: random.Random
) -> None:
    """Launches the write of latents and the attention over them, at the sizes of DeepSeek-V2 and V3."""
    _, positions, slot_mapping, query_start_loc, seq_lens, block_tables = batch
    query = torch.empty((num_tokens, num_heads, 192), dtype=torch.bfloat16)[..., 128:]
    latent = torch.empty((num_tokens, 1536 + 576), dtype=torch.bfloat16)[:, 1536:]
    cache = torch.empty((4, 1, BLOCK_SIZE, 576), dtype=torch.bfloat16)
    cos_sin, weight = torch.empty((MAX_MODEL_LEN, 64)), torch.empty(512, dtype=torch.bfloat16)
    store = (query, latent, cache, slot_mapping, positions, cos_sin, weight, 1e-6)
    triton_op("rope_and_store_latent")(*store, interleaved=draw.random() < 0.5)
    absorbed = torch.empty((num_tokens, num_heads, 576), dtype=torch.bfloat16)
    lengths = (block_tables, seq_lens, query_start_loc)
    triton_op("latent_attention")(absorbed, cache, *lengths, 0.1, 512, num_decodes=num_decodes)


def launch_states(batch: tuple[torch.Tensor, ...], num_seqs: int, num_tokens: int, num_decodes: int) -> None:
    """Launches the kernels of a layer with states, at the sizes of Bamba-9B."""
    _, _, _, query_start_loc, seq_lens, _ = batch
    num_heads, head_dim, state_size, width = 128, 64, 128, 4
    widths = num_heads * head_dim, num_heads * head_dim + 2 * state_size, num_heads
    _, x, dt = torch.empty((num_tokens, sum(widths)), dtype=torch.bfloat16).split(widths, dim=1)
    rows = torch.empty((4, num_seqs), dtype=torch.int32)[0], query_start_loc, seq_lens
    weight, bias = torch.empty((widths[1], width), dtype=x.dtype), torch.empty(widths[1], dtype=x.dtype)
    state = torch.empty((4, width - 1, widths[1]), dtype=x.dtype)
    x, b, c = triton_op("short_conv")(x, weight, bias, state, *rows).split((widths[0], state_size, state_size), dim=1)
    inputs = x.view(-1, num_heads, head_dim), dt, b.unsqueeze(1), c.unsqueeze(1)
    heads = dict.fromkeys(("rate", "dt_bias", "skip"), torch.empty(num_heads))
    state = torch.empty((4, num_heads, head_dim, state_size))
    triton_op("state_scan")(*inputs, state, *rows, **heads, num_decodes=num_decodes)
    launch_delta(dict(zip(("rows", "query_start_loc", "seq_lens"), rows, strict=True)), num_tokens, num_decodes)


def launch_delta(owners: dict[str, torch.Tensor], num_tokens: int, num_decodes: int) -> None:
    """Launches the kernel of a layer with the gated delta rule, at the sizes of Qwen3-Next."""
    num_heads, num_groups, head_dim = 32, 16, 128
    mixed = torch.empty((num_tokens, 2 * num_groups + num_heads, head_dim), dtype=torch.bfloat16)
    widths = 3 * head_dim, num_heads, num_heads
    _, beta, decay = torch.empty((num_tokens, sum(widths)), dtype=torch.bfloat16).split(widths, dim=1)
    state = torch.empty((4, num_heads, head_dim, head_dim))
    heads = dict.fromkeys(("rate", "decay_bias"), torch.empty(num_heads))
    inputs = (*mixed.split((num_groups, num_groups, num_heads), dim=1), decay, beta, state)
    triton_op("gated_delta")(*inputs, **owners, **heads, num_decodes=num_decodes)


def launch_rows(num_tokens: int, size: int) -> None:
    """Launches the norms and gates of a layer, in the dtype of the model and to 8 bits."""
    hidden, weight = torch.empty((num_tokens, size), dtype=torch.bfloat16), torch.empty(size, dtype=torch.bfloat16)
    for name in ("rms_norm", "rms_norm_fp8"):
        for residual in (None, hidden):
            triton_op(name)(hidden, weight, 1e-6, residual)
    triton_op("layer_norm")(hidden, weight, weight, 1e-6, hidden)
    triton_op("silu_and_mul")(hidden)
    triton_op("gate_and_mul_fp8")(hidden, "silu")
    triton_op("quantize_fp8")(hidden)
    triton_op("quantize_fp8")(hidden, group_size=128)
    triton_op("quantize_int8")(hidden)
    for name in ("quantize_fp8", "quantize_int8"):
        triton_op(name)(hidden, torch.ones(1))


def launch_products(num_tokens: int, size: int, has_bias: bool) -> None:
    """Launches the products by 8-bit weights, of plain rows and of quantised ones."""
    hidden, num_groups = torch.empty((num_tokens, size), dtype=torch.bfloat16), -(-size // 128)
    integers, floats = (torch.empty((256, size), dtype=dtype) for dtype in (torch.int8, torch.float8_e4m3fn))
    rows, bias = torch.empty((num_tokens, size), dtype=torch.int8), torch.empty(256) if has_bias else None
    triton_op("scaled_int8_linear")(rows, torch.empty(num_tokens), integers, torch.empty(256), bias, hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    for groups in (1, num_groups):
        scales = torch.empty((groups, 256))
        triton_op("fp8_linear")(hidden, None, floats, scales, bias, hidden.dtype)
    quantised, x_scale = rows.view(torch.float8_e4m3fn), torch.empty((num_tokens, num_groups))
    triton_op("fp8_linear")(quantised, x_scale, floats, scales, bias, hidden.dtype)


def launch_experts(num_tokens: int, draw: random.Random) -> None:
    """Launches a layer of experts, of which a token chooses one or more."""
    num_choices = draw.choice([1, 2, 4, 8])
    shapes = ((num_tokens, 64), (64, 64, 64), (64, 64, 32))
    hidden, w13, w2 = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
    if draw.random() < 0.5:
        codes, scales = torch.zeros((64, 64, 32), dtype=torch.uint8), torch.empty((64, 64, 2))
        zeros = scales.to(torch.uint8) if draw.random() < 0.5 else None
        w13, w2 = (
            CodedMatrices("int4", codes, scales, zeros, 32),
            CodedMatrices("e4m3", codes, scales[:, :, :1].contiguous(), None, 32),
        )
    expert_ids = torch.zeros((num_tokens, num_choices), dtype=torch.int32)
    names = ("w13_bias", "w2_bias") if draw.random() < 0.5 else ()
    biases = {name: torch.empty((64, 64), dtype=torch.bfloat16) for name in names}
    is_fixed = draw.random() < 0.1
    weights = torch.empty((num_tokens, num_choices))
    triton_op("experts")(hidden, w13, w2, expert_ids, weights, gate="silu", deterministic=is_fixed, **biases)


def launch_codes(num_tokens: int, size: int, draw: random.Random) -> None:
    """Launches the product of a weight of 4 or 8 bits, in groups or with a scale for each output."""
    bits, group_size, dtype = draw.choice([4, 8]), draw.choice([32, 64, 128, size]), torch.bfloat16
    weight = torch.empty((256, -(-size * bits // 512) * 16), dtype=torch.int32)
    scales = torch.empty((size // group_size, 256), dtype=draw.choice([dtype, torch.float32])).t()
    zeros = torch.empty((size // group_size, 256), dtype=torch.uint8).t() if draw.random() < 0.5 else None
    bias, out_dtype = draw.choice([None, torch.empty(256, dtype=dtype)]), draw.choice([None, torch.float32])
    x = torch.empty((num_tokens, size), dtype=dtype)
    triton_op("group_linear")(x, weight, scales, zeros, bias, bits=bits, dtype=out_dtype)


def launch_adapters(num_tokens: int, size: int, draw: random.Random) -> None:
    """Launches the products of adapters for a layer of one part, or of three, or more than one launch takes."""
    num_slots, max_rank, dtype = draw.choice([1, 4, 8, 33]), draw.choice([16, 64, 256]), torch.bfloat16
    part_ends = draw.choice([(256,), (256, 320, 384), (64, 128, 192, 256, 272)])
    packed = torch.zeros(num_slots + 1 + num_tokens, dtype=torch.int32)  # As `Routing`: the tokens begin anywhere.
    starts, tokens = packed.split((num_slots + 1, num_tokens))
    ranks = torch.zeros((num_slots, len(part_ends)), dtype=torch.int32)
    lora_a = torch.empty((num_slots, len(part_ends), max_rank, size), dtype=dtype)
    lora_b = torch.empty((num_slots, max_rank, part_ends[-1]), dtype=dtype)
    out = torch.empty((num_tokens, part_ends[-1]), dtype=draw.choice([dtype, torch.float32]))
    x = torch.empty((num_tokens, size), dtype=dtype)
    triton_op("lora")(out, x, lora_a, lora_b, ranks, tokens, starts, part_ends)


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
