"""The tokenizer of the invoice model: byte-level BPE in which every digit is a token of its own.

So a number has the same tokens in every place, and the model learns easily to copy it. The fixed pieces of the
answer (`{"invoice": "` and so on) are kept whole, so that an answer is short.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
SKELETON = r'\{"invoice": "|", "(?:date|amount|currency)": "|"\}'
PIECES = SKELETON + r"|\d|\n| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learns the merges from texts and wraps the result for transformers.

    Args:
        texts: Whole conversations, prompt and answer.
        vocab_size: Number of all tokens: special tokens, the 256 bytes and the merges.
        max_length: Most tokens of a sequence of the model.

    Returns:
        A tokenizer that encodes any string and carries the chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def prompt_text(tokenizer: PreTrainedTokenizerFast, line: str) -> str:
    """Returns the text of a conversation up to the beginning of the model's answer."""
    messages = [{"role": "user", "content": line}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
