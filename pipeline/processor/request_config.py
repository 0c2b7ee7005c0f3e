"""Settings of processors that send rows to a server: an HTTP endpoint, or a deployment of Ray Serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import Field, SecretStr, field_validator

from ...engine.errors import ConfigError
from ..stages.stage_config import StageConfig, read_stage
from .config import ProcessorConfig


class HttpRequestStageConfig(StageConfig):
    """Settings of the stage that posts payloads."""


class RequestProcessorConfig(ProcessorConfig):
    """Settings of processors that send rows to a server. `concurrency` is the number of processes that send requests.

    Attributes:
        max_concurrent_requests: Most requests of the whole job under way at once.
    """

    max_concurrent_requests: int = Field(default=256, gt=0)


class HttpRequestProcessorConfig(RequestProcessorConfig):
    """Settings of a processor that posts each row to an HTTP endpoint.

    Attributes:
        url: URL of the endpoint.
        headers: Headers of every request. Their values are secrets: they are in no message and no repr.
        qps: Most requests that the whole job sends in a second, retries included; None for no limit.
        max_retries: Most times that a request is sent again after a status of 408, 429, 500, 502, 503 or 504, a
            timeout, a lost connection or a cut body.
        base_retry_wait_time_in_s: Most seconds before the first retry. The limit doubles with each retry, and the wait
            is drawn below the limit.
        max_retry_wait_time_in_s: Largest value of the limit on the wait before a retry. The wait is not shorter
            than a server asks for in `Retry-After`, but no longer than this either.
        request_timeout_s: Most seconds of one attempt; None for no limit.
        max_response_bytes: Size of the largest answer that is read, decompressed; the row of a larger one fails.
        session_factory: Function that makes the `aiohttp.ClientSession`, in the worker, for settings that have no field
            here: TLS, proxies, cookies.
        follow_other_origins: Whether an answer may be fetched from another origin (scheme, host, port) when the server
            redirects there. The headers and the row are not sent to it.
        http_request_stage: Resources of the operator that sends; it cannot be switched off.
    """

    url: str
    headers: dict[str, SecretStr] | None = None
    qps: float | None = Field(default=None, gt=0)
    max_retries: int = Field(default=0, ge=0)
    base_retry_wait_time_in_s: float = Field(default=1.0, gt=0)
    max_retry_wait_time_in_s: float = Field(default=60.0, gt=0)
    request_timeout_s: float | None = Field(default=300.0, gt=0)
    max_response_bytes: int = Field(default=16 << 20, gt=0)
    session_factory: Callable[[], Any] | None = Field(default=None, exclude=True, repr=False)
    follow_other_origins: bool = False
    http_request_stage: HttpRequestStageConfig = HttpRequestStageConfig()

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ConfigError(f"url must begin with http:// or https://; got {value!r:.80}")
        return value

    @field_validator("headers", mode="before")
    @classmethod
    def _read_headers(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: str(one) if isinstance(one, int | float) else one for name, one in value.items()}
        return value

    @field_validator("http_request_stage", mode="before")
    @classmethod
    def _read_stage(cls, value: Any) -> StageConfig:
        stage = read_stage(value, HttpRequestStageConfig, "http_request_stage")
        if not stage.enabled:
            raise ConfigError("http_request_stage is what the processor is for: it cannot be switched off")
        return stage


class ServeDeploymentProcessorConfig(RequestProcessorConfig):
    """Settings of a processor that calls a deployment of Ray Serve for each row.

    Attributes:
        deployment_name: Name of the deployment.
        app_name: Name of the application that the deployment belongs to.
        dtype_mapping: Name in column `dtype` -> class of the request; rows without that column send a dict.
        stream: Whether the deployment's methods answer with a stream, as in Ray Serve LLM. Its first item is the
            answer.
        request_timeout_s: Most seconds until the answer; None for no limit.
    """

    deployment_name: str
    app_name: str = "default"
    dtype_mapping: dict[str, type[Any]] | None = None
    stream: bool = True
    request_timeout_s: float | None = Field(default=None, gt=0)
