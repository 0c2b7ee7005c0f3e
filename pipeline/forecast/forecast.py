"""`Forecast`: tokens, replicas, time and price of a job, computed before any engine starts.

A forecast follows from a sample of the rows, the config.json of the model, and the throughput of a replica. Without a
throughput, time and price by time stay unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ...engine import EngineConfig, Footprint, SamplingParams
from ...engine.shown import without_secrets
from .. import columns
from ..ledger.counts import Counts
from ..ledger.histogram import Histogram
from ..report.prices import HOUR_S, Prices
from ..report.report import describe
from ..stages.base import Row
from .sample import Sample
from .throughput import Throughput


@dataclass(slots=True)
class Lengths:
    """The lengths of the prompts and outputs of a sample of rows, and the errors of rows that cannot run.

    Attributes:
        prompts: Token ids of each prompt that the engine can run.
        counts: Counts of the rows, with the errors of rows that fail before the engine.
        prompt_tokens: Histogram of the prompt tokens of the rows without an error, including prompts that are too long.
        num_too_long: Number of prompts that leave no room for an output token.
        max_output_tokens: Most tokens that a row may generate in all its answers, on average over `prompts`.
        params: Sampling parameters of each row of `prompts`.
        adapters: Name of an adapter -> number of rows of `prompts` that name it.
    """

    prompts: list[list[int]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    prompt_tokens: Histogram = field(default_factory=Histogram)
    num_too_long: int = 0
    max_output_tokens: float = 0.0
    params: list[SamplingParams] = field(default_factory=list)
    adapters: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, rows: Iterable[Row], default: SamplingParams, max_model_len: int) -> Lengths:
        """Counts the lengths of rows that have passed the stages before the engine.

        Args:
            rows: Rows with their prompts as tokens, and rows that have failed. The column `columns.ADAPTER` holds the
                name of the adapter of a row that has one.
            default: Sampling parameters of rows that have none.
            max_model_len: Most tokens of prompt and output together.
        """
        lengths, room = cls(), 0
        for row in rows:
            lengths.counts.num_rows += 1
            if row.error is not None:
                lengths.counts.add_error(row.error)
                continue
            prompt = row.data[columns.TOKENIZED_PROMPT]
            lengths.prompt_tokens.add(len(prompt))
            if len(prompt) >= max_model_len:
                lengths.num_too_long += 1
                continue
            given = row.data.get(columns.SAMPLING_PARAMS)
            params = default if given is None else SamplingParams.from_dict(given)
            left = max_model_len - len(prompt)
            room += params.n * (left if params.max_tokens is None else min(left, params.max_tokens))
            lengths.prompts.append(prompt)
            lengths.params.append(params)
            if (adapter := row.data.get(columns.ADAPTER)) is not None:
                lengths.adapters[adapter] += 1
        lengths.max_output_tokens = room / max(1, len(lengths.prompts))
        return lengths

    @property
    def share_that_runs(self) -> float:
        """Share, from 0 to 1, of the sampled rows that the engine can run."""
        return len(self.prompts) / max(1, self.counts.num_rows)


@dataclass(frozen=True, slots=True)
class Replicas:
    """The number of replicas that a job asks for, the number that has room, and the time that the job may take.

    Attributes:
        asked: Replicas that the job asks for.
        placeable: Replicas that have room in the cluster, or on this machine if there is no cluster.
        where: Description of the cluster or machine.
        within_s: Seconds that the job may take; None for any time.
    """

    asked: int
    placeable: int
    where: str
    within_s: float | None = None


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """The room of a replica for adapters.

    Attributes:
        max_loras: Most adapters on the device at once.
        max_lora_rank: Largest rank of an adapter.
        max_cpu_loras: Most adapters in the memory of the host.
        device_bytes: Bytes of the adapter slots on the device.
        host_bytes: Most bytes of the adapters in the memory of the host, if all have the largest rank.
    """

    max_loras: int
    max_lora_rank: int
    max_cpu_loras: int
    device_bytes: int
    host_bytes: int

    @classmethod
    def of(cls, config: EngineConfig, footprint: Footprint) -> AdapterRoom | None:
        """Returns the room for adapters in an engine; None for an engine without `enable_lora`."""
        if not config.enable_lora:
            return None
        slot_bytes = footprint.adapter_bytes // config.max_loras
        held = 2 * config.max_loras if config.max_cpu_loras is None else config.max_cpu_loras
        return cls(config.max_loras, config.max_lora_rank, held, footprint.adapter_bytes, held * slot_bytes)


@dataclass(slots=True)
class Forecast:
    """The forecast of a job.

    Attributes:
        model: Folder or bundled name of the model.
        sample: The sampled rows.
        seed: Seed with which the sample was drawn.
        lengths: Lengths of the sampled rows.
        footprint: Memory and limits of the engine of a replica.
        replicas: Number of replicas that the job asks for and that have room.
        throughput: Speed of a replica; None if it is not known.
        prices: The user's price table, if there is one.
        adapter_room: Room of a replica for adapters; None if its engine has none.
    """

    model: str
    sample: Sample
    seed: int
    lengths: Lengths
    footprint: Footprint
    replicas: Replicas
    throughput: Throughput | None = None
    prices: Prices | None = None
    adapter_room: AdapterRoom | None = None

    @property
    def num_rows(self) -> float | None:
        """Rows that the engine will run; None if the number of rows is not known."""
        return None if self.sample.num_rows is None else self.sample.num_rows * self.lengths.share_that_runs

    @property
    def output_tokens_per_row(self) -> float:
        """Mean output tokens of a row: `Throughput.output_tokens_per_row`, or else the most that a row may generate."""
        known = None if self.throughput is None else self.throughput.output_tokens_per_row
        return self.lengths.max_output_tokens if known is None else known

    @property
    def is_bound(self) -> bool:
        """Whether output tokens, time and price are upper limits, because the lengths of outputs are not known."""
        return self.throughput is None or self.throughput.output_tokens_per_row is None

    def seconds(self, num_replicas: int) -> float | None:
        """Returns the seconds of the job, with the start-up if known; None if the speed or the row count is unknown."""
        work_s = self._work_s()
        return None if work_s is None else self._start_up_s() + work_s / num_replicas

    def needed_replicas(self) -> int | None:
        """Returns the fewest replicas that finish within `within_s`; None if no number does or the speed is unknown."""
        work_s, within_s = self._work_s(), self.replicas.within_s
        if work_s is None or within_s is None:
            return None
        left_s = within_s - self._start_up_s()
        return max(1, math.ceil(work_s / left_s)) if left_s > 0 else None

    def running_at_once(self, name: str) -> int:
        """Returns the number of sequences that a replica runs at once, if all have the same length.

        Args:
            name: Length of the prompts: ``"mean"`` or a percentile of the sample, such as ``"p99"``.
        """
        prompt = describe(self.lengths.prompt_tokens)[name]
        return self.footprint.num_running(min(self.footprint.max_model_len, prompt + self.output_tokens_per_row))

    def cost(self) -> dict[str, Any] | None:
        """Returns the prices of the job by replica time, by accelerator time and by tokens; None without a price table.

        A single price is None, or missing for a kind of accelerator, if it cannot be computed.
        """
        if self.prices is None:
            return None
        seconds = self.seconds(self.replicas.asked)
        held_s = None if seconds is None else seconds * self.replicas.asked
        by_kind = {kind: price * held_s / HOUR_S for kind, price in self._accelerators() if held_s is not None}
        by_replica = self.prices.by_time(held_s, {}) if held_s is not None else None
        by_tokens = None
        if self.num_rows is not None:
            num_input, num_output = self.num_rows * self._mean_prompt(), self.num_rows * self.output_tokens_per_row
            by_tokens = self.prices.by_tokens(num_input, 0, num_output)
        return {
            "currency": self.prices.currency,
            "by_replica_time": by_replica,
            "by_accelerator_time": by_kind,
            "by_tokens": by_tokens,
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns the forecast as plain data for JSON."""
        lengths, counts = self.lengths, self.lengths.counts
        share_too_long = lengths.num_too_long / max(1, counts.num_rows)
        known = self.sample.num_rows
        engine = asdict(self.footprint)
        return {
            "model": without_secrets(self.model),
            "num_rows": known,
            "num_rows_is_exact": self.sample.is_exact,
            "sample": {"num_rows": counts.num_rows, "seed": self.seed},
            "prompt_tokens": describe(lengths.prompt_tokens) | {"histogram": lengths.prompt_tokens.as_dict()},
            "max_output_tokens": round(lengths.max_output_tokens, 3),
            "too_long": {
                "max_model_len": self.footprint.max_model_len,
                "num_in_sample": lengths.num_too_long,
                "num_rows": None if known is None else round(known * share_too_long),
            },
            "failing": {kind: asdict(error) for kind, error in counts.errors.items()},
            "engine": engine | {"caches": list(engine["caches"]), "kv_tokens": self.footprint.kv_tokens},
            "adapters": self._adapters(),
            "running_at_once": {name: self.running_at_once(name) for name in ("mean", "p50", "p99")},
            "replicas": asdict(self.replicas) | {"needed": self.needed_replicas()},
            "throughput": None if self.throughput is None else asdict(self.throughput),
            "output_tokens_per_row": round(self.output_tokens_per_row, 3),
            "is_upper_bound": self.is_bound,
            "seconds": self.seconds(self.replicas.asked),
            "cost": self.cost(),
        }

    def _adapters(self) -> dict[str, Any] | None:
        """Returns the adapters of the sampled rows and the room for adapters; None if the engine has no adapters."""
        if self.adapter_room is None:
            return None
        named = self.lengths.adapters
        return {"num_in_sample": len(named), "rows_in_sample": dict(named.most_common()), **asdict(self.adapter_room)}

    def _work_s(self) -> float | None:
        if self.throughput is None or self.num_rows is None or self.throughput.output_tokens_per_s <= 0:
            return None
        return self.num_rows * self.output_tokens_per_row / self.throughput.output_tokens_per_s

    def _start_up_s(self) -> float:
        return 0.0 if self.throughput is None else self.throughput.start_up_s or 0.0

    def _mean_prompt(self) -> float:
        prompts = self.lengths.prompts
        return sum(map(len, prompts)) / max(1, len(prompts))

    def _accelerators(self) -> list[tuple[str, float]]:
        """Returns (kind, price of an hour of all accelerators of a replica) of each kind in the price table."""
        prices = self.prices.per_accelerator_hour if self.prices is not None else None
        return [(kind, price * self.footprint.num_ranks) for kind, price in (prices or {}).items()]
