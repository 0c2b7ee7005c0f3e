"""The JSON schema of job files, for editors. The docstring of `JobConfig` describes its fields."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

from pydantic import TypeAdapter

from ...engine import EngineConfig, SamplingParams, StructuredOutputsParams
from ...engine.config import IGNORED, ONLY
from ..report.prices import Prices
from .config import JobConfig, MessageTemplate

DESCRIBED: tuple[type, ...] = (JobConfig, MessageTemplate, Prices)

ANYWAY = "Accepted for configurations written for vLLM"


def job_schema() -> dict[str, Any]:
    """Returns the JSON schema of a job file."""
    schema = JobConfig.model_json_schema()
    kinds = {cls.__name__: cls for cls in DESCRIBED}
    for name, definition in [("JobConfig", schema), *schema.get("$defs", {}).items()]:
        if name in kinds:
            _describe(definition, kinds[name])
    properties = schema["properties"]
    properties["engine"] |= _fields_of(EngineConfig, without=("model",))
    properties["engine"]["properties"] |= _settings_of_vllm()
    sampling = properties["sampling"].pop("anyOf")[0] | _fields_of(SamplingParams)
    sampling["properties"]["structured_outputs"] |= {"anyOf": [_fields_of(StructuredOutputsParams), {"type": "null"}]}
    properties["sampling"]["anyOf"] = [sampling, {"type": "null"}]
    # A price table may be in another file.
    properties["prices"]["anyOf"].insert(1, {"type": "string", "description": "Path of a YAML or JSON file."})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Millrace job"}


def schema_text() -> str:
    """Returns the schema as text, as in docs/job.schema.json."""
    return json.dumps(job_schema(), indent=2, ensure_ascii=False) + "\n"


def field_docs(cls: type) -> dict[str, str]:
    """Returns name -> text of the attributes in a class's docstring, with YAML's null, true and false for Python's."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    docs: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        begin = re.match(r"    (\w+): (.*)", line)
        if begin:
            name = begin[1]
            docs[name] = begin[2]
        elif name and line.startswith("      "):
            docs[name] += f" {line.strip()}"
        elif line.strip():
            break
    return {name: re.sub(r"\b(None|True|False)\b", _in_yaml, text.replace("``", "`")) for name, text in docs.items()}


def _in_yaml(value: re.Match[str]) -> str:
    return {"None": "null"}.get(value[0], value[0].lower())


def _describe(definition: dict[str, Any], cls: type) -> None:
    """Adds the texts of a docstring to a definition, and removes the titles that pydantic makes up."""
    definition["description"] = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
    docs = field_docs(cls)
    for name, field in definition["properties"].items():
        field.pop("title", None)
        if name in docs:
            field["description"] = docs[name]


def _fields_of(cls: type, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns a schema with the fields of a dataclass. All are optional, and no others are allowed."""
    schema = TypeAdapter(cls).json_schema()
    _describe(schema, cls)
    known = {one.name for one in dataclasses.fields(cls)}
    fields = {name: field for name, field in schema["properties"].items() if name in known and name not in without}
    return {"type": "object", "properties": fields, "additionalProperties": False}


def _settings_of_vllm() -> dict[str, Any]:
    ignored = {name: {"description": f"{ANYWAY}; changes nothing: {why}."} for name, (_, why) in IGNORED.items()}
    only = {name: {"description": f"{ANYWAY}.", "enum": list(values)} for name, values in ONLY.items()}
    return {**ignored, **only}
