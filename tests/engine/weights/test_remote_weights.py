"""Models behind a URL: the same tokens as from disk, through a store that fails; each rank reads its part."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import make_adapter
from fault_proxy import FaultPlan, FaultProxy
from millrace import LLM, ConfigError, SamplingParams
from millrace.engine.errors import CheckpointError
from millrace.engine.lora.files import locate_adapter, read_files
from millrace.engine.storage import Location
from millrace.engine.weights.checkpoint import iter_tensors
from millrace.engine.weights.file_tensor import FileTensor, PlainRows
from millrace.engine.weights.remote import iter_remote_tensors, read_metadata
from millrace.engine.weights.tensor_layout import TensorLayout
from s3 import CREDENTIALS, S3Server

PROMPTS = ["The mill wheel", "Rows stream in", "0 1 2 3"]
SETTINGS = {"max_model_len": 64, "num_threads": 1, "dtype": "float32"}


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """A broken store that `s3://` leads to: the same for all tests, since a process keeps its connections."""
    with FaultProxy(s3.host, s3.port, FaultPlan(seed=3, rate=0.12)) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url, "MILLRACE_STORAGE_TIMEOUT_S": "0.5"}.items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture
def store(s3: S3Server, proxy: FaultProxy) -> Callable[[Path], str]:
    """A function that puts a folder into a bucket and returns its URL."""

    def put(folder: Path) -> str:
        place = Location.at(f"s3://{s3.make_bucket()}/{folder.name}", s3.url)
        for path in folder.iterdir():
            (place / path.name).write_bytes(path.read_bytes())
        return place.url

    return put


def generate(model: str) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = LLM(model, **SETTINGS).generate(PROMPTS, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_model_from_a_bucket_gives_the_tokens_of_the_one_on_disk(
    tiny_model: Callable[[str], Path], store: Callable[[Path], str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("qwen3")
    written: list[str] = []
    write_bytes = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: written.append(path.name) or write_bytes(path, data))
    assert generate(store(folder)) == generate(str(folder))
    assert "config.json" in written
    assert not [name for name in written if name.endswith(".safetensors")]
    assert proxy.counts.total() > proxy.counts["none"]


def test_ranks_of_a_model_from_a_bucket_have_their_parts(
    tiny_model: Callable[[str], Path], store: Callable[[Path], str]
) -> None:
    folder = tiny_model("qwen3")
    place = Location.at(store(folder))
    local = dict(iter_tensors(folder))
    for name, tensor in list(iter_tensors(place))[::6]:
        assert isinstance(tensor, FileTensor)
        assert torch.equal(tensor.read(), local[name])
        for dim, size in enumerate(tensor.shape):
            half = size // 2
            assert torch.equal(tensor.narrow(dim, half, size - half).read(), local[name].narrow(dim, half, size - half))


def test_of_a_part_along_the_first_dimension_only_its_bytes_are_read(tmp_path: Path) -> None:
    reads: list[tuple[int, int]] = []

    class Counted(Location):
        __slots__ = ()

        def read_bytes(self, start: int = 0, end: int | None = None) -> bytes:
            reads.append((start, end or 0))
            return Location.read_bytes(self, start, end)

    values = torch.arange(64 * 8, dtype=torch.bfloat16).reshape(64, 8)
    (tmp_path / "x").write_bytes(b"header" + values.view(torch.uint8).numpy().tobytes())
    tensor = FileTensor.whole(Counted(str(tmp_path / "x")), 6, values.shape, torch.bfloat16, PlainRows(torch.bfloat16))
    assert torch.equal(tensor.narrow(0, 16, 16).read(), values[16:32])
    assert reads == [(6 + 16 * 16, 6 + 32 * 16)]
    _, up = TensorLayout(("gate", "up"), num_groups=16).cut("x", tensor, [torch.Size((32, 8))] * 2)
    reads.clear()
    assert torch.equal(up.narrow(0, 8, 4).read(), values[[18, 19, 22, 23]])
    assert reads == [(6 + 18 * 16, 6 + 24 * 16)]


def test_tensors_that_ranks_shard_run_from_a_bucket(
    tiny_model: Callable[[str], Path], store: Callable[[Path], str]
) -> None:
    folder = tiny_model("llama")
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    model = store(folder)
    llm = LLM(model, **SETTINGS, tensor_parallel_size=2)
    try:
        tokens = [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    finally:
        llm.close()
    assert tokens == [answer[:4] for answer in generate(str(folder))]


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("damage", ["truncated", "no header", "empty", "pickle"])
def test_damaged_weights_in_a_bucket_are_named(tiny_model: Callable[[str], Path], s3: S3Server, damage: str) -> None:
    content = (tiny_model("qwen3") / "model.safetensors").read_bytes()
    place = Location.at(f"s3://{s3.make_bucket()}/model")
    name = "pytorch_model.bin" if damage == "pickle" else "model.safetensors"
    contents = {"truncated": content[: len(content) // 2], "no header": b"no safetensors at all", "empty": b""}
    (place / name).write_bytes(contents.get(damage, b"x"))
    said = "only safetensors" if damage == "pickle" else "model.safetensors is truncated"
    with pytest.raises(CheckpointError, match=said):
        list(iter_tensors(place))


def store_header(path: Path, header: Any, num_bytes: int) -> Location:
    """Writes a file with a header of its own, as text or as an object, and `num_bytes` bytes of numbers."""
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(num_bytes))
    return Location.at(path)


def entry(shape: list[Any], start: Any, stop: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "num_bytes"),
    [
        ({"x": entry([2**62, 0], 0, 0)}, 0),
        ({"x": entry([2**62, 2**62, 0], 0, 0)}, 0),
        ({"x": entry([2**64, 4], 0, 4)}, 4),
        ({"x": entry([-1, -1], 0, 4)}, 4),
        ({"x": entry([1.0], 0, 4)}, 4),
        ({"x": entry([True], 0, 4)}, 4),
        ({"x": entry(["1"], 0, 4)}, 4),
        ({"x": entry([1] * 100, 0, 4)}, 4),
        ({"x": entry([1], -4, 0), "y": entry([1], 0, 4)}, 4),
        ({"x": entry([0], 4, 4)}, 4),
        ({"x": entry([1], 0, 4), "y": entry([2], 0, 8)}, 8),
        ({"x": entry([1], 4, 8)}, 8),
        ({"x": entry([1], 0, 4, "F4096")}, 4),
        ({"x": entry([1], 0, 4) | {"more": 1}}, 4),
        ({"x": None}, 0),
        ("[" * 100_000, 0),
        ("[]", 0),
    ],
)
def test_a_header_of_nonsense_is_a_damaged_file(tmp_path: Path, header: Any, num_bytes: int) -> None:
    file = store_header(tmp_path / "model.safetensors", header, num_bytes)
    with pytest.raises(CheckpointError, match=r"is damaged|is truncated") as caught:
        list(iter_remote_tensors([file]))
    assert len(str(caught.value)) < 600


def test_metadata_of_nonsense_is_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="__metadata__"):
        read_metadata(store_header(tmp_path / "model.safetensors", {"__metadata__": "x"}, 0))


@pytest.mark.usefixtures("proxy")
def test_a_model_that_is_not_there_is_said_in_a_line(s3: S3Server) -> None:
    with pytest.raises(ConfigError, match="does not exist, or is no folder with files"):
        LLM(f"s3://{s3.make_bucket()}/nothing")
    with pytest.raises(ConfigError, match="bucket 'no-such-bucket' does not exist"):
        LLM("s3://no-such-bucket/model")


def test_small_files_go_with_the_process(tmp_path: Path, tiny_model: Callable[[str], Path], s3: S3Server) -> None:
    environment = {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": s3.url, "TMPDIR": str(tmp_path)}
    url = f"s3://{s3.make_bucket()}/model"
    script = (
        "from millrace.engine import resolve_model; from millrace.engine.storage import Location;"
        f"(Location.at({url!r}) / 'config.json').write_bytes(b'{{}}');"
        f"folder = resolve_model({url!r}); print(folder, [path.name for path in folder.iterdir()])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/")
    assert "['config.json']" in done.stdout
    assert os.listdir(tmp_path) == []


def test_an_adapter_from_a_bucket_is_that_on_disk(
    tiny_model: Callable[[str], Path], store: Callable[[Path], str], tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "tune", tiny_model("llama"))
    here, there = (read_files(locate_adapter(place), 1 << 20) for place in (str(folder), store(folder)))
    assert (there.fields, there.digest) == (here.fields, here.digest)
