"""Trains the invoice model from nothing: makes the text, the tokenizer and the model, and measures it.

    python examples/invoices/train.py --out examples/invoices/model

Everything is drawn from seeds, so a second run sees the same lines in the same order. The lines that measure the model
come from layouts that training never uses (see `lines.is_held_out`).
"""

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from greedy import evaluate
from lines import TOKENIZER_SEED, TRAIN_SEED, VALIDATION_SEED, Sample, answer_text, stream
from tokenizer import END, prompt_text, train_tokenizer

WEIGHT_SEED = 4
VOCAB_SIZE, MAX_LENGTH = 1024, 512
WARMUP, WEIGHT_DECAY, IGNORED = 200, 0.05, -100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Trains the tokenizer on conversations in the form that the model reads."""

    def conversation(sample: Sample) -> str:
        return f"<|im_start|>user\n{sample.line}{END}\n<|im_start|>assistant\n{answer_text(sample.answer)}"

    texts = (conversation(sample) for sample in islice(stream(TOKENIZER_SEED, held_out=False), 60_000))
    return train_tokenizer(texts, VOCAB_SIZE, MAX_LENGTH)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Makes the untrained model: six layers of the Qwen3 shape."""
    torch.manual_seed(WEIGHT_SEED)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=True,
    )
    return Qwen3ForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches of token ids and labels without end; samples of similar length share a batch.

    Args:
        tokenizer: Turns conversations into ids.
        rows: The number of samples in a batch.
    """
    samples = stream(TRAIN_SEED, held_out=False)
    shuffle = torch.Generator().manual_seed(TRAIN_SEED)
    while True:
        encoded = sorted(encode(tokenizer, list(islice(samples, 64 * rows))), key=lambda pair: len(pair[0]))
        for batch in torch.randperm(64, generator=shuffle).tolist():
            yield collate(encoded[batch * rows : (batch + 1) * rows], tokenizer.pad_token_id)


def encode(tokenizer: PreTrainedTokenizerFast, samples: list[Sample]) -> list[tuple[list[int], int]]:
    """Returns each sample's token ids and the number of its prompt tokens."""
    prompts = tokenizer([prompt_text(tokenizer, sample.line) for sample in samples])["input_ids"]
    answers = tokenizer([answer_text(sample.answer) + END for sample in samples])["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def collate(pairs: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads on the right; labels are the ids of the answers, and IGNORED elsewhere."""
    longest = max(len(ids) for ids, _ in pairs)
    ids = torch.full((len(pairs), longest), pad)
    labels = torch.full((len(pairs), longest), IGNORED)
    for row, (sequence, prompt) in enumerate(pairs):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        labels[row, prompt : len(sequence)] = ids[row, prompt : len(sequence)]
    return ids, labels


def answer_loss(body: nn.Module, head: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss over the answers' tokens, from the model's layers (`body`) and its output matrix (`head`).

    Padding is on the right, and a causal model reads only to the left, so no attention mask is needed. Logits are
    computed only at positions with a label.
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = body(ids[:, :-1], use_cache=False).last_hidden_state
        logits = head(hidden[wanted])
    return functional.cross_entropy(logits.float(), targets[wanted])


def rate(step: int, steps: int, peak: float) -> float:
    """Returns the learning rate: a linear rise, then half a cosine down to zero."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    return peak / 2 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def fit(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: argparse.Namespace, checkpoint: Path
) -> None:
    """Runs the training loop, printing the loss, the held-out accuracy and the time to go.

    Args:
        model: Trained in place.
        tokenizer: Its tokenizer.
        plan: The number of `steps`, the `rows` in a step, the highest `rate`, and whether to run `compiled`.
        checkpoint: File that is written every 250 steps; a run that finds it continues from it.
    """
    body = torch.compile(model.model, dynamic=True) if plan.compiled else model.model
    optimizer = make_optimizer(model)
    first = restore(checkpoint, model, optimizer)
    validation = validation_samples(256)
    began, losses = time.monotonic(), []
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, plan.rows), first, plan.steps), first):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, plan.steps, plan.rate)
        model.train()
        loss = answer_loss(body, model.lm_head, ids, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            left = (time.monotonic() - began) / len(losses) * (plan.steps - done) / 60
            print(
                f"step {done:5}  loss {sum(losses[-50:]) / len(losses[-50:]):.4f}  {left:5.1f} minutes left", flush=True
            )
        if done % 250 == 0:
            torch.save({"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
        if done % 500 == 0:
            print("  held out:", shares(evaluate(model, tokenizer, validation)), flush=True)


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads the checkpoint, if there is one, and returns the step to begin with."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW with weight decay on the matrices, and none on the norms' vectors."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def validation_samples(count: int) -> list[Sample]:
    """Returns lines in layouts that training never uses; none of them is a line of the bundled job."""
    return list(islice(stream(VALIDATION_SEED, held_out=True), count))


def shares(result: dict[str, float]) -> str:
    """Returns accuracies as text."""
    return "  ".join(f"{name} {share:.2%}" for name, share in result.items())


def main() -> None:
    """Trains the model, saves it in bfloat16, and measures the saved weights in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("invoices-checkpoint.pt"), help="to go on from, if there"
    )
    parser.add_argument("--steps", type=int, default=5600)
    parser.add_argument("--rows", type=int, default=64, help="samples in a step")
    parser.add_argument("--rate", type=float, default=2.5e-3, help="highest learning rate")
    parser.add_argument("--eager", dest="compiled", action="store_false", help="without torch.compile")
    arguments = parser.parse_args()
    began = time.monotonic()
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {torch.get_num_threads()} threads")
    fit(model, tokenizer, arguments, arguments.checkpoint)
    minutes = (time.monotonic() - began) / 60
    save(model, tokenizer, arguments.out)
    arguments.checkpoint.unlink(missing_ok=True)
    print(f"trained in {minutes:.1f} minutes")
    for dtype in (torch.float32, torch.bfloat16):
        saved = Qwen3ForCausalLM.from_pretrained(arguments.out, dtype=dtype)
        print(dtype, shares(evaluate(saved, tokenizer, validation_samples(2000))), flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes weights in bfloat16, configuration and tokenizer in the form that transformers loads."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
