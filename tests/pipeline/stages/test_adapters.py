"""The adapter that a row names: which names are taken, where an adapter is read from, and what is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from millrace.engine.errors import AdapterError
from millrace.pipeline.stages.adapters import AdapterNames

LISTED = AdapterNames(("base", "served"), {"legal": "/adapters/legal", "far": "s3://bucket/far"})
BELOW = AdapterNames(("base",), {"legal": "/elsewhere/legal"}, "/adapters/")
ANY = AdapterNames(("base",), takes_places=True)


@pytest.mark.parametrize("names", [LISTED, BELOW, ANY, AdapterNames(("base",))])
@pytest.mark.parametrize("value", [None, float("nan"), "base"])
def test_a_row_without_a_name_or_with_the_models_runs_without_an_adapter(names: AdapterNames, value: Any) -> None:
    assert names.find(value) is None
    assert LISTED.find("served") is None


@pytest.mark.parametrize(
    ("names", "value", "place"),
    [
        (LISTED, "legal", "/adapters/legal"),
        (LISTED, "far", "s3://bucket/far"),
        (BELOW, "legal", "/elsewhere/legal"),
        (BELOW, "medical", "/adapters/medical"),
        (BELOW, "team-7/v2.1_final", "/adapters/team-7/v2.1_final"),
        (BELOW, "Müller & Söhne", "/adapters/Müller & Söhne"),
        (ANY, "/somewhere/else", "/somewhere/else"),
        (ANY, "org/adapter", "org/adapter"),
        (AdapterNames(("base",), {}, "s3://bucket/adapters"), "one", "s3://bucket/adapters/one"),
    ],
)
def test_a_name_has_one_place(names: AdapterNames, value: str, place: str) -> None:
    found = names.find(value)
    assert found is not None
    assert (found.lora_name, found.lora_path) == (value, place)


@pytest.mark.parametrize(
    "value",
    [
        ".", "..", "../x", "a/../../x", "a/..", "/etc", "//host/x", "~", "~root", "a//b", "a/", "./a",
        "a\\..\\x", "C:x", "s3://bucket/x", "https://host/x", "file:///etc", "a?b", "a#b", "%2e%2e/x", "a\0b", "a\nb",
    ],
)  # fmt: skip
def test_a_name_below_a_loading_path_leads_nowhere_else(value: str) -> None:
    with pytest.raises(AdapterError, match="no name of a folder below the job's dynamic_lora_loading_path"):
        BELOW.find(value)


@pytest.mark.parametrize("value", ["s3://bucket/x", "https://host/x", "file:///etc", "a\0b"])
def test_a_row_never_names_a_url(value: str) -> None:
    with pytest.raises(AdapterError, match="only the job names a URL"):
        ANY.find(value)


@pytest.mark.parametrize(
    ("names", "value", "said"),
    [
        (LISTED, "other", "asks for 'other', and all rows run on 'base' or one of the adapters 'far', 'legal'"),
        (LISTED, "/adapters/legal", "or one of the adapters"),
        (AdapterNames(("base",)), "other", "to run adapters, set enable_lora"),
        *((names, "", "is empty; null stands for the model itself") for names in (LISTED, BELOW, ANY)),
        (LISTED, 3, "must be the name of a model or an adapter; got int 3"),
        (ANY, ["a"], "must be the name of a model or an adapter; got list"),
        (AdapterNames(("base",), {str(one): "x" for one in range(30)}), "x", " and 20 more"),
    ],
)
def test_another_value_is_refused(names: AdapterNames, value: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        names.find(value)


def test_the_number_of_an_adapter_follows_from_its_name() -> None:
    names = [f"adapter-{index}" for index in range(1000)]
    numbers = {BELOW.find(name).lora_int_id for name in names}  # type: ignore[union-attr]
    assert len(numbers) == 1000
    assert min(numbers) >= 1
    again = pickle.loads(pickle.dumps(BELOW)).find("adapter-0")
    assert again.lora_int_id == 4_721_986_429_325_807_422
