"""A GGUF file runs like the checkpoint that it was made from, and like transformers' own reading of the file."""

from __future__ import annotations

import json
import logging
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gguf")

from transformers import AutoConfig

from checkpoints import CHAT_TEMPLATE, CORPUS, tiny_checkpoint, tiny_tokenizer
from gguf_files import MIXED, read_with_transformers, write_gguf
from millrace.engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from millrace.engine.gguf.architectures import ARCHITECTURES
from millrace.engine.gguf.config import config_fields
from millrace.engine.gguf.header import read_headers
from millrace.engine.gguf.pre_tokenizers import find_pre_tokenizer
from millrace.engine.gguf.tokenizer import tokenizer_files
from millrace.engine.llm import LLM
from millrace.engine.loading.model_source import locate_model, resolve_model, resolve_tokenizer
from millrace.engine.models import Decoder, load_hf_config, load_model
from millrace.engine.models.spec import AttentionSpec, RopeSpec
from millrace.engine.parallel.context import ParallelContext
from millrace.engine.storage import Location
from millrace.engine.text.tokenizer import Tokenizer as OurTokenizer
from millrace.engine.weights.model_slots import weight_slots
from paged import SCHEDULES, PagedSequences, random_sequences
from s3 import CREDENTIALS, S3Server

NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
    "qwen2": NO_WINDOW,
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3": {"query_pre_attn_scalar": 32, "layer_types": None, "rope_parameters": GEMMA3_ROPE},
    "granite": {},
    "smollm3": {"use_sliding_window": False, "no_rope_layers": None, "num_hidden_layers": 5, "mlp_bias": False},
    "olmo2": {"attention_bias": False},
    "phi3": {"original_max_position_embeddings": 16},
    "starcoder2": {"sliding_window": None},
}
"""Architecture -> fields of its tiny config; what a file of it cannot hold has the default."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, tiny_checkpoint(folder, request.param, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


def load(model: Path, **kwargs: Any) -> Decoder:
    config = load_hf_config(resolve_model(str(model)))
    return load_model(locate_model(str(model)), config, torch.float32, "cpu", **kwargs)


def read_header_files(file: Path) -> None:
    """Makes everything that is made from the header of a file."""
    header = read_headers([Location.at(file)])
    config_fields(header)
    tokenizer_files(header)


def assert_near(ours: Any, theirs: Any, name: str) -> None:
    """Compares a field of two specs; a file has the nearest float32 of a number."""
    if isinstance(ours, RopeSpec) and isinstance(theirs, RopeSpec):
        for field in fields(ours):
            assert_near(getattr(ours, field.name), getattr(theirs, field.name), f"{name}.{field.name}")
    elif isinstance(ours, AttentionSpec):
        assert replace(ours, scale=None) == replace(theirs, scale=None)
        assert ours.scale == pytest.approx(theirs.scale)
    elif isinstance(ours, tuple) and ours and isinstance(ours[0], RopeSpec):
        for one, other in zip(ours, theirs, strict=True):
            assert_near(one, other, name)
    elif isinstance(ours, float) or (isinstance(ours, tuple) and all(isinstance(one, float) for one in ours)):
        assert ours == pytest.approx(theirs), name
    else:
        assert ours == theirs, name


def test_the_weights_are_those_of_the_checkpoint(made: tuple[str, Path], tmp_path: Path) -> None:
    architecture, folder = made
    file = write_gguf(folder, tmp_path / "model.gguf", architecture)
    ours, theirs = load(file), load(folder)
    for field in fields(ours.spec):
        assert_near(getattr(ours.spec, field.name), getattr(theirs.spec, field.name), field.name)
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0, msg=name)


# transformers reads no files of the others; and of Phi 3 it changes the positions with the length of a sequence.
@pytest.mark.parametrize("made", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "starcoder2"], indirect=True)
def test_blocks_have_the_numbers_that_transformers_reads(made: tuple[str, Path], tmp_path: Path) -> None:
    architecture, folder = made
    file = write_gguf(folder, tmp_path / "model.gguf", architecture, MIXED)
    reference = read_with_transformers(file, AutoConfig.from_pretrained(folder))
    sequences = random_sequences()
    logits = PagedSequences(load(file), sequences, torch.float32).run(SCHEDULES["mixed"]())
    for ours, tokens in zip(logits, sequences, strict=True):
        theirs = reference(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(ours.log_softmax(-1), theirs.detach().log_softmax(-1), atol=1e-4, rtol=0)


def test_each_rank_reads_its_part(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf", "llama", MIXED)
    whole = {name: slot.targets[0] for name, slot in weight_slots(load(file)).items()}
    for rank in range(4):
        part = load(file, parallel=ParallelContext.of_rank(rank, 2, 2))
        for name, slot in weight_slots(part).items():
            assert torch.equal(slot.targets[0], slot.cut(whole[name])), name


def test_a_file_alone_generates_and_chats(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf", "llama")
    settings = {"dtype": "float32", "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 20}
    texts, chat = [], [{"role": "user", "content": "Größe of 水車 1234?"}]
    with caplog.at_level(logging.INFO, "millrace"):
        for model in (llama, file, tmp_path):
            with LLM(str(model), **settings) as llm:
                params = llm.get_default_sampling_params().clone()
                params.temperature, params.max_tokens = 0, 8
                (output,) = llm.chat(chat, params, use_tqdm=False)
                texts.append((output.prompt_token_ids, output.outputs[0].token_ids))
    assert texts[0] == texts[1] == texts[2]
    assert "dequantised to float32 as they are read" in caplog.text


def test_the_tokenizer_is_that_of_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "model.gguf", "llama", metadata={"tokenizer.ggml.add_bos_token": True})
    ours, theirs = OurTokenizer(resolve_tokenizer(str(file))), tiny_tokenizer()
    for text in ("Pack my box: 12 345", "Größe, naïve, 水車 🙂", "  two  spaces\n\n", "a</s>b<s>"):
        ids = theirs(text)["input_ids"]
        assert ours.encode_batch([text], add_special_tokens=False) == [ids]
        assert ours.encode_batch([text]) == [[1, *ids]]
        assert ours.decode_ids(ids, skip_special_tokens=False) == text
        assert ours.decode_ids(ids) == text.replace("</s>", "").replace("<s>", "")
    assert (ours.eos_token_id, ours.hf.chat_template) == (2, CHAT_TEMPLATE)
    assert ours.special_tokens == {"<s>", "</s>", "<|endoftext|>"}


def test_scores_give_the_merges_of_a_vocabulary_of_sentencepiece(llama: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    reference = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    reference.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    reference.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    reference.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=384, special_tokens=names, show_progress=False)
    )
    tokens = sorted(vocab := reference.get_vocab(), key=vocab.__getitem__)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = OurTokenizer(resolve_tokenizer(str(write_gguf(llama, tmp_path / "m.gguf", "llama", metadata=metadata))))
    plain = Tokenizer(models.BPE(vocab, _merges(reference), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    plain.normalizer, plain.decoder = reference.normalizer, reference.decoder
    plain.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>")])
    for text in (*CORPUS, "  two  spaces", "unseen: ж 水", "a</s>b c", "a</s>\n b"):
        ids = plain.encode(text).ids
        assert ours.encode_batch([text]) == [[1, *ids]], text
        assert ours.decode_ids(ids) == plain.decode(ids)
    phi = tiny_checkpoint(tmp_path / "phi", "phi3", original_max_position_embeddings=16)
    file = write_gguf(phi, tmp_path / "phi.gguf", "phi3", metadata=metadata)
    ours = OurTokenizer(resolve_tokenizer(str(file)))
    assert ours.encode_batch(["a</s>\n b", "a<s> b"]) == [[1, *plain.encode(text).ids] for text in ("a</s>b", "a<s> b")]


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'm 123!", ["I", "'m", "Ġ123", "!"]),
        ("smollm", "I'm 123!", ["I", "'m", "Ġ", "1", "2", "3", "!"]),
        ("qwen2", "I'M 123!\n", ["I", "'M", "Ġ", "1", "2", "3", "!Ċ"]),
        ("llama-bpe", "I'M 1234!\n", ["I", "'M", "Ġ", "123", "4", "!Ċ"]),
        ("tekken", "aB 12/\n", ["a", "B", "Ġ", "1", "2", "/Ċ"]),
        ("gpt-4o", "aB's 1234", ["a", "B's", "Ġ", "123", "4"]),
    ],
)
def test_a_text_is_cut_into_the_words_of_its_vocabulary(pre: str, text: str, words: list[str]) -> None:
    assert [word for word, _ in find_pre_tokenizer(pre).make().pre_tokenize_str(text)] == words


def test_what_ends_an_output_and_what_the_file_recommends(llama: Path, tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 7, "general.sampling.temp": 0.5, "general.sampling.top_k": 9}
    file = write_gguf(llama, tmp_path / "m.gguf", "llama", metadata=metadata)
    content = json.loads((resolve_model(str(file)) / "generation_config.json").read_text())
    assert content == {"eos_token_id": [2, 7], "temperature": 0.5, "top_k": 9}


ROPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    ),
]


@pytest.mark.parametrize(("given", "expected"), ROPES)
def test_the_scaling_of_positions_is_read(
    llama: Path, tmp_path: Path, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    metadata = {f"llama.{key}": value for key, value in given.items()}
    file = write_gguf(llama, tmp_path / "m.gguf", "llama", metadata=metadata)
    parameters = load_hf_config(resolve_model(str(file))).rope_parameters
    assert expected.items() <= parameters.items()
    assert parameters["rope_theta"] == 10000.0


def test_the_factors_of_llama_3_are_recognised(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    values = {"head_dim": 128, "rope_parameters": {**rope, "original_max_position_embeddings": 8192}}
    folder = tiny_checkpoint(tmp_path / "m", "llama", **values)
    expected = load(folder).spec.rope
    plain = 1 / 5e5 ** (np.arange(64) / 64)
    factors = (plain / np.array(expected.inv_freq)).astype(np.float32)
    file = write_gguf(folder, tmp_path / "m.gguf", "llama", edit=lambda t: t.update({"rope_freqs.weight": factors}))
    assert np.allclose(load(file).spec.rope.inv_freq, expected.inv_freq, rtol=1e-6)
    other = factors.copy()
    other[40] *= 1.1
    file = write_gguf(folder, tmp_path / "n.gguf", "llama", edit=lambda t: t.update({"rope_freqs.weight": other}))
    with pytest.raises(UnsupportedModelError, match="rope_freqs are not those of Llama"):
        load(file)


def test_a_model_in_several_files_is_read_from_any_of_them(llama: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]

    def keep(part: int) -> Callable[[dict[str, np.ndarray]], None]:
        def edit(tensors: dict[str, np.ndarray]) -> None:
            for name in [name for i, name in enumerate(list(tensors)) if i % 2 != part]:
                del tensors[name]

        return edit

    for part, file in enumerate(parts):
        write_gguf(llama, file, "llama", edit=keep(part))
    expected = load(llama)
    for model in (tmp_path, *parts):
        for one, other in zip(load(model).parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"one of 00002 files; these are missing: m-00002-of-00002\.gguf"):
        load(tmp_path)


def test_a_folder_of_several_models_asks_for_one(llama: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(llama, tmp_path / name, "llama")
    with pytest.raises(ConfigError, match=r"several GGUF files; name one of them as .*/FILE: a\.gguf, b\.gguf"):
        resolve_model(str(tmp_path))
    assert resolve_model(str(tmp_path / "a.gguf")).is_dir()


def test_a_file_behind_a_url_is_read(
    llama: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(llama, tmp_path / "m.gguf", "llama", MIXED)
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3.url}.items():
        monkeypatch.setenv(name, value)
    folder = Location.at(f"s3://{s3.make_bucket()}/models")
    (folder / "m.gguf").write_bytes(file.read_bytes())
    expected = load(file)
    for url in (folder.url, f"{folder.url}/m.gguf"):
        assert (resolve_tokenizer(url) / "tokenizer.json").exists()
        config = load_hf_config(resolve_model(url))
        model = load_model(locate_model(url), config, torch.float32, "cpu")
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, other)


Edit = Callable[[dict[str, np.ndarray]], object]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"missing blk\.1\.ffn_up\.weight; unexpected none"),
        (
            lambda t: t.update({"blk.0.router.weight": np.ones((2, 2), np.float32)}),
            r"unexpected blk\.0\.router\.weight",
        ),
        (
            lambda t: t.update({"blk.0.ffn_up.weight": np.ones((95, 64), np.float32)}),
            r"blk\.0\.ffn_up\.weight has shape \[95, 64\] in the checkpoint, and config.json asks for \[96, 64\]",
        ),
        (lambda t: t.update({"blk.0.attn_q.weight": np.ones((63, 64), np.float32)}), r"attn_q.* shape \[63, 64\]"),
    ],
    ids=["missing", "extra", "misshapen", "heads"],
)
def test_tensors_that_do_not_match_are_named(llama: Path, tmp_path: Path, edit: Edit, message: str) -> None:
    file = write_gguf(llama, tmp_path / "m.gguf", "llama", edit=edit)
    with pytest.raises(CheckpointError, match=message):
        load(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, r"llama\.expert_count is 8, which is not implemented"),
        ({"llama.attention.clamp_kqv": 2.0}, r"llama\.attention\.clamp_kqv is 2\.0"),
        ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type is 'longrope'"),
        ({"llama.attention.value_length": 8}, "value_length 8; they must be equal"),
        ({"llama.block_count": None}, r"lacks llama\.block_count"),
        (
            {"tokenizer.ggml.pre": "poro-chat"},
            r"tokenizer\.ggml\.pre is 'poro-chat'; these are implemented: .*llama-bpe",
        ),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model is 'bert'"),
        ({"tokenizer.ggml.eos_token_id": 999}, r"eos_token_id is 999, which is no token"),
    ],
)
def test_metadata_that_is_not_implemented_is_named(
    llama: Path, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    file = write_gguf(llama, tmp_path / "m.gguf", "llama", metadata=metadata)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=message):
        read_header_files(file)


def test_an_architecture_that_is_not_there_is_named(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "m.gguf", "baichuan")
    with pytest.raises(UnsupportedModelError, match=r"general\.architecture is 'baichuan'; .*: gemma, gemma2,"):
        resolve_model(str(file))


def test_any_damage_to_a_header_is_refused_or_harmless(llama: Path, tmp_path: Path) -> None:
    content = write_gguf(llama, tmp_path / "m.gguf", "llama").read_bytes()
    end = content.index(b"output_norm.weight") + 100
    draw = random.Random(0)
    file = tmp_path / "damaged.gguf"
    messages = []
    for trial in range(300):
        damaged = bytearray(content)
        if trial % 3 == 0:
            del damaged[draw.randrange(end) :]
        elif trial % 3 == 1:
            damaged[draw.randrange(end)] ^= 1 << draw.randrange(8)
        else:
            at = draw.randrange(4, end)
            damaged[at : at + 8] = struct.pack("<Q", draw.choice([2**63, 2**40, 2**32 - 1, 0]))
        file.write_bytes(damaged)
        try:
            read_header_files(file)
        except (CheckpointError, UnsupportedModelError) as error:
            messages.append(str(error))
    assert len(messages) > 150
    assert all(str(file) in message and len(message) < 1000 for message in messages)


def test_a_file_that_ends_early_is_named(llama: Path, tmp_path: Path) -> None:
    file = write_gguf(llama, tmp_path / "m.gguf", "llama")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"m\.gguf is truncated, damaged .* ends at byte \d+ of \d+"):
        load(file)


def test_without_the_package_an_error_says_what_to_install(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(llama, tmp_path / "m.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(ConfigError, match=r"pip install 'millrace\[gguf\]'"):
        resolve_model(str(file))
