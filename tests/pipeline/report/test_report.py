"""report.json and report.html: the page holds what the file says, and needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from looks import absent, up
from report_page import Page, check_page

from millrace import ConfigError
from millrace.pipeline import columns
from millrace.pipeline.files.storage import Storage
from millrace.pipeline.job.display import describe_summary
from millrace.pipeline.ledger.counts import Counts
from millrace.pipeline.report import ReportWriter
from millrace.pipeline.report.prices import Prices
from millrace.pipeline.report.recorder import Recorder
from millrace.pipeline.stages.base import Row, RowError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
]  # fmt: skip
NASTY = 'a column: </script><script>console.error("x")</script> & <b>'


def filled_counts(num_rows: int = 300) -> Counts:
    counts = Counts()
    for index in range(num_rows):
        data = {
            columns.NUM_INPUT_TOKENS: 20 + index, columns.NUM_GENERATED_TOKENS: index % 40,
            columns.NUM_CACHED_TOKENS: 5, columns.FINISH_REASON: "stop" if index % 7 else "length",
            columns.IS_DUPLICATE: index % 10 == 0,
            columns.METRICS: {"queue_s": 0.01 * index, "ttft_s": 0.02 * index, "e2e_s": 0.03 * index},
        }  # fmt: skip
        error = RowError("chat_template", "ChatTemplateError", NASTY, retryable=True) if index % 50 == 0 else None
        counts.add(Row(data, data, error))
    return counts


def write_report(folder: Path, prices: Prices | None = None, counts: Counts | None = None) -> dict[str, Any]:
    """Writes the report of a run that was never run, and reads it back."""
    counts = filled_counts() if counts is None else counts
    recorder = Recorder(0.0, accelerator_of=lambda node_id: "H100")
    recorder.look([absent("starting")], Counts(), 30.0)
    for second in range(31, 90):
        done = Counts(num_rows=counts.num_rows * (second - 30) // 60)
        recorder.look([up(steps=second, out=50 * second, busy_s=second - 30, running=9)], done, float(second))
    run = recorder.finish([up(steps=89, out=50 * 89, busy_s=59)], counts, 91.0)
    ReportWriter(Storage.at(folder), "a-model", "an-output", prices).write(run, counts, counts.num_rows)
    return json.loads((folder / "report.json").read_text())


def test_the_page_is_whole_and_has_the_numbers_of_the_json(tmp_path: Path) -> None:
    report = write_report(tmp_path, Prices(per_replica_hour=3.0))
    text = (tmp_path / "report.html").read_text()
    check_page(Page(text), report)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)
    assert len(text) < 400_000


def test_the_page_needs_no_network_and_runs_no_script(tmp_path: Path) -> None:
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "action", "data", "srcset")]
    assert links == ["data:,"]
    assert not re.search(r"https?://|url\(|@import", text)
    assert [value for tag, name, value in page.attributes if tag == "script" and name == "type"] == ["application/json"]
    assert NASTY not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed on this machine")
def test_chromium_shows_the_page_without_a_warning(tmp_path: Path) -> None:
    report = write_report(tmp_path, Prices(per_accelerator_hour={"H100": 2.0}))
    profile, page = tmp_path / "profile", tmp_path / "report.html"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr
    check_page(Page(done.stdout.strip()), report)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed on this machine")
def test_a_warning_of_chromium_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>throw new Error('seen')</script>")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" in done.stderr


def test_a_report_adds_up_the_runs_of_a_job(tmp_path: Path) -> None:
    first = write_report(tmp_path)
    both = write_report(tmp_path)
    assert len(both["runs"]) == 2
    assert both["runs"][0] == first["runs"][0]
    for name in ("start_up_s", "generate_s"):
        assert both["summary"][name] == 2 * first["summary"][name]
    assert both["replicas"]["held_s"] == 2 * first["replicas"]["held_s"]
    assert both["engines"]["num_output_tokens"] == 2 * first["engines"]["num_output_tokens"]
    assert both["counts"] == first["counts"]
    assert "taken up again" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 1}', '{"version": 99, "runs": []}', '{"version": 1, "runs": [3]}']
)
def test_a_report_that_cannot_be_read_is_begun_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    assert len(write_report(tmp_path)["runs"]) == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"start_up_s": "x"},
        {"start_up_s": None},
        {"write_s": [1]},
        {"held_s": "x"},
        {"idle_s": 5},
        {"accelerator_s": "x"},
        {"seconds": "x"},
        {"work": {"num_steps": "x"}},
        {"timeline": {}},
        {"num_restarts": "x"},
    ],
)
def test_a_run_with_odd_values_in_a_report_ends_no_job(tmp_path: Path, odd: dict[str, Any]) -> None:
    runs = [Recorder(0.0).finish([], Counts(), 1.0).as_dict() | odd]
    (tmp_path / "report.json").write_text(json.dumps({"version": 1, "runs": runs}))
    report = write_report(tmp_path)
    assert report["runs"][-1]["seconds"] > 0 and (tmp_path / "report.html").exists()


def test_a_report_shows_no_secret(tmp_path: Path) -> None:
    writer = ReportWriter(Storage.at(tmp_path), "https://h/model?sig=hunter2", "s3://u:hunter2@bucket/out")
    summary = writer.write(Recorder(0.0).finish([], Counts(), 1.0), Counts(), 0).summary
    shown = [repr(summary), describe_summary(summary), *(path.read_text() for path in tmp_path.iterdir())]
    assert len(shown) == 4 and not any("hunter2" in text for text in shown)


def test_a_report_that_cannot_be_written_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    writer = ReportWriter(Storage.at(tmp_path / "file" / "below"), "m", "o")
    report = writer.write(Recorder(0.0).finish([], Counts(), 1.0), Counts(), 0)
    assert report.summary.is_complete
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("price", [math.inf, math.nan, -1.0, 1e300])
@pytest.mark.parametrize("field", ["per_replica_hour", "per_million_input_tokens", "per_million_output_tokens"])
def test_a_price_is_a_finite_amount(field: str, price: float) -> None:
    for given in ({field: price}, {"per_accelerator_hour": {"H100": price}}):
        with pytest.raises(ConfigError, match=next(iter(given))):
            Prices(**given)  # type: ignore[arg-type]


def test_a_report_that_cannot_be_made_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prices = Prices.model_construct(per_replica_hour=math.inf)  # As from an older version.
    ReportWriter(Storage.at(tmp_path), "m", "out", prices).write(Recorder(0.0).finish([], Counts(), 1.0), Counts(), 0)
    assert "the report cannot be written" in caplog.text


def test_an_empty_job_has_a_page_too(tmp_path: Path) -> None:
    report = write_report(tmp_path, Prices(), Counts())
    assert report["cost"]["by_time"] is None
    assert json.loads(Page((tmp_path / "report.html").read_text()).embedded) == report


def test_rows_and_tokens_are_reported_by_adapter(tmp_path: Path) -> None:
    counts = filled_counts()
    for index in range(120):
        data = {columns.NUM_INPUT_TOKENS: 2, columns.NUM_GENERATED_TOKENS: 3, columns.ADAPTER: f"<b>{index // 2}"}
        counts.add(Row(data, data))
    for index in range(50):
        data = {columns.NUM_INPUT_TOKENS: 1, columns.NUM_GENERATED_TOKENS: 1, columns.ADAPTER: f"rare-{index:03}"}
        counts.add(Row(data, data))
    report = write_report(tmp_path, counts=counts)
    assert report["counts"]["adapters"]["<b>7"] == {"num_rows": 2, "num_input_tokens": 4, "num_output_tokens": 6}
    text = (tmp_path / "report.html").read_text()
    check_page(Page(text), report)
    assert '<th scope="row">none: the model itself</th><td class="num">294</td>' in text
    row = '<th scope="row">&lt;b&gt;7</th><td class="num">2</td><td class="num">4</td><td class="num">6</td>'
    assert row in text
    assert ">rare-038</th>" in text and ">rare-039</th>" not in text and "; 11 more adapters" in text
    write_report(tmp_path / "none")
    assert "Rows by adapter" not in (tmp_path / "none" / "report.html").read_text()


def test_the_numbers_of_a_report_agree_with_each_other(tmp_path: Path) -> None:
    report = write_report(tmp_path, Prices(per_accelerator_hour={"H100": 3.6}, per_million_output_tokens=2.0))
    counts, summary = report["counts"], report["summary"]
    assert summary["num_rows_out"] == counts["num_rows"] == 300
    assert sum(counts["finish_reasons"].values()) == counts["num_rows"] - counts["num_failed"]
    assert report["distributions"]["input_tokens"]["count"] == counts["num_rows"] - counts["num_failed"]
    assert sum(error["num_rows"] for error in counts["errors"].values()) == counts["num_failed"]
    assert report["replicas"]["held_s"] == 91.0
    assert report["replicas"]["busy_s"] + sum(report["replicas"]["idle_s"].values()) == pytest.approx(91.0)
    assert report["cost"]["by_time"] == pytest.approx(3.6 * 91 / 3600)
    computed = counts["num_output_tokens"] - counts["num_duplicate_output_tokens"]
    assert report["cost"]["by_tokens"] == pytest.approx(2.0 * computed / 1e6)


def test_prices_by_time_and_by_tokens_are_two_bills() -> None:
    prices = Prices(per_replica_hour=2.0, per_accelerator_hour={"H100": 3.0}, per_million_input_tokens=1.0)
    assert prices.by_time(3600.0, {"H100": 7200.0}) == 8.0
    assert prices.by_tokens(2_000_000, 500_000, 9) == 2.0
    assert Prices(per_million_input_tokens=1.0, per_million_cached_tokens=0.5).by_tokens(2e6, 1e6, 0) == 1.5
    assert Prices().by_time(3600.0, {"H100": 1.0}) is None
    assert Prices().by_tokens(1, 0, 1) is None
    assert Prices(per_accelerator_hour={"A100": 1.0}).by_time(1.0, {"H100": 1.0}) is None
    assert Prices(per_accelerator_hour={"A100": 1.0}).without_price({"H100": 1.0}) == ["H100"]
