"""Times the experts of a layer on a CPU against a loop over experts in torch and transformers' grouped products.

    python benchmarks/experts.py [--threads 2] [--tokens 1 64 512] [--repeats 9]

One JSON line for each model, dtype and number of tokens. The variants take turns in one process. `share_of_limit` is
the time to read the weights of the chosen experts at the bandwidth that is measured in the same run, over the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from limits import device_name
from millrace.kernels import experts
from timing import time_calls


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a layer of experts.

    Attributes:
        name: Name of a model that has them.
        num_experts: Experts of the layer.
        num_choices: Experts of a token.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of an expert.
    """

    name: str
    num_experts: int
    num_choices: int
    hidden_size: int
    intermediate_size: int


MODELS = (Model("OLMoE-1B-7B", 64, 8, 2048, 1024), Model("Qwen3-30B-A3B, 64 experts", 64, 8, 2048, 768))
TINY_MODELS = (Model("tiny", 4, 2, 64, 32),)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(model: Model, num_tokens: int, dtype: torch.dtype) -> Inputs:
    """Draws hidden states, weights, and the best experts of random scores."""
    width, inner = model.hidden_size, model.intermediate_size
    w13 = torch.empty(model.num_experts, 2 * inner, width, dtype=dtype).normal_(std=width**-0.5)
    w2 = torch.empty(model.num_experts, width, inner, dtype=dtype).normal_(std=inner**-0.5)
    weights, ids = torch.randn(num_tokens, model.num_experts).softmax(-1).topk(model.num_choices)
    return torch.randn(num_tokens, width, dtype=dtype), w13, w2, ids.to(torch.int32), weights


def loop(hidden: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Runs the chosen experts one after the other."""
    out = torch.zeros_like(hidden)
    for expert in expert_ids.unique().tolist():
        token, choice = torch.where(expert_ids == expert)
        gate, up = F.linear(hidden[token], w13[expert]).chunk(2, dim=-1)
        result = F.linear(F.silu(gate) * up, w2[expert])
        out.index_add_(0, token, (result * weights[token, choice, None]).to(out.dtype))
    return out


def grouped_module(w13: Tensor, w2: Tensor) -> nn.Module:
    """Returns transformers' experts, which multiply all groups in one call, over given weights."""
    sizes: dict[str, Any] = {"num_local_experts": len(w13), "hidden_size": w2.shape[1]}
    sizes |= {"intermediate_size": w2.shape[2], "experts_implementation": "grouped_mm"}
    with torch.device("meta"):
        module = MixtralExperts(MixtralConfig(**sizes))
    module.load_state_dict({"gate_up_proj": w13, "down_proj": w2}, assign=True)
    return module


def variants(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Returns the three ways to compute the same result."""
    hidden, w13, w2, expert_ids, weights = inputs
    grouped, long_ids = grouped_module(w13, w2), expert_ids.long()
    return {
        "op": lambda: experts(*inputs, gate="silu"),
        "loop": lambda: loop(*inputs),
        "grouped": lambda: grouped(hidden, long_ids, weights),
    }


def read_bytes_per_s(num_bytes: int) -> float:
    """Measures the bandwidth of a sum over memory that no cache holds."""
    numbers = torch.ones(num_bytes // 4)
    return num_bytes / min(time_calls({"read": [numbers.sum]}, torch.device("cpu"), 7)["read"])


def measure(model: Model, num_tokens: int, dtype: torch.dtype, bandwidth: float, repeats: int) -> dict[str, Any]:
    """Times one case, and compares its results."""
    inputs = make_inputs(model, num_tokens, dtype)
    calls = variants(inputs)
    results = {name: call().float() for name, call in calls.items()}
    difference = max(float((result - results["op"]).abs().max()) for result in results.values())
    timed = time_calls({name: [call] for name, call in calls.items()}, torch.device("cpu"), repeats)
    seconds = {name: statistics.median(times) for name, times in timed.items()}
    num_chosen = len(inputs[3].unique())
    weight_bytes = num_chosen * 3 * model.hidden_size * model.intermediate_size * dtype.itemsize
    flops = 6 * inputs[3].numel() * model.hidden_size * model.intermediate_size
    return {
        **{f"{name}_ms": round(s * 1e3, 2) for name, s in seconds.items()},
        "times_the_better": round(min(seconds["loop"], seconds["grouped"]) / seconds["op"], 2),
        "share_of_limit": round(weight_bytes / bandwidth / seconds["op"], 3),
        "GFLOP_per_s": round(flops / seconds["op"] / 1e9, 1),
        "largest_difference": round(difference, 6),
    }


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the line of the machine, and one for each case."""
    bandwidth = read_bytes_per_s(1 << 20 if options.tiny else 1 << 30)
    yield {"device": device_name(torch.device("cpu")), "read_GB_per_s": round(bandwidth / 1e9, 1)}
    for model in TINY_MODELS if options.tiny else MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            for num_tokens in options.tokens:
                case = {"model": model.name, "dtype": str(dtype).removeprefix("torch."), "tokens": num_tokens}
                yield case | measure(model, num_tokens, dtype, bandwidth, options.repeats)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it works")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main() -> None:
    """Prints the lines."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for line in lines(options):
        print(json.dumps({"benchmark": "experts", **line}), flush=True)


if __name__ == "__main__":
    main()
