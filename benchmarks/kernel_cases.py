"""The calls that kernels.py times: every op, at the sizes of real models, with its bytes and operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
BLOCK_SIZE = 16
ADAPTERS, RANK = (1, 4, 8), 16
"""Numbers of adapters in a step, and the rank of their matrices."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """A call to time.

    Attributes:
        op: The name of the op.
        name: Name of the case, by its sizes or options.
        dtype: Element type of the inputs.
        make: Draws fresh inputs.
        num_bytes: Bytes that any implementation must read and write.
        num_flops: Additions and multiplications of its matrix products.
        rate: Element type of these products, as in `Limits.flops_per_s`; empty for `dtype`.
        library: A library's function with the same result and arguments, to be timed beside the op.
    """

    op: str
    name: str
    dtype: str
    make: Callable[[], Call]
    num_bytes: float
    num_flops: float = 0.0
    rate: str = ""
    library: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the calls.

    Attributes:
        decodes: (sequences, tokens of each) of a full decode batch.
        long_decodes: (sequences, tokens of each) of a batch of few long sequences.
        prompt: Tokens of a prompt.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Size of a head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        logits: (rows, size of the vocabulary).
        num_tokens: Rows of the small kernels, in a decode step and in a prefill step.
        experts: Experts of a layer, choices of a token, hidden and intermediate size of a model with experts.
        expert_tokens: Tokens that these experts are called with.
        latent: (compressed numbers, rotated numbers) of a latent.
        coded: (inputs, outputs) of matrices of 4 and 8 bits.
        coded_tokens: Rows that these are multiplied by.
        texts: (texts, tokens of each) of a batch of an encoder.
        encoder_heads: (heads, size of a head) of the encoder.
    """

    decodes: tuple[int, int]
    long_decodes: tuple[int, int]
    prompt: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    logits: tuple[int, int]
    num_tokens: tuple[int, ...]
    experts: tuple[int, int, int, int] = (128, 8, 2048, 768)  # Qwen3-30B-A3B
    expert_tokens: tuple[int, ...] = (1, 64, 4096)
    latent: tuple[int, int] = (512, 64)
    coded: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 28_672), (14_336, 4096), (8192, 57_344))  # Llama 8B, 70B
    coded_tokens: tuple[int, ...] = (1, 16, 256)
    texts: tuple[tuple[int, int], ...] = ((1024, 128), (128, 512))
    encoder_heads: tuple[int, int] = (12, 64)


OLMOE = (64, 8, 2048, 1024)
GPU = Sizes((256, 1024), (32, 8192), 8192, 32, 8, 128, 4096, 12_288, (256, 151_936), (256, 8192))
CPU = Sizes(
    *((32, 512), (4, 2048), 512, 16, 8, 128, 1024, 3072, (8, 151_936), (64,), OLMOE, (1, 64, 512)),
    coded=((1024, 3072),),
    texts=((64, 32), (32, 128), (8, 512)),
)
TINY = Sizes(
    *((4, 40), (2, 70), 33, 4, 2, 32, 64, 96, (3, 300), (5,), (4, 2, 64, 32), (1, 5), (32, 16), ((64, 96),), (1, 5)),
    texts=((3, 20),),
    encoder_heads=(2, 16),
)


@dataclass(frozen=True, slots=True)
class Cases:
    """Makes the cases of one device and dtype.

    Attributes:
        sizes: The sizes of the calls.
        dtype: Element type of activations and weights.
        device: Device of the inputs.
    """

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device

    def of_the_model(self) -> Iterator[Case]:
        """Yields the cases that depend on the model's dtype."""
        yield from self.attention()
        yield from self.latents()
        for num_texts, length in self.sizes.texts:
            yield from self.texts(num_texts, length)
        yield from self.states()
        for num_tokens in self.sizes.num_tokens:
            yield from self.elementwise(num_tokens)
            yield from self.heads(num_tokens)
            yield from self.products(num_tokens)
        for num_tokens in self.sizes.expert_tokens:
            for kind in ("", "int4", "e4m3", "e2m1"):
                yield self.experts(num_tokens, kind)
        for num_tokens, sizes, bits in product(self.sizes.coded_tokens, self.sizes.coded, (4, 8)):
            yield self.coded(num_tokens, *sizes, bits)
        for num_tokens, num_adapters in product(self.sizes.coded_tokens, ADAPTERS):
            if num_adapters <= num_tokens:
                yield self.adapters(num_tokens, num_adapters)

    def around_the_model(self) -> Iterator[Case]:
        """Yields the cases before and after the model: token ids in, logits out."""
        yield self.batch()
        yield from self.sampling()

    def batch(self) -> Case:
        """Returns the case of `gather_batch`: the tensors of a decode step, out of the tables of sequences."""
        count, length = self.sizes.decodes
        max_blocks = length // BLOCK_SIZE + 1

        def gather() -> Call:
            rows = torch.arange(count, dtype=torch.int32)
            plan = torch.stack((rows, torch.full_like(rows, length - 1), torch.ones_like(rows), rows)).to(self.device)
            tables = (torch.ones(count + 1, n, dtype=torch.int32, device=self.device) for n in (4 * length, length))
            return Call((*tables, plan, count, max_blocks, BLOCK_SIZE))

        # For each sequence: its blocks read and written, four numbers of the step plan, a token id, and five results.
        num_bytes = count * (8 * max_blocks + 16 + 4 + 3 * 8 + 2 * 4)
        return Case("gather_batch", f"decode {count} x {length}", "int32", gather, num_bytes)

    def attention(self) -> Iterator[Case]:
        """Yields decode steps, a prompt, and a mixture of both."""
        count, length = self.sizes.decodes
        decodes, prompt = [(length, 1)] * count, self.sizes.prompt
        name = f"decode {count} x {length}"
        yield self.attend(name, decodes)
        yield self.attend(f"{name}, fp8 cache", decodes, cache_dtype=FP8)
        shared = length * 7 // 8 // BLOCK_SIZE
        yield self.attend(f"{name}, {shared * BLOCK_SIZE} shared", decodes, num_shared=shared)
        yield self.attend(f"{name}, deterministic", decodes, deterministic=True)
        count, length = self.sizes.long_decodes
        yield self.attend(f"decode {count} x {length}", [(length, 1)] * count)
        yield self.attend(f"prompt of {prompt}", [(prompt, prompt)])
        yield self.attend(f"{name} and half a prompt", [*decodes, (prompt, prompt // 2)])

    def latents(self) -> Iterator[Case]:
        """Yields a decode step and a chunk over latents, and the write of the latents of a step."""
        sizes, (rank, rope_dim), itemsize = self.sizes, self.sizes.latent, self.dtype.itemsize
        (count, length), dim = sizes.decodes, rank + rope_dim
        chunk = (sizes.prompt, sizes.prompt // 2)
        for name, lengths in ((f"decode {count} x {length}", [(length, 1)] * count), (f"chunk {chunk}", [chunk])):
            num_queries, num_keys = sum(queries for _, queries in lengths), sum(seq_len for seq_len, _ in lengths)
            num_bytes = (num_keys * dim + num_queries * sizes.num_heads * (dim + rank)) * itemsize
            pairs = sum(queries * (seq_len - (queries - 1) / 2) for seq_len, queries in lengths)
            make = partial(self._latent_call, lengths)
            yield self._case("latent_attention", name, make, num_bytes, 2 * pairs * sizes.num_heads * (dim + rank))
        num_tokens = sizes.num_tokens[0]

        def store() -> Call:
            query, latent = self._normal(num_tokens, sizes.num_heads, rope_dim), self._normal(num_tokens, dim)
            cache, table = self._latent_cache(num_tokens), torch.randn(4096, rope_dim, device=self.device)
            positions = self._integers(4096, num_tokens)
            args = (query, latent, cache, self._slots(num_tokens), positions, table, self._normal(rank), 1e-6)
            return Call(args, {"interleaved": True})

        num_bytes = 2 * num_tokens * (sizes.num_heads * rope_dim + dim) * itemsize
        yield self._case("rope_and_store_latent", f"{num_tokens} tokens, {sizes.num_heads} heads", store, num_bytes)

    def texts(self, num_texts: int, length: int) -> Iterator[Case]:
        """Yields attention of encoders over texts of one length: plain, with a bias of 128 distances, disentangled."""
        num_heads, head_dim = self.sizes.encoder_heads
        num_tokens = num_texts * length

        def make(has_bias: bool) -> Call:
            parts = self._normal(num_tokens, 3 * num_heads, head_dim).split(num_heads, dim=1)
            starts = torch.arange(num_texts + 1, dtype=torch.int32, device=self.device) * length
            bias = torch.randn(num_heads, 257, device=self.device) if has_bias else None
            return Call((*parts, starts, length, head_dim**-0.5), {"distance_bias": bias})

        name = f"{num_texts} x {length}, {num_heads} heads of {head_dim}"
        num_numbers = num_tokens * num_heads * head_dim
        sizes = 4 * num_numbers * self.dtype.itemsize, 4 * num_numbers * length
        yield self._case("varlen_attention", name, partial(make, False), *sizes, library=attend_to_equal_texts)
        yield self._case("varlen_attention", f"{name}, bias", partial(make, True), *sizes)

        def disentangled(num_rows: int = 512) -> Call:
            parts = self._normal(num_tokens, 3 * num_heads, head_dim).split(num_heads, dim=1)
            starts = torch.arange(num_texts + 1, dtype=torch.int32, device=self.device) * length
            row_keys, row_queries = (self._normal(num_rows, num_heads, head_dim) for _ in range(2))
            rows = torch.arange(num_rows + 1, device=self.device).clamp(max=num_rows - 1)
            return Call((*parts, row_keys, row_queries, rows, starts, length), {"scale": (3 * head_dim) ** -0.5})

        sizes = sizes[0], sizes[1] + 4 * num_numbers * min(512, 2 * length - 1)
        yield self._case("disentangled_attention", f"{name}, 512 rows", disentangled, *sizes)

    def elementwise(self, num_tokens: int) -> Iterator[Case]:
        """Yields the kernels that touch each number once."""
        width, inner, itemsize = self.sizes.hidden_size, self.sizes.intermediate_size, self.dtype.itemsize
        rows, name = num_tokens * width, f"{num_tokens} x {width}"

        def norm() -> Call:
            x, residual = self._normal(num_tokens, width), self._normal(num_tokens, width)
            return Call((x, self._normal(width), 1e-6, residual))

        def layer_norm() -> Call:
            x, residual = self._normal(num_tokens, width), self._normal(num_tokens, width)
            return Call((x, self._normal(width), self._normal(width), 1e-6, residual))

        def gated(*options: str) -> Call:
            return Call((self._normal(num_tokens, 2 * inner), *options))

        def look_up() -> Call:
            return Call((self._integers(width, num_tokens), self._normal(width, width)))

        yield self._case("rms_norm", f"{name}, residual", norm, 4 * rows * itemsize)
        yield self._case("rms_norm_fp8", f"{name}, residual", norm, rows * (3 * itemsize + 1))
        yield self._case("layer_norm", f"{name}, residual", layer_norm, 4 * rows * itemsize)
        num_bytes = 3 * num_tokens * inner * itemsize
        yield self._case("silu_and_mul", f"{num_tokens} x {inner}", gated, num_bytes)
        yield self._case("gelu_and_mul", f"{num_tokens} x {inner}", partial(gated, "tanh"), num_bytes)
        num_bytes = num_tokens * inner * (2 * itemsize + 1)
        yield self._case("gate_and_mul_fp8", f"{num_tokens} x {inner}, silu", partial(gated, "silu"), num_bytes)
        yield self._case("embedding", name, look_up, 2 * rows * itemsize)
        for op, kind, options in (
            ("quantize_fp8", "", {}),
            ("quantize_fp8", ", groups of 128", {"group_size": 128}),
            ("quantize_int8", "", {}),
        ):
            make = partial(self._rows_of_width, num_tokens, **options)
            yield self._case(op, f"{name}{kind}", make, rows * (itemsize + 1))

    def _rows_of_width(self, num_tokens: int, **options: int) -> Call:
        return Call((self._normal(num_tokens, self.sizes.hidden_size),), options)

    def heads(self, num_tokens: int) -> Iterator[Case]:
        """Yields the kernels that change queries, keys and values before attention."""
        sizes, itemsize = self.sizes, self.dtype.itemsize
        q_size, kv_size = (num_tokens * heads * sizes.head_dim for heads in (sizes.num_heads, sizes.num_kv_heads))
        name = f"{num_tokens} tokens, {sizes.num_heads}+{sizes.num_kv_heads} heads of {sizes.head_dim}"

        def store() -> Call:
            _, key, value = self._qkv(num_tokens)
            return Call((key, value, *self._caches(num_tokens, self.dtype), self._slots(num_tokens)))

        def fused(cache_dtype: torch.dtype) -> Call:
            caches, slots = self._caches(num_tokens, cache_dtype), self._slots(num_tokens)
            args = (*self._qkv(num_tokens), *caches, slots, self._integers(4096, num_tokens), self._table())
            weights = {name: self._normal(sizes.head_dim) for name in ("q_weight", "k_weight")}
            return Call(args, {**weights, "eps": 1e-6})

        yield self._case("store_kv", name, store, 4 * kv_size * itemsize)
        for cache_dtype in (self.dtype, FP8):
            num_bytes = (2 * q_size + 2 * kv_size) * itemsize + 2 * kv_size * cache_dtype.itemsize
            kind = f"{name}, normed" + (", fp8 cache" if cache_dtype == FP8 else "")
            yield self._case("rope_and_store", kind, partial(fused, cache_dtype), num_bytes)

    def products(self, num_tokens: int) -> Iterator[Case]:
        """Yields the matrix products that have a kernel of ours."""
        inner, outer = self.sizes.hidden_size, self.sizes.intermediate_size
        name, flops = f"{num_tokens} x {inner} to {outer}", 2 * num_tokens * inner * outer
        num_inputs, out_bytes = (num_tokens + outer) * inner, num_tokens * outer * self.dtype.itemsize

        def plain() -> Call:
            return Call((self._normal(num_tokens, inner), self._normal(outer, inner), None))

        def scaled() -> Call:
            x, weight = self._normal(num_tokens, inner).to(FP8), self._normal(outer, inner).to(FP8)
            scales = [torch.full((rows, 1), 0.01, device=self.device) for rows in (num_tokens, outer)]
            return Call((x, scales[0], weight, scales[1], None, self.dtype))

        num_bytes = num_inputs * self.dtype.itemsize + out_bytes
        yield self._case("invariant_linear", name, plain, num_bytes, flops, library=F.linear)
        yield self._case("scaled_linear", name, scaled, num_inputs + out_bytes, flops, rate="fp8")
        yield from self._eight_bit_products(name, num_tokens)
        if self.device.type == "cpu":
            yield from self._packed_products(name, num_tokens)

    def _eight_bit_products(self, name: str, num_tokens: int) -> Iterator[Case]:
        """Yields the products by a weight of 8 bits: integers, blocks of floats, and floats with plain rows."""
        inner, outer, itemsize = self.sizes.hidden_size, self.sizes.intermediate_size, self.dtype.itemsize
        num_groups, flops, out_bytes = -(-inner // 128), 2 * num_tokens * inner * outer, num_tokens * outer * itemsize

        def scales(*shape: int) -> Tensor:
            return torch.full(shape, 0.01, device=self.device)

        def integers() -> Call:
            x, weight = (torch.randint(-127, 128, (n, inner), device=self.device).char() for n in (num_tokens, outer))
            return Call((x, scales(num_tokens), weight, scales(outer), None, self.dtype))

        def blocks(plain: bool, num_groups: int) -> Call:
            x, weight = self._normal(num_tokens, inner), self._normal(outer, inner).to(FP8)
            rows = (x, None) if plain else (x.to(FP8), scales(num_tokens, num_groups))
            return Call((*rows, weight, scales(num_groups, outer), None, self.dtype))

        num_bytes = (num_tokens + outer) * inner + out_bytes
        # A GPU multiplies 8-bit integers at the rate of 8-bit floats.
        yield self._case("scaled_int8_linear", name, integers, num_bytes, flops, rate="fp8")
        by_block = num_bytes + 4 * num_groups * outer
        yield self._case(
            "fp8_linear", f"{name}, blocks", partial(blocks, False, num_groups), by_block, flops, rate="fp8"
        )
        plain_bytes = num_bytes + num_tokens * inner * (itemsize - 1)
        yield self._case("fp8_linear", f"{name}, plain rows", partial(blocks, True, 1), plain_bytes, flops)

    def _packed_products(self, name: str, num_tokens: int) -> Iterator[Case]:
        """Yields the products whose weights are laid out for a CPU."""
        from millrace.kernels import quantize_int8
        from millrace.kernels.int8_linear import pack_int8
        from millrace.kernels.packed_gated_linear import pack_gated
        from millrace.kernels.packed_linear import pack_panels

        inner, outer, itemsize = self.sizes.hidden_size, self.sizes.intermediate_size, self.dtype.itemsize

        def packed() -> Call:
            return Call((self._normal(num_tokens, inner), pack_panels(self._normal(outer, inner)), None, outer))

        def gated() -> Call:
            return Call((self._normal(num_tokens, inner), pack_gated(self._normal(2 * outer, inner))))

        def integers() -> Call:
            weight, scale = quantize_int8(self._normal(outer, inner))
            return Call((self._normal(num_tokens, inner), pack_int8(weight), scale, None, outer))

        flops, num_activations = 2 * num_tokens * inner * outer, num_tokens * (inner + outer)
        yield self._case("packed_linear", name, packed, (num_activations + inner * outer) * itemsize, flops)
        num_bytes = (num_activations + 2 * inner * outer) * itemsize
        yield self._case("packed_gated_linear", name, gated, num_bytes, 2 * flops)
        yield self._case("int8_linear", name, integers, num_activations * itemsize + inner * outer, flops)
        for bits in (4, 8):
            num_bytes = num_activations * itemsize + inner * outer * bits // 8 + 2 * (inner // 32) * outer
            groups = partial(self._groups_call, num_tokens, bits)
            yield self._case("packed_group_linear", f"{name}, {bits} bits", groups, num_bytes, flops)
            num_bytes = num_tokens * (inner * bits // 8 + inner * itemsize)
            rows = partial(self._group_rows_call, num_tokens, bits)
            yield self._case("packed_group_embedding", f"{name}, {bits} bits", rows, num_bytes)

    def _groups_call(self, num_tokens: int, bits: int) -> Call:
        packed, outer = self._packed_groups(bits), self.sizes.intermediate_size
        return Call((self._normal(num_tokens, self.sizes.hidden_size), *packed, None, outer))

    def _group_rows_call(self, num_tokens: int, bits: int) -> Call:
        ids = self._integers(self.sizes.intermediate_size, num_tokens)
        return Call((ids, *self._packed_groups(bits), self.dtype))

    def _packed_groups(self, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns a matrix in groups of 32 columns, packed for a CPU."""
        from millrace.kernels.group_linear import pack_codes
        from millrace.kernels.packed_group_linear import pack_groups

        inner, outer = self.sizes.hidden_size, self.sizes.intermediate_size
        weight = pack_codes(torch.randint(2**bits, (outer, inner), dtype=torch.uint8), bits)
        return pack_groups(weight, torch.rand(outer, inner // 32).to(self.dtype), None, inner, bits)

    def coded(self, num_tokens: int, inner: int, outer: int, bits: int) -> Case:
        """Returns the case of a matrix of 4 or 8 bits, in groups of 128 with zeros."""
        from millrace.kernels.group_linear import by_groups, pack_codes

        num_groups = max(inner // 128, 1)

        def make() -> Call:
            codes, zeros = (
                torch.randint(1 << bits, (outer, width), dtype=torch.uint8, device=self.device)
                for width in (inner, num_groups)
            )
            scales = by_groups(self._normal(outer, num_groups))
            args = (self._normal(num_tokens, inner), pack_codes(codes, bits), scales, by_groups(zeros), None)
            return Call(args, {"bits": bits})

        itemsize, name = self.dtype.itemsize, f"{num_tokens} x {inner} to {outer}, {bits} bits"
        num_bytes = (
            inner * outer * bits / 8 + outer * num_groups * (itemsize + 1) + num_tokens * (inner + outer) * itemsize
        )
        return self._case("group_linear", name, make, num_bytes, 2 * num_tokens * inner * outer)

    def adapters(self, num_tokens: int, num_adapters: int) -> Case:
        """Returns the case of the adapters of query, key and value, each of as many tokens as the others."""
        sizes, inner, itemsize = self.sizes, self.sizes.hidden_size, self.dtype.itemsize
        widths = [heads * sizes.head_dim for heads in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)]
        outer, num_parts = sum(widths), len(widths)

        def make() -> Call:
            rows = self._normal(num_tokens, outer), self._normal(num_tokens, inner)
            matrices = (self._normal(num_adapters, num_parts, RANK, inner), self._normal(num_adapters, RANK, outer))
            ranks = torch.full((num_adapters, num_parts), RANK, dtype=torch.int32)
            tokens = torch.randperm(num_tokens, dtype=torch.int32)
            starts = torch.arange(num_adapters + 1, dtype=torch.int32) * num_tokens // num_adapters
            numbers = (tensor.to(self.device) for tensor in (ranks, tokens, starts))
            return Call((*rows, *matrices, *numbers, tuple(accumulate(widths))))

        num_weights = num_parts * inner + outer
        num_bytes = (num_adapters * RANK * num_weights + num_tokens * (inner + 2 * outer)) * itemsize
        name = f"{num_tokens} x {inner} to {outer}, {num_adapters} adapters of rank {RANK}"
        return self._case("lora", name, make, num_bytes, 2 * num_tokens * RANK * num_weights)

    def experts(self, num_tokens: int, kind: str) -> Case:
        """Returns the experts of a layer, each chosen equally often if there are tokens enough.

        `kind` is that of codes in groups of 32 (e2m1) or 128, or empty for plain weights.
        """
        from millrace.kernels.experts import KINDS

        num_experts, num_choices, width, inner = self.sizes.experts
        num_chosen = num_tokens * num_choices

        def make() -> Call:
            weights = [self._expert_weights(kind, 2 * inner, width), self._expert_weights(kind, width, inner)]
            ids = torch.randperm(num_experts, device=self.device).repeat(-(-num_chosen // num_experts))[:num_chosen]
            expert_ids = ids.to(torch.int32).view(num_tokens, num_choices)
            shares = torch.full(expert_ids.shape, 1 / num_choices, device=self.device)
            return Call((self._normal(num_tokens, width), *weights, expert_ids, shares), {"gate": "silu"})

        weight_bytes = KINDS[kind].bits / 8 + (1 / 32 if kind == "e2m1" else 4 / 128) if kind else self.dtype.itemsize
        num_bytes = int(min(num_experts, num_chosen) * 3 * width * inner * weight_bytes)
        num_bytes += 2 * num_tokens * width * self.dtype.itemsize
        name = f"{num_tokens} tokens, {num_choices} of {num_experts}, {width} x {inner} {kind}".rstrip()
        return self._case("experts", name, make, num_bytes, 6 * num_chosen * width * inner)

    def _expert_weights(self, kind: str, num_rows: int, num_columns: int) -> Any:
        from millrace.kernels.experts import KINDS, CodedMatrices

        num_experts = self.sizes.experts[0]
        if not kind:
            return self._normal(num_experts, num_rows, num_columns).mul_(num_columns**-0.5)
        shape, group = (num_experts, num_rows), 32 if kind == "e2m1" else 128
        codes = torch.randint(0, 112, (*shape, num_columns * KINDS[kind].bits // 8), device=self.device)
        scales = torch.full((*shape, -(-num_columns // group)), 2.0**-8, device=self.device)
        if kind == "e2m1":
            scales = torch.full_like(scales, 120).to(torch.uint8)
        return CodedMatrices(kind, codes.to(torch.uint8), scales, None, group)

    def states(self) -> Iterator[Case]:
        """Yields the decodes and the prompt of a layer with states: heads of 64 x 128, twice the hidden size in all."""
        num_seqs, prompt, itemsize = self.sizes.decodes[0], self.sizes.prompt, self.dtype.itemsize
        num_heads, head_dim, state_size, width = max(1, self.sizes.hidden_size // 32), 64, 128, 4
        channels = num_heads * head_dim + 2 * state_size
        for name, counts in ((f"decode {num_seqs}", [1] * num_seqs), (f"prompt of {prompt}", [prompt])):
            num_tokens, num_states = sum(counts), len(counts) * num_heads * head_dim * state_size
            convolve = partial(self._conv_call, counts, channels, width)
            num_bytes = (2 * num_tokens + 2 * len(counts) * (width - 1)) * channels * itemsize
            yield self._case("short_conv", name, convolve, num_bytes, 2 * width * num_tokens * channels)
            scan = partial(self._scan_call, counts, num_heads, head_dim, state_size)
            num_bytes = 8 * num_states + num_tokens * (channels + num_heads * head_dim) * itemsize
            yield self._case("state_scan", name, scan, num_bytes, 4 * num_tokens * num_states / len(counts))
            delta = partial(self._delta_call, counts, num_heads, head_dim, state_size)
            yield self._case("gated_delta", name, delta, num_bytes, 6 * num_tokens * num_states / len(counts))

    def _rows_call(self, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Returns rows, first tokens and lengths of sequences that go on."""
        lengths = torch.tensor(counts, dtype=torch.int32, device=self.device)
        starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
        return torch.arange(len(counts), dtype=torch.int32, device=self.device), starts, lengths + 1

    def _conv_call(self, counts: Sequence[int], channels: int, width: int) -> Call:
        weights = self._normal(channels, width), self._normal(channels)
        state = self._normal(len(counts), width - 1, channels)
        return Call((self._normal(sum(counts), channels), *weights, state, *self._rows_call(counts)))

    def _delta_call(self, counts: Sequence[int], num_heads: int, head_dim: int, key_dim: int) -> Call:
        num_tokens, num_decodes = sum(counts), len(counts) if max(counts) == 1 else 0
        shapes = [(1, key_dim), (1, key_dim), (num_heads, head_dim), (num_heads,), (num_heads,)]
        inputs = [self._normal(num_tokens, *each) for each in shapes]
        state = torch.zeros(len(counts), num_heads, head_dim, key_dim, device=self.device)
        owners = dict(zip(("rows", "query_start_loc", "seq_lens"), self._rows_call(counts), strict=True))
        heads = {name: torch.full((num_heads,), -1.0, device=self.device) for name in ("rate", "decay_bias")}
        return Call((*inputs, state), {**owners, **heads, "num_decodes": num_decodes})

    def _scan_call(self, counts: Sequence[int], num_heads: int, head_dim: int, state_size: int) -> Call:
        num_tokens, num_decodes = sum(counts), len(counts) if max(counts) == 1 else 0
        inputs = [self._normal(num_tokens, *each) for each in ((num_heads, head_dim), (num_heads,))]
        inputs += [self._normal(num_tokens, 1, state_size) for _ in "bc"]
        state = torch.zeros(len(counts), num_heads, head_dim, state_size, device=self.device)
        heads = [torch.full((num_heads,), value, device=self.device) for value in (-1.0, 0.5, 1.0)]
        options = dict(zip(("rate", "dt_bias", "skip"), heads, strict=True))
        return Call((*inputs, state, *self._rows_call(counts)), {**options, "num_decodes": num_decodes})

    def sampling(self) -> Iterator[Case]:
        """Yields draws with every kind of filter, and the log-probabilities of the best tokens."""
        num_rows, vocab_size = self.sizes.logits
        num_bytes = num_rows * vocab_size * 4
        filters = {
            "greedy": (0.0, 0, 1.0, 0.0),
            "plain draw": (1.0, 0, 1.0, 0.0),
            "top_k 20, top_p 0.8": (0.7, 20, 0.8, 0.0),
            "top_p 0.9": (1.0, 0, 0.9, 0.0),
            "min_p 0.05": (1.0, 0, 1.0, 0.05),
        }

        def logits() -> Tensor:
            return torch.randn(num_rows, vocab_size, device=self.device) * 3

        def draws(temperature: float, top_k: int, top_p: float, min_p: float) -> Call:
            rows = torch.arange(num_rows, device=self.device)
            k = torch.full((num_rows,), top_k, dtype=torch.int32, device=self.device)
            floats = [torch.full((num_rows,), value, device=self.device) for value in (temperature, top_p, min_p)]
            return Call((logits(), floats[0], k, floats[1], floats[2], rows, rows))

        for name, values in filters.items():
            yield Case("sample", f"{num_rows} x {vocab_size}, {name}", "float32", partial(draws, *values), num_bytes)

        def of_rank() -> Call:
            columns, ones = logits(), torch.ones(num_rows, device=self.device)
            rows = torch.arange(num_rows, device=self.device)
            return Call((columns, vocab_size, columns.amax(-1) + 1, ones, ones - 1, rows, rows))

        yield Case("sample_shard", f"{num_rows} x {vocab_size}", "float32", of_rank, num_bytes)
        yield Case("greedy", f"{num_rows} x {vocab_size}", "float32", lambda: Call((logits(),)), num_bytes)

        def best() -> Call:
            return Call((logits(), self._integers(vocab_size, num_rows), 5))

        yield Case("top_logprobs", f"{num_rows} x {vocab_size}, best 5", "float32", best, num_bytes)

    def attend(
        self,
        name: str,
        lengths: Sequence[tuple[int, int]],
        *,
        num_shared: int = 0,
        cache_dtype: torch.dtype | None = None,
        deterministic: bool = False,
    ) -> Case:
        """Makes a case of attention from (seq_len, number of queries) of each sequence; `num_shared` counts blocks."""
        sizes, cache_dtype = self.sizes, cache_dtype or self.dtype
        num_queries = sum(queries for _, queries in lengths)
        own = sum(seq_len - num_shared * BLOCK_SIZE for seq_len, _ in lengths)
        kv_numbers = 2 * (own + num_shared * BLOCK_SIZE) * sizes.num_kv_heads * sizes.head_dim
        q_numbers = 2 * num_queries * sizes.num_heads * sizes.head_dim
        pairs = sum(queries * (seq_len - (queries - 1) / 2) for seq_len, queries in lengths)
        return self._case(
            "paged_attention",
            name,
            partial(self._attention_call, lengths, num_shared, cache_dtype, deterministic),
            kv_numbers * cache_dtype.itemsize + q_numbers * self.dtype.itemsize,
            4 * pairs * sizes.num_heads * sizes.head_dim,
        )

    def _case(
        self, op: str, name: str, make: Callable[[], Call], num_bytes: float, num_flops: float = 0.0, **options: Any
    ) -> Case:
        return Case(op, name, str(self.dtype).removeprefix("torch."), make, num_bytes, num_flops, **options)

    def _attention_call(
        self, lengths: Sequence[tuple[int, int]], num_shared: int, cache_dtype: torch.dtype, deterministic: bool
    ) -> Call:
        needed = [-(-seq_len // BLOCK_SIZE) for seq_len, _ in lengths]
        ids = torch.randperm(num_shared + sum(needed) - num_shared * len(needed), dtype=torch.int32)
        shared, own = ids[:num_shared], ids[num_shared:].split([n - num_shared for n in needed])
        tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
        for table, blocks in zip(tables, own, strict=True):
            table[: num_shared + len(blocks)] = torch.cat((shared, blocks))
        starts = torch.tensor([0, *(queries for _, queries in lengths)]).cumsum(0).to(torch.int32)
        query, _, _ = self._qkv(int(starts[-1]))
        seq_lens = torch.tensor([seq_len for seq_len, _ in lengths], dtype=torch.int32)
        hints = {
            "num_decodes": sum(queries == 1 for _, queries in lengths),
            "num_shared": torch.tensor([num_shared], dtype=torch.int32, device=self.device) if num_shared else None,
            "deterministic": deterministic,
        }
        tensors = (tensor.to(self.device) for tensor in (tables, seq_lens, starts))
        caches = self._caches(len(ids) * BLOCK_SIZE, cache_dtype)
        return Call((query, *caches, *tensors, self.sizes.head_dim**-0.5), hints)

    def _latent_call(self, lengths: Sequence[tuple[int, int]]) -> Call:
        paged = self._attention_call(lengths, 0, self.dtype, False)
        _, keys, _, *tables, _ = paged.args
        rank, rope_dim = self.sizes.latent
        query = self._normal(sum(queries for _, queries in lengths), self.sizes.num_heads, rank + rope_dim)
        cache = self._latent_cache(len(keys) * BLOCK_SIZE)
        args = (query, cache, *tables, (rank + rope_dim) ** -0.5, rank)
        return Call(args, {"num_decodes": paged.kwargs["num_decodes"]})

    def _latent_cache(self, num_slots: int) -> Tensor:
        return self._normal(-(-num_slots // BLOCK_SIZE), 1, BLOCK_SIZE, sum(self.sizes.latent))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def _integers(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), device=self.device)

    def _qkv(self, num_tokens: int) -> tuple[Tensor, ...]:
        heads = (self.sizes.num_heads, self.sizes.num_kv_heads, self.sizes.num_kv_heads)
        return self._normal(num_tokens, sum(heads), self.sizes.head_dim).split(heads, dim=1)

    def _caches(self, num_slots: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        shape = (-(-num_slots // BLOCK_SIZE), self.sizes.num_kv_heads, BLOCK_SIZE, self.sizes.head_dim)
        keys, values = (self._normal(*shape).to(dtype) for _ in range(2))
        return keys, values

    def _slots(self, num_tokens: int) -> Tensor:
        return torch.randperm(num_tokens, device=self.device)

    def _table(self) -> Tensor:
        return torch.randn(4096, self.sizes.head_dim, device=self.device)


def attend_to_equal_texts(
    query: Tensor, key: Tensor, value: Tensor, _starts: Tensor, length: int, scale: float, **_options: None
) -> Tensor:
    """Runs torch's attention over texts of one length, which needs no padding."""
    queries, keys, values = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(queries, keys, values, scale=scale).transpose(1, 2).flatten(0, 1)
