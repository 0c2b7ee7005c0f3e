"""Shows a forecast in the terminal, as a histogram and a table."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..plain_text import without_controls
from ..report.charts import coarse_bars
from ..report.number_text import clock, short
from ..report.report import describe
from .forecast import AdapterRoom, Forecast

BAR_WIDTH = 40
MAX_BARS = 16


def show(forecast: Forecast, console: Console) -> None:
    """Prints a forecast as a histogram of the prompt lengths and a table of facts.

    Args:
        forecast: The forecast.
        console: Console to print to.
    """
    counts = forecast.lengths.counts
    total = forecast.sample.num_rows
    about = "" if forecast.sample.is_exact else "about "
    console.print(
        f"[bold]{escape(forecast.model)}[/]: {'an unknown number of' if total is None else f'{about}{total:,}'} rows, "
        f"{counts.num_rows:,} of them looked at"
    )
    console.print()
    console.print("prompt tokens of a row", style="dim")
    for line in histogram_lines(forecast):
        console.print(line)
    console.print()
    table = Table.grid(padding=(0, 2))
    for name, text in facts(forecast):
        table.add_row(f"[dim]{name}[/]", text)
    console.print(table)


def histogram_lines(forecast: Forecast) -> Iterator[str]:
    """Yields a line of rich markup for each bar of the prompt lengths' histogram, red from `max_model_len` on."""
    bars = coarse_bars(forecast.lengths.prompt_tokens, MAX_BARS)
    most = max((count for _, _, count in bars), default=1)
    for low, high, count in bars:
        first, last = -int(-low // 1), max(-int(-low // 1), -int(-high // 1) - 1)
        label = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        colour = "red" if first >= forecast.footprint.max_model_len else "cyan"
        bar = "█" * round(BAR_WIDTH * count / most) or ("▏" if count else "")
        yield f"{label:>18} [{colour}]{bar}[/] [dim]{count:,}[/]"


def facts(forecast: Forecast) -> Iterator[tuple[str, str]]:
    """Yields (label, text with rich markup) of each line of the table that `show` prints."""
    lengths, footprint = forecast.lengths, forecast.footprint
    yield "lengths", _lengths(forecast)
    yield "limit", _limit(forecast)
    for error in lengths.counts.errors.values():
        share = f"[red]{error.num_rows:,} of {lengths.counts.num_rows:,} looked at[/]"
        yield "would fail", f"{share}, such as: {escape(without_controls(error.example))}"
    bits = footprint.weight_bytes * 8 / footprint.num_parameters
    is_plain = bits >= int("".join(filter(str.isdigit, footprint.dtype)))
    number_type = footprint.dtype if is_plain else f"{bits:.1f} bits each"
    weights = f"{_size(footprint.weight_bytes)} of weights in {number_type}"
    yield "model", f"{short(footprint.num_parameters)} parameters, {weights}"
    yield "KV cache", _room(forecast)
    if forecast.adapter_room is not None:
        yield "adapters", _adapters(forecast, forecast.adapter_room)
    yield "replicas", _replicas(forecast)
    known = "" if forecast.is_bound else f", {forecast.output_tokens_per_row:,.1f} expected"
    yield "output", f"at most {lengths.max_output_tokens:,.1f} tokens a row{known}"
    yield "speed", _speed(forecast)
    yield "time", _time(forecast)
    yield from (("price", text) for text in _prices(forecast))


def _lengths(forecast: Forecast) -> str:
    told = describe(forecast.lengths.prompt_tokens)
    names = {"mean": "mean", "median": "p50", "99 % up to": "p99", "longest": "largest"}
    return ", ".join(f"{label} {told[name]:,.0f}" for label, name in names.items())


def _limit(forecast: Forecast) -> str:
    lengths, limit = forecast.lengths, forecast.footprint.max_model_len
    if not lengths.num_too_long:
        return f"no row of the sample is beyond max_model_len={limit:,}"
    share = lengths.num_too_long / lengths.counts.num_rows
    total = forecast.sample.num_rows
    rows = "" if total is None else f", so about {round(share * total):,} of all"
    return f"[red]{lengths.num_too_long:,} rows of the sample ({share:.1%}) are beyond max_model_len={limit:,}{rows}[/]"


def _room(forecast: Forecast) -> str:
    footprint = forecast.footprint
    if footprint.problem is not None:
        return f"[red]{escape(without_controls(footprint.problem))}[/]"
    mean, long = forecast.running_at_once("mean"), forecast.running_at_once("p99")
    states = f" beside states of {footprint.state_bytes:,} bytes a row" if footprint.state_bytes else ""
    return (
        f"room for {footprint.kv_tokens:,} tokens of {footprint.kv_bytes_per_token:,} bytes{states}: {mean:,} rows of "
        f"mean length at once, {long:,} of the longest hundredth (max_num_seqs={footprint.max_num_seqs:,})"
    )


def _adapters(forecast: Forecast, room: AdapterRoom) -> str:
    named, num_rows = forecast.lengths.adapters, forecast.lengths.counts.num_rows
    return (
        f"{len(named):,} named by {named.total():,} of {num_rows:,} rows looked at; on the device {room.max_loras:,} "
        f"at once, of rank {room.max_lora_rank:,} at most ({_size(room.device_bytes)}); in the memory of the host "
        f"{room.max_cpu_loras:,} (at most {_size(room.host_bytes)})"
    )


def _replicas(forecast: Forecast) -> str:
    replicas, needed = forecast.replicas, forecast.needed_replicas()
    text = f"{replicas.asked:,} asked for, room for {replicas.placeable:,} ({replicas.where})"
    if replicas.asked > replicas.placeable:
        text = f"[red]{text}[/]"
    if replicas.within_s is None:
        return text
    within = clock(replicas.within_s)
    return f"{text}; {'an unknown number' if needed is None else f'[bold]{needed:,}[/]'} to be done within {within}"


def _speed(forecast: Forecast) -> str:
    throughput = forecast.throughput
    if throughput is None:
        return "[yellow]unknown[/]: pass --tokens-per-s, --report REPORT.json of the same model, or --measure"
    start = "" if throughput.start_up_s is None else f", {throughput.start_up_s:.1f} s to start"
    basis = escape(without_controls(throughput.basis))
    return f"{throughput.output_tokens_per_s:,.0f} tokens/s a replica{start} ({basis})"


def _time(forecast: Forecast) -> str:
    seconds = forecast.seconds(forecast.replicas.asked)
    if seconds is None:
        return "[yellow]unknown[/]" + (
            ": nobody knows how many rows there are" if forecast.throughput is not None else ""
        )
    return f"[bold]{_at_most(forecast)}{clock(seconds)}[/] with {forecast.replicas.asked:,} replica(s)"


def _prices(forecast: Forecast) -> Iterator[str]:
    cost = forecast.cost()
    if cost is None:
        yield "unknown: the job has no price table (prices:)"
        return
    currency = escape(without_controls(cost["currency"]))
    bills = [("by time of replicas", cost["by_replica_time"]), ("by tokens", cost["by_tokens"])]
    bills += [
        (f"by time on {escape(without_controls(kind))}", price) for kind, price in cost["by_accelerator_time"].items()
    ]
    known = [(name, price) for name, price in bills if price is not None]
    for name, price in known:
        yield f"[bold]{_at_most(forecast)}{currency} {price:,.4g}[/] {name}"
    if not known:
        yield "[yellow]unknown[/], as the time is"


def _at_most(forecast: Forecast) -> str:
    return "at most " if forecast.is_bound else "about "


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
