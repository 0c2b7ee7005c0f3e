"""A script written for vLLM's `LLM` runs with nothing but its import changed."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
from vllm import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model=MODEL, dtype="auto", gpu_memory_utilization=0.9, tensor_parallel_size=1, trust_remote_code=False)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    print(f"Prompt: {output.prompt!r}, Generated: {output.outputs[0].text!r}")

token_ids = [llm.get_tokenizer().encode(prompt) for prompt in prompts]
outputs = llm.generate([{"prompt_token_ids": ids} for ids in token_ids], sampling_params)
outputs += llm.generate(token_ids, [SamplingParams(temperature=0.0, max_tokens=4)] * 3)
assert [output.prompt_token_ids for output in outputs] == token_ids * 2
assert all(output.finished for output in outputs)

sampling_params = SamplingParams(n=3, temperature=0.9, max_tokens=5, logprobs=5, prompt_logprobs=5)
for output in llm.generate(["Once upon a time"], sampling_params, use_tqdm=False):
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for completion in output.outputs:
        assert completion.finish_reason in ("length", "stop")
        assert completion.cumulative_logprob < 0
        for token_id, entry in zip(completion.token_ids, completion.logprobs):
            assert entry[token_id].logprob <= 0 and entry[token_id].rank >= 1 and len(entry) in (5, 6)

messages_list = [
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    [{"role": "user", "content": "Explain quantum computing in simple terms."}],
]
for output in llm.chat(messages_list, SamplingParams(temperature=0.7, top_p=0.9)):
    print(f"Response: {output.outputs[0].text}")
print("done")
"""


@pytest.mark.parametrize("family", ["opt", "qwen3"])
def test_only_the_import_changes(family, tiny_model, tmp_path):
    script = tmp_path / "script.py"
    changed = SCRIPT.replace("from vllm import", "from millrace import").replace("MODEL", repr(str(tiny_model(family))))
    script.write_text(changed)
    done = subprocess.run([sys.executable, "-P", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Prompt:") == 3 and done.stdout.endswith("done\n")
    assert "Processed prompts: 100%" in done.stderr and "toks/s" in done.stderr
