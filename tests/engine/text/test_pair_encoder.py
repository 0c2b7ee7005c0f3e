"""`PairEncoder`: pairs have the tokens that the tokenizer gives each pair by itself, and each text is read once."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from checkpoints import CORPUS
from millrace.engine.errors import PromptTypeError
from millrace.engine.text.pair_encoder import PairEncoder

BERT = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
ROBERTA = ["<pad>", "<s>", "</s>", "<unk>"]
TYPES = ["input_ids", "token_type_ids", "attention_mask"]

QUERY = "Where does the mill's water go?"
DOCUMENTS = [*CORPUS, "", " ", "a", "[SEP] is </s> no text [CLS]", QUERY, "the race " * 40]
PAIRS = [(QUERY, document) for document in DOCUMENTS] + [
    ("", ""),
    ("a", ""),
    ("", "a"),
    *zip(CORPUS, CORPUS[::-1], strict=True),
]


def template(single: str, pair: str, names: list[str]) -> processors.TemplateProcessing:
    special = [(name, index) for index, name in enumerate(names)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def word_piece(names: list[str]) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return made, trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False)


def byte_bpe(names: list[str]) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(
        vocab_size=320, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )


def unigram(names: list[str]) -> tuple[Tokenizer, Any]:
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    unk = names[-1]
    return made, trainers.UnigramTrainer(vocab_size=120, special_tokens=names, unk_token=unk, show_progress=False)


def build(kind: Any, names: list[str], processor: Any, input_names: list[str] = TYPES, **options: Any) -> Any:
    made, trainer = kind(names)
    made.train_from_iterator([*CORPUS, QUERY], trainer)
    if processor is not None:
        made.post_processor = processor
    pad, cls, sep, unk = names
    special = {"pad_token": pad, "cls_token": cls, "sep_token": sep, "unk_token": unk}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=input_names, **special, **options)


BERT_PAIR = "[CLS] $A [SEP] $B:1 [SEP]:1"
TOKENIZERS = {
    "bert": lambda: build(word_piece, BERT, template("[CLS] $A [SEP]", BERT_PAIR, BERT)),
    "old-bert": lambda: build(word_piece, BERT, processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))),
    "left-bert": lambda: build(word_piece, BERT, template("[CLS] $A [SEP]", BERT_PAIR, BERT), truncation_side="left"),
    "roberta": lambda: build(byte_bpe, ROBERTA, processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), TYPES[::2]),
    "xlm-r": lambda: build(unigram, ROBERTA, template("<s> $A </s>", "<s> $A </s> </s> $B </s>", ROBERTA), TYPES[::2]),
    "modernbert": lambda: build(
        byte_bpe, BERT, template("[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", BERT), TYPES[::2]
    ),
    "deberta-v2": lambda: build(unigram, BERT, template("[CLS] $A [SEP]", BERT_PAIR, BERT)),
    "qwen": lambda: build(byte_bpe, ROBERTA, processors.ByteLevel(trim_offsets=False), TYPES[::2]),
    "llama": lambda: build(byte_bpe, ROBERTA, template("<s> $A", "<s> $A <s>:1 $B:1", ROBERTA), TYPES[::2]),
    "one type": lambda: build(byte_bpe, ROBERTA, template("<s> $A", "<s> $A </s> $B", ROBERTA)),
}
WITH_TYPES = ("bert", "old-bert", "left-bert", "deberta-v2")


def own(hf: Any, pair: tuple[str, str], cut: int | None) -> tuple[list[int], int | None]:
    """Returns the tokens that Hugging Face gives a pair, and the number of those of type 0 if any has type 1."""
    options = {} if cut is None else {"truncation": "longest_first", "max_length": cut}
    encoded = hf([pair[0]], [pair[1]], return_token_type_ids=True, **options)
    types = encoded["token_type_ids"][0] if "token_type_ids" in hf.model_input_names else [0]
    return encoded["input_ids"][0], types.count(0) if 1 in types else None


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("cut", [None, 512, 30, 29, 13, 12, 5])
def test_pairs_have_the_tokens_of_the_tokenizer(name, cut):
    hf = TOKENIZERS[name]()
    got = PairEncoder(hf).encode(PAIRS, cut)
    assert [(one.token_ids, one.num_first_tokens) for one in got] == [own(hf, pair, cut) for pair in PAIRS]
    assert (name in WITH_TYPES) == (got[0].num_first_tokens is not None)


def test_a_text_of_many_pairs_is_tokenised_once(monkeypatch):
    hf = TOKENIZERS["bert"]()
    encoder, expected = PairEncoder(hf), [own(hf, pair, None) for pair in PAIRS]
    encoder.encode(PAIRS[:1])
    hf.backend_tokenizer.enable_truncation(8)  # As another call of the tokenizer may have left it.
    hf.backend_tokenizer.enable_padding(length=16)
    encode, read = PairEncoder._encode_texts, []
    monkeypatch.setattr(PairEncoder, "_encode_texts", lambda self, texts: read.append(texts) or encode(self, texts))
    got = encoder.encode(PAIRS)
    assert [(one.token_ids, one.num_first_tokens) for one in got] == expected
    assert sorted(read[0]) == sorted({side for pair in PAIRS for side in pair}) and len(read) == 1


def test_token_ids_are_sides_too():
    hf = TOKENIZERS["bert"]()
    ids = hf(QUERY, add_special_tokens=False)["input_ids"]
    encoder = PairEncoder(hf)
    assert encoder.encode([(ids, "a")]) == encoder.encode([(QUERY, "a")])
    assert encoder.encode([]) == []


@pytest.mark.parametrize("make", [CanineTokenizer, lambda: build(byte_bpe, BERT, template("$A", "$B [SEP] $A", BERT))])
@pytest.mark.parametrize("cut", [None, 13])
def test_a_tokenizer_that_makes_pairs_in_another_way_encodes_each_pair(make, cut):
    hf = make()
    got = PairEncoder(hf).encode(PAIRS, cut)
    assert [(one.token_ids, one.num_first_tokens) for one in got] == [own(hf, pair, cut) for pair in PAIRS]
    with pytest.raises(PromptTypeError, match="joins only texts"):
        PairEncoder(hf).encode([([5, 6], "a")])
    assert PairEncoder(hf).encode([]) == []


def test_token_types_that_no_model_here_can_read_are_refused():
    hf = build(word_piece, BERT, template("[CLS] $A [SEP]", "[CLS]:2 $A:0 $B:1", BERT))
    with pytest.raises(PromptTypeError, match=r"token types are 0, then 1; .* \[0, 1, 2\]"):
        PairEncoder(hf).encode(PAIRS)
