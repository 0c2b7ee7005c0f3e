"""Quantization schemes declare themselves: a scheme is one file, and it chooses layers by their names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints import tiny_checkpoint, tiny_config
from millrace.engine.layers import Linear, LinearBase
from millrace.engine.models import ModelOptions, build_model, options
from millrace.engine.models.linear_factory import LinearFactory
from millrace.engine.quantization import schemes
from millrace.engine.quantization.registry import find_scheme, scheme_names
from millrace.engine.quantization.scheme import LinearSpec, QuantizationScheme
from millrace.engine.quantization.schemes.int8 import Int8Linear, Int8Scheme

TOY = '''"""A scheme for this test: matrices are stored as bytes, and multiplied in the dtype of the activations."""

import torch
from torch import nn

from ...layers import LinearBase, WeightSlot
from ..scheme import QuantizationScheme


class ToyLinear(LinearBase):
    """The checkpoint has one matrix for each block; here the bytes of all of them are one parameter."""

    def __init__(self, layer):
        super().__init__()
        self.blocks = layer.blocks
        shape = (layer.num_rows, layer.num_columns)
        self.qweight = nn.Parameter(torch.empty(shape, dtype=torch.int8, device=layer.device), requires_grad=False)
        self.register_buffer("scales", torch.empty(layer.num_rows, 1, device=layer.device))

    def slots(self):
        first = 0
        for block, rows in self.blocks.items():
            own = slice(first, first := first + rows.length)
            yield f"{block}.weight".lstrip("."), WeightSlot((self.qweight[own], self.scales[own]), self.quantise)

    def quantise(self, rows):
        scales = rows.float().abs().amax(1, keepdim=True) / 127
        return (rows / scales).round(), scales

    def pack(self):
        self.weight, self.qweight = (self.qweight * self.scales), None

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype))


class ToyScheme(QuantizationScheme):
    def check(self, device, dtype):
        pass

    def supports_sizes(self, layer):
        return not layer.bias

    def make_linear(self, layer):
        return ToyLinear(layer)


SCHEME = ToyScheme
'''

RUN = """
import sys
from pathlib import Path
from millrace.engine.quantization import schemes
schemes.__path__.append(sys.argv[1])
from millrace.engine.llm import LLM
from millrace.engine.sampling_params import SamplingParams
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
for name in ("a-toy", None):
    with LLM(sys.argv[2], quantization=name, dtype="float32", max_num_seqs=2) as llm:
        output = llm.generate([list(range(5, 25))], params, use_tqdm=False)[0].outputs[0]
        print(*(entry.logprob for entry in output.logprobs[0].values()))
        model = llm.llm_engine.executor._runner.model
        print(sum(type(module).__name__ == "ToyLinear" for module in model.modules()))
"""


def run_python(code: str, *arguments: str) -> list[str]:
    """Runs code in a process of its own, and returns the lines that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_one_file_is_all_that_a_scheme_takes(tmp_path: Path) -> None:
    (tmp_path / "schemes").mkdir()
    (tmp_path / "schemes" / "a_toy.py").write_text(TOY)
    model = tiny_checkpoint(tmp_path / "model", "llama")
    score, num_layers, plain_score, num_plain = map(float, run_python(RUN, str(tmp_path / "schemes"), str(model)))
    assert score == pytest.approx(plain_score, abs=0.1) and score != plain_score
    assert (num_layers, num_plain) == (8, 0)  # four matrices in each of the two layers


def test_the_names_are_those_of_the_files() -> None:
    (folder,) = map(Path, schemes.__path__)
    assert scheme_names() == sorted(path.stem for path in folder.glob("[!_]*.py"))
    for name in scheme_names():
        assert issubclass(find_scheme(name), QuantizationScheme)


def test_checking_the_name_of_a_scheme_loads_no_torch() -> None:
    code = "import sys; from millrace.engine.config import EngineConfig; EngineConfig(model='m', quantization='int8')"
    assert run_python(f"{code}; print('torch' in sys.modules)") == ["False"]


def test_every_linear_layer_is_made_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, LinearBase] = {}
    parts: list[str] = []

    class Recording(Int8Scheme):
        def applies_to(self, layer: LinearSpec) -> bool:
            return True

        def make_linear(self, layer: LinearSpec) -> Int8Linear:
            parts.extend(layer.part_names)
            made[layer.name] = super().make_linear(layer)
            return made[layer.name]

    monkeypatch.setattr(options, "find_scheme", lambda name: Recording)
    classify = ModelOptions("int8", head="score")
    for config, task in (
        (tiny_config("llama", tie_word_embeddings=False), ModelOptions("int8")),
        (tiny_config("opt-350m", architectures=["OPTForSequenceClassification"]), classify),
    ):
        made.clear()
        model = build_model(config, torch.float32, "cpu", task)
        assert made == {name: module for name, module in model.named_modules() if isinstance(module, LinearBase)}
    assert {"layers.1.attention.qkv.key", "layers.0.mlp.gate_up.up", "layers.0.mlp.down", "lm_head", "score"} <= {
        *parts
    }


def test_a_scheme_chooses_layers_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Ignoring(Int8Scheme):
        def applies_to(self, layer: LinearSpec) -> bool:
            return super().applies_to(layer) and not layer.name.startswith("layers.0.")

    monkeypatch.setattr(options, "find_scheme", lambda name: Ignoring)
    model = build_model(tiny_config("llama"), torch.float32, "cpu", ModelOptions("int8"))
    assert {type(module) for module in linears(model.layers[0])} == {Linear}
    assert {type(module) for module in linears(model.layers[1])} == {Int8Linear}
    assert not caplog.text  # A layer that a scheme is not for is no surprise.


def test_heads_keep_full_precision() -> None:
    factory = LinearFactory(ModelOptions("int8"), torch.float32, torch.device("cpu"))
    kinds = [type(factory.make_linear(name, 16, 16, bias=False)) for name in ("lm_head", "score", "project_in")]
    assert kinds == [Linear, Linear, Int8Linear]


def linears(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, LinearBase)]
