"""Prompts whose attention a library computes: here a plain function that checks what it is given."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from millrace.engine import LLM, SamplingParams
from millrace.engine.models import components
from millrace.kernels.paged_attention import PromptLibrary

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8], [1, 2, 3, 4, 5, 9, 9, 9, 9], [4], list(range(1, 40))]


class PlainFlash:
    """The arguments of `torch.ops.aten._flash_attention_forward`, checked, and its result, computed plainly."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.num_calls, self.windows = error, 0, set[Any]()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor,
        longest: int, longest_keys: int, dropout: float, causal: bool, debug: bool, *,
        scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.num_calls += 1
        self.windows.add(window_size_left)
        if self.error is not None:
            raise self.error
        assert (dropout, causal, debug) == (0.0, True, False)
        assert starts is key_starts and starts.dtype == torch.int32 and longest == longest_keys
        lengths = starts.diff().tolist()
        assert max(lengths) == longest and starts[0] == 0 and sum(lengths) == len(query) == len(key) == len(value)
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        assert window_size_right == (None if window_size_left is None else 0)
        return (torch.cat([self._prompt(query[a:b], key[a:b], value[a:b], scale, window_size_left)
                           for a, b in pairwise(starts.tolist())]),)  # fmt: skip

    def _prompt(self, query: Tensor, key: Tensor, value: Tensor, scale: float, left: int | None) -> Tensor:
        group = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
        seen = torch.ones(len(query), len(query), dtype=torch.bool).tril()
        if left is not None:
            seen = seen.triu(-left)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)


def generate(folder: Path, library: PromptLibrary | None, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    monkeypatch.setattr(components.PromptLibrary, "choose", lambda *_, **__: library)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    # Few tokens a step: steps with decodes and whole prompts, with chunks, and with prompts found in the cache.
    with LLM(str(folder), dtype="float32", max_num_seqs=4, max_num_batched_tokens=24, block_size=4) as llm:
        prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_library_changes_no_token(tiny_model: Callable[[str], Path], family: str, monkeypatch: Any) -> None:
    expected = generate(tiny_model(family), None, monkeypatch)
    flash = PlainFlash()
    assert generate(tiny_model(family), PromptLibrary(flash), monkeypatch) == expected
    assert flash.num_calls


def test_a_library_that_fails_is_not_called_again(
    tiny_model: Callable[[str], Path], monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    flash = PlainFlash(RuntimeError("no kernel for this GPU"))
    with caplog.at_level(logging.WARNING, "millrace.kernels.paged_attention.library"):
        failed = generate(tiny_model("llama"), PromptLibrary(flash), monkeypatch)
    assert failed == generate(tiny_model("llama"), None, monkeypatch)
    assert flash.num_calls == len(caplog.records) == 1 and "no kernel for this GPU" in caplog.text


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "settings"),
    [
        (GPU, torch.bfloat16, 128, {"is_used": False}),
        (torch.device("cpu"), torch.bfloat16, 128, {}),
        (torch.device("meta"), torch.bfloat16, 128, {}),
        (GPU, torch.float32, 128, {}),
        (GPU, torch.bfloat16, 512, {}),
        (GPU, torch.bfloat16, 100, {}),
        (GPU, torch.bfloat16, 128, {"softcap": 50.0}),
        (GPU, torch.bfloat16, 128, {"sinks": True}),
        (GPU, torch.bfloat16, 128, {"causal": False}),
        (GPU, torch.bfloat16, 128, {"deterministic": True}),
    ],
)
def test_what_the_library_cannot_do_is_not_given_to_it(device: Any, dtype: Any, head_dim: int, settings: Any) -> None:
    assert PromptLibrary.choose(GPU, torch.bfloat16, 128, is_used=True) is not None
    assert PromptLibrary.choose(device, dtype, head_dim, **{"is_used": True, **settings}) is None


def test_an_8_bit_cache_is_not_given_to_it() -> None:
    query, cache = torch.zeros(3, 2, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 4, 8, dtype=torch.float8_e4m3fn)
    flash = PlainFlash()
    slots, starts = torch.arange(3), torch.tensor([0, 3], dtype=torch.int32)
    assert PromptLibrary(flash).attend(query, (cache, cache), slots, starts, 3, 1.0) is None
    assert not flash.num_calls
