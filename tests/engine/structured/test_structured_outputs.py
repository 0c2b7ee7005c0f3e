"""Outputs follow their schema, expression, choice or grammar, whatever the model would rather say."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from millrace.engine.errors import SamplingParamsError
from millrace.engine.llm import LLM
from millrace.engine.outputs import RequestOutput
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.structured import grammar
from millrace.engine.structured.grammar import Grammars
from millrace.engine.structured.grammar_text import check_compiles, grammar_text
from millrace.engine.structured.params import StructuredOutputsParams
from running import PROMPT

llguidance = pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
pydantic = pytest.importorskip("pydantic")

CAR = {
    "type": "object",
    "properties": {"brand": {"type": "string", "maxLength": 8}, "kind": {"enum": ["sedan", "SUV"]}},
    "required": ["brand", "kind"],
    "additionalProperties": False,
}
COMPACT = {"disable_any_whitespace": True}


@pytest.fixture(scope="module", params=[0, 1], ids=["in turn", "ahead"])
def engine_of(request: pytest.FixtureRequest, tiny_model: Any) -> Iterator[LLM]:
    """An engine that plans after, and one that plans before it reads."""
    with LLM(str(tiny_model("llama")), dtype="float32", max_num_seqs=16, overlap_depth=request.param) as llm:
        yield llm


def generate(llm: LLM, *asked: Any, num_prompts: int = 1, **params: Any) -> list[RequestOutput]:
    """Runs each constraint with a few prompts, drawn at temperature 1."""
    each = [
        SamplingParams(**{"max_tokens": 200, "seed": seed, "structured_outputs": one, **params})
        for one in asked
        for seed in range(num_prompts)
    ]
    outputs = llm.generate([f"{PROMPT} {i}" for i in range(len(each))], each, use_tqdm=False)
    llm.llm_engine.check_integrity()
    return outputs


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [one.text for output in outputs for one in output.outputs if one.finish_reason == "stop"]


# No strings without an end: a model that draws at random would not end them within its limit.
names = st.text('abc_ é"\\', min_size=1, max_size=4)
scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size}, *[st.integers(0, 99)] * 2),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 5)),
    st.builds(
        lambda values: {"enum": values}, st.lists(names | st.integers(-5, 5) | st.none(), min_size=1, max_size=3)
    ),
    st.builds(lambda value: {"const": value}, names),
    st.just({"type": "string", "pattern": "^[a-f]{2}-[0-9]{2}$"}),
)


def objects(parts: st.SearchStrategy) -> st.SearchStrategy:
    def build(properties: dict[str, Any], num_required: int) -> dict[str, Any]:
        required = list(properties)[:num_required]
        return {
            "type": "object", "properties": properties, "required": required, "additionalProperties": False,
        }  # fmt: skip

    return st.builds(build, st.dictionaries(names, parts, max_size=3), st.integers(0, 3))


def arrays(parts: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(lambda part, size: {"type": "array", "items": part, "maxItems": size}, parts, st.integers(0, 2))


schemas = st.recursive(
    scalars,
    lambda parts: (
        objects(parts)
        | arrays(parts)
        | st.builds(lambda some: {"anyOf": some}, st.lists(parts, min_size=1, max_size=2))
    ),
    max_leaves=5,
)
SLOWLY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOWLY
@given(asked=st.lists(schemas, min_size=3, max_size=5))
def test_json_is_valid_under_its_schema(engine_of, asked):
    outputs = generate(engine_of, *({"json": schema, **COMPACT} for schema in asked), num_prompts=2)
    for schema, pair in zip(asked, zip(outputs[::2], outputs[1::2], strict=True), strict=True):
        for text in texts(list(pair)):
            jsonschema.validate(json.loads(text), schema)
    assert len(texts(outputs)) >= len(outputs) / 2, "most of them end"


literals = st.text("abz 0.*é🙂\n", min_size=1, max_size=3).map(re.escape)
expressions = st.recursive(
    literals | st.sampled_from(["[a-f]", "[^a-y]", "[0-9]", ".", "\\s"]),
    lambda parts: (
        st.builds("".join, st.lists(parts, min_size=1, max_size=3))
        | st.builds("(?:{}|{})".format, parts, parts)
        | st.builds("(?:{}){}".format, parts, st.sampled_from(["?", "{0,2}", "{2}", "{1,3}"]))
    ),
    max_leaves=5,
)


@SLOWLY
@given(asked=st.lists(expressions, min_size=3, max_size=5))
def test_text_matches_its_expression(engine_of, asked):
    outputs = generate(engine_of, *({"regex": expression} for expression in asked))
    for expression, output in zip(asked, outputs, strict=True):
        (one,) = output.outputs
        assert one.finish_reason == "stop" and re.fullmatch(expression, one.text), (expression, one.text)


@SLOWLY
@given(choice=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=5))
def test_text_is_one_of_the_choices(engine_of, choice):
    (output,) = generate(engine_of, {"choice": choice}, n=3)
    assert {one.text for one in output.outputs} <= set(choice)
    assert {one.finish_reason for one in output.outputs} == {"stop"}


def test_a_choice_may_have_thousands_of_labels(engine_of):
    choice = [f"label number {i}" for i in range(5000)]
    check_compiles(StructuredOutputsParams(choice=choice))
    (output,) = generate(engine_of, {"choice": choice}, max_tokens=40)
    assert output.outputs[0].text in choice


CLOSED = {"disable_additional_properties": True}
NAMES = {"<s>", "</s>", "<|endoftext|>"}


@pytest.mark.parametrize(
    "asked",
    [
        {"choice": sorted(NAMES)},
        {"regex": "(<s>|</s>){2}x"},
        {"json": {"enum": ["<s>", "a</s>"]}},
        {
            "json": {"type": "object", "properties": {"</s>": {"const": "<|endoftext|>"}}, "required": ["</s>"]},
            **CLOSED,
        },
        {"grammar": 'start: "<s>" /x</ "/s>"'},
    ],
)
def test_the_name_of_a_special_token_is_a_text_as_any_other(engine_of, asked):
    special = set(engine_of.get_tokenizer().all_special_ids)
    for output in generate(engine_of, asked, num_prompts=3):
        ((one,), error) = output.outputs, output.error
        assert (error, one.finish_reason) == (None, "stop")
        assert any(name in one.text for name in NAMES) and not special & set(one.token_ids[:-1])


@pytest.mark.parametrize(
    ("regex", "text"), [(r"\\d", "\\d"), (r"[\d.]{3}", None), (r"(\d\D){2}", None), (r"\d+", None)]
)
@pytest.mark.parametrize("field", ["regex", "grammar"])
def test_a_digit_of_an_expression_is_one_of_ten(field, regex, text):
    given = {"regex": regex, "grammar": f'// say "it\nstart: /{regex}/ // end'}
    grammar = grammar_text(StructuredOutputsParams(**{field: given[field]}))
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
    assert not matcher.is_error()
    first = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
    allowed = {chr(token_id) for token_id in first if token_id < 256}
    assert allowed <= set("0123456789." if text is None else "\\")


def test_other_constraints(engine_of):
    class Car(pydantic.BaseModel):
        brand: str
        wheels: int | None

    sums = 'root ::= term ("+" term){1,3}\nterm ::= [0-9] [0-9]?'
    lark = 'start: "sum " NUMBER\nNUMBER: /[0-9]{2}/'
    nulls = {"type": "array", "items": {"type": "null"}, "minItems": 2, "maxItems": 2}
    odd = {"json": nulls, "whitespace_pattern": "_"}
    car, any_object, *rest = generate(
        engine_of, {"json": Car, **COMPACT}, {"json_object": True, **COMPACT}, {"grammar": sums}, {"grammar": lark}, odd
    )
    assert car.outputs[0].text.startswith('{"brand":"') and any_object.outputs[0].text.startswith("{")
    texts = [output.outputs[0].text for output in rest]
    assert re.fullmatch(r"\d{1,2}(\+\d{1,2}){1,3}", texts[0]) and re.fullmatch(r"sum \d{2}", texts[1])
    assert re.fullmatch(r"\[_?null_?,_?null_?\]", texts[2])


def test_whitespace_has_an_end_unless_it_is_asked_for(engine_of):
    array = {"type": "array", "items": {"const": 1}, "minItems": 4, "maxItems": 4}
    params = {"logit_bias": dict.fromkeys(engine_of.get_tokenizer().encode("\n ", add_special_tokens=False), 50)}
    bounded = generate(engine_of, {"json": array}, num_prompts=4, **params)
    assert {tuple(json.loads(text)) for text in texts(bounded)} == {(1, 1, 1, 1)} and len(texts(bounded)) == 4
    endless = generate(engine_of, {"json": array, "whitespace_pattern": r"\s+"}, **params)
    assert endless[0].outputs[0].finish_reason == "length"


def test_objects_can_be_closed(engine_of):
    inner = {"type": "object", "properties": {"properties": {"const": 1}}, "required": ["properties"]}
    schema = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    asked = {"json": schema, "disable_additional_properties": True, **COMPACT}
    assert set(texts(generate(engine_of, asked, num_prompts=5))) == {'{"a":{"properties":1}}'}
    bare = {"type": ["object", "null"]}
    outputs = generate(engine_of, {**asked, "json": bare}, {**asked, "json": {"type": "object"}}, num_prompts=3)
    assert set(texts(outputs)) <= {"{}", "null"} and len(texts(outputs)) == 6


def test_the_row_is_the_same_in_any_batch_and_after_preemption(tiny_model):
    asked = [{"json": CAR, **COMPACT}, None, {"regex": "[a-d]{20,40}"}, None, None, None, None, None]
    params = [
        SamplingParams(max_tokens=40, seed=i, ignore_eos=one is None, structured_outputs=one)
        for i, one in enumerate(asked * 3)
    ]
    prompts = [f"row {i} of {i * 7}" for i in range(len(params))]
    runs = []
    for few in ({}, {"block_size": 4, "num_gpu_blocks_override": 80, "overlap_depth": 1}, {"max_num_seqs": 1}):
        with LLM(str(tiny_model("llama")), dtype="float32", max_model_len=120, **few) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert (llm.stats().counters.num_preemptions > 0) == (len(few) == 3)
        runs.append([output.outputs[0].token_ids for output in outputs])
    assert runs[0] == runs[1] == runs[2]
    with LLM(str(tiny_model("llama")), dtype="float32", max_model_len=120) as llm:
        free = [i for i, one in enumerate(params) if one.structured_outputs is None]
        alone = llm.generate([prompts[i] for i in free], [params[i] for i in free], use_tqdm=False)
    assert [output.outputs[0].token_ids for output in alone] == [runs[0][i] for i in free]


def test_a_few_rows_sit_steps_out_and_many_are_waited_for(tiny_model):
    """Either way no token is drawn in vain, and no step runs without need."""
    with LLM(str(tiny_model("llama")), dtype="float32", overlap_depth=1) as llm:
        num_steps = []
        for num_free in (0, 15):
            before = llm.stats().counters.num_steps
            free = [SamplingParams(max_tokens=20, ignore_eos=True)] * num_free
            held = SamplingParams(max_tokens=20, structured_outputs={"regex": "[a-z]{40}"})
            llm.generate(["x"] * (1 + num_free), [held, *free], use_tqdm=False)
            num_steps.append(llm.stats().counters.num_steps - before)
        assert llm.stats().counters.num_wasted_tokens == 0
    # With many free rows the one that follows a grammar takes every other step, and then runs on alone.
    assert num_steps[0] == 20 and 22 < num_steps[1] <= 40


class Masking(LogitsProcessor):
    """Hugging Face's way to forbid tokens, with a mask that a matcher of its own computes bit by bit."""

    def __init__(self, grammar: Any, num_prompt_tokens: int) -> None:
        self.matcher, self.num_seen = grammar.matcher, num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token_id in input_ids[0, self.num_seen :].tolist():
            assert self.matcher.consume_token(token_id)
        self.num_seen = input_ids.shape[1]
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: scores.shape[1]]).bool()
        return scores.masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("asked", [{"json": CAR, **COMPACT}, {"regex": "(?:[a-z]+ ){3,6}end"}], ids=["json", "regex"])
def test_greedy_is_that_of_hugging_face(family, asked, tiny_model):
    folder, num_tokens = tiny_model(family), 48
    with LLM(str(folder), dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, structured_outputs=asked, logprobs=0)
        (output,) = llm.generate([PROMPT], params, use_tqdm=False)
        grammar = llm.llm_engine.handler.grammars.start(params.structured_outputs)
        processor = Masking(grammar, len(output.prompt_token_ids))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = model.generate(
        torch.tensor([output.prompt_token_ids]),
        max_new_tokens=num_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([processor]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    (one,) = output.outputs
    assert one.token_ids == theirs.sequences[0, len(output.prompt_token_ids) :].tolist()
    for token_id, ours, logits in zip(one.token_ids, one.logprobs, theirs.logits, strict=True):
        raw = logits[0].float().log_softmax(-1)[token_id].item()
        assert ours[token_id].logprob == pytest.approx(raw, abs=1e-4), "log-probabilities are the model's own"


def test_other_parameters_go_on_working(engine_of):
    letters = {"regex": "[XQ]{6,12}"}  # of these the tokenizer has no pairs
    at_stop = generate(engine_of, letters, stop=["Q"], seed=1)
    long = generate(engine_of, letters, min_tokens=7, logit_bias={2: 100}, seed=2)
    short = generate(engine_of, letters, max_tokens=3)
    biased = generate(engine_of, letters, bad_words=["X"], seed=3)
    endless = generate(engine_of, {"choice": ["abc"]}, ignore_eos=True, max_tokens=9)
    assert at_stop[0].outputs[0].stop_reason == "Q" and not at_stop[0].outputs[0].text.strip("X")
    assert len(long[0].outputs[0].token_ids) == 8, "the end of sequence, likely as it is, is drawn when it may be"
    assert short[0].outputs[0].finish_reason == "length" and len(short[0].outputs[0].token_ids) == 3
    assert set(biased[0].outputs[0].text) == {"Q"}
    assert endless[0].outputs[0].text == "abc" and len(endless[0].outputs[0].token_ids) == 9


def test_a_whole_output_that_is_shorter_than_min_tokens_is_kept(engine_of):
    short, empty = (
        generate(engine_of, asked, min_tokens=9, logprobs=0)[0].outputs[0]
        for asked in ({"choice": ["abc", "abcd"]}, {"regex": "a{0}"})
    )
    assert short.text == "abcd" and short.finish_reason == "stop" and len(short.logprobs) == len(short.token_ids)
    assert empty.text == "" and empty.finish_reason == "stop"


def test_nothing_left_to_say_is_an_error_of_the_row(engine_of):
    params = SamplingParams(structured_outputs={"choice": ["X"]}, bad_words=["X"])
    bad, good = engine_of.generate([PROMPT] * 2, [params, SamplingParams(max_tokens=2)], False, on_error="return")
    assert "structured_outputs" in bad.error.message and good.error is None


BROKEN = [
    ({"regex": "(a"}, "regex cannot be compiled: unclosed group; got '(a'"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": "(a)\\1"}, "regex cannot be compiled"),
    ({"json": {"type": "strnig"}}, "json cannot be compiled: Invalid type: strnig"),
    ({"json": {"$ref": "#/nowhere"}}, "json cannot be compiled"),
    ({"json": {"not": {}}}, "json cannot be compiled"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum (5) is greater than maximum (3)"),
    ({"grammar": "root ::= ("}, "grammar cannot be compiled"),
    ({"grammar": "start: nowhere"}, "grammar cannot be compiled"),
    ({"json_object": True, "whitespace_pattern": "("}, "json_object cannot be compiled"),
    (
        {"json": {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)}}},
        "json cannot be compiled: it is nested too deep",
    ),
    (
        {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(10_000)) + '\nr10000: "a"'},
        "grammar cannot be compiled: it is nested too deep",
    ),
]


@pytest.mark.parametrize(("asked", "message"), BROKEN, ids=[str(asked)[:60] for asked, _ in BROKEN])
def test_what_cannot_be_compiled_fails_its_row_only(asked, message, engine_of):
    each = [SamplingParams(max_tokens=20, structured_outputs=one) for one in (asked, {"choice": ["yes"]}, None)]
    bad, yes, free = engine_of.generate([PROMPT] * 3, each, use_tqdm=False, on_error="return")
    assert bad.error.kind == "SamplingParamsError" and not bad.error.retryable
    assert message in bad.error.message and "\n" not in bad.error.message
    assert yes.outputs[0].text == "yes" and free.error is None
    with pytest.raises(SamplingParamsError, match="cannot be compiled"):
        engine_of.generate(PROMPT, each[0], use_tqdm=False)


def test_a_constraint_that_cannot_be_compiled_is_tried_once(monkeypatch, engine_of):
    tried = []
    monkeypatch.setattr(grammar, "find_problem", lambda text: tried.append(text) or "it is nested too deep")
    for _ in range(3):
        with pytest.raises(SamplingParamsError, match="it is nested too deep; got 'only once'"):
            engine_of.generate(PROMPT, SamplingParams(structured_outputs={"regex": "only once"}), use_tqdm=False)
    assert len(tried) == 1


def test_what_outgrows_its_limits_fails_its_row_only(engine_of):
    patterns = {f"k{i}": {"type": "string", "pattern": f"^.*{i}.*$"} for i in range(60)}
    branches = {"json": {"anyOf": [{"type": "object", "properties": patterns}] * 30}}
    each = [SamplingParams(max_tokens=20, structured_outputs=one) for one in (branches, {"choice": ["yes"]})]
    bad, good = engine_of.generate([PROMPT] * 2, each, use_tqdm=False, on_error="return")
    assert "cannot be followed any further, simplify it" in bad.error.message and "\n" not in bad.error.message
    assert good.outputs[0].text == "yes"


def test_pieces_with_spaces_and_single_bytes_are_followed_too():
    """The other kind of tokenizer: pieces that begin with a mark for a space, and bytes for all they do not have."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "ab"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    grammars = Grammars(SimpleNamespace(hf=hf, vocab_size=len(hf)), len(hf) + 50, [1])
    rng, expression = np.random.default_rng(0), "(?:[ab]{2} ){2,4}é🙂"
    for _ in range(20):
        grammar, drawn = grammars.start(StructuredOutputsParams(regex=expression)), []
        while 1 not in drawn:
            allowed = np.flatnonzero(np.unpackbits(grammars.masks([grammar]).bits, bitorder="little"))
            drawn.append(int(rng.choice(allowed)))
            assert grammar.accept(drawn[-1]) is None
        assert re.fullmatch(expression, hf.decode(drawn[:-1]))


def test_without_a_tokenizer_there_is_none(tiny_model):
    params = SamplingParams(structured_outputs={"regex": "a"})
    with (
        LLM(str(tiny_model("llama")), skip_tokenizer_init=True) as llm,
        pytest.raises(SamplingParamsError, match="skip_tokenizer_init"),
    ):
        llm.generate([[5, 6]], params, use_tqdm=False)


WRONG = [
    ({}, "exactly one of json, regex, choice, grammar, json_object; got none"),
    ({"json": {}, "regex": "a"}, "got json and regex"),
    ({"json": "{"}, "json is not JSON"),
    ({"json": '"text"'}, "json must be a JSON schema"),
    ({"json": {"a": {1}}}, "json is not JSON: it holds a set"),
    ({"json": {"minimum": float("nan")}}, "json is not JSON"),
    ({"regex": ""}, "regex must be a non-empty string"),
    ({"regex": 3}, "regex must be"),
    ({"choice": []}, "choice must be a list of different strings, at least one"),
    ({"choice": "yes"}, "choice must be a list"),
    ({"choice": [1, 2]}, "choice must be a list"),
    ({"json_object": False}, "json_object must be True, or left out"),
    ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace is about JSON"),
    ({"json": {}, "disable_any_whitespace": "yes"}, "disable_any_whitespace must be True or False"),
    ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "drop one"),
    ({"json_object": True, "disable_additional_properties": True}, "needs the properties of a schema"),
    ({"json_objects": True}, "structured_outputs has no field 'json_objects'; did you mean 'json_object'"),
    ({"structural_tag": "{}"}, "structural_tag is not there yet"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[str(values) for values, _ in WRONG])
def test_a_wrong_value_is_named(values, message):
    with pytest.raises(SamplingParamsError, match=re.escape(message)):
        SamplingParams.from_dict({"structured_outputs": values})


def test_values_are_brought_to_one_form():
    rows = {"json": {"enum": np.array([1, 2])}, "regex": None, "choice": None, "disable_any_whitespace": None}
    params = SamplingParams.from_dict({"structured_outputs": rows}).structured_outputs
    assert params == StructuredOutputsParams(json='{"enum": [1, 2]}') == pickle.loads(pickle.dumps(params))
    assert hash(params) == hash(StructuredOutputsParams(json={"enum": [1, 2]}))
    assert StructuredOutputsParams(choice=np.array(["a", "b"])).choice == ("a", "b")
    with pytest.raises(SamplingParamsError, match="structured_outputs must be"):
        SamplingParams(structured_outputs="json")
    with pytest.raises(SamplingParamsError, match="guided_decoding is the name of older releases"):
        SamplingParams.from_dict({"guided_decoding": {"json": {}}})
