"""Runs the engine in a script: texts and token ids, several answers, log-probabilities, a prompt that fails alone.

    python examples/generate.py [MODEL]

MODEL is a folder in Hugging Face's layout; the default is the small model that ships with Millrace.
"""

import sys

from millrace import LLM, Logprob, SamplingParams

LINE = "Inv #4821 - due 3 March '24 - total USD 1,204.50"


def chosen_logprob(step: dict[int, Logprob]) -> float:
    """Returns the log-probability of the drawn token, which comes first in the dict."""
    return next(iter(step.values())).logprob


def main() -> None:
    """Generates in several ways and prints the outputs."""
    model = sys.argv[1] if len(sys.argv) > 1 else "bundled:invoices"
    with LLM(model=model, seed=0) as llm:
        tokenizer = llm.get_tokenizer()
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": LINE}], tokenize=False, add_generation_prompt=True
        )
        greedy = SamplingParams(temperature=0.0, max_tokens=64, logprobs=2)
        sampled = SamplingParams(temperature=1.0, max_tokens=64, n=3)

        print("The answer:")
        (output,) = llm.generate(text, greedy)
        print(" ", output.outputs[0].text)

        print("Its least certain token:")
        for choice in min(output.outputs[0].logprobs, key=chosen_logprob).values():
            print(f"  {choice.decoded_token!r}: {choice.logprob:.4f}, rank {choice.rank}")

        print("Three samples of the same prompt, given as token ids:")
        (output,) = llm.generate({"prompt_token_ids": output.prompt_token_ids}, sampled)
        for completion in output.outputs:
            print(f"  {completion.index}: {completion.text} ({completion.finish_reason})")

        print("A prompt that is empty, beside one that is not:")
        for output in llm.generate(["", text], greedy, on_error="return"):
            print(" ", output.error or output.outputs[0].text)


if __name__ == "__main__":
    main()
