"""`RequestBackend`: a server as the backend of a processor, an HTTP endpoint or a deployment of Ray Serve."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.data import ActorPoolStrategy

from ...engine.errors import ConfigError
from .. import columns
from ..stages.base import Stage
from ..stages.stage_config import StageConfig
from .backend import Backend
from .operators import MakeStages
from .request_config import HttpRequestProcessorConfig, RequestProcessorConfig, ServeDeploymentProcessorConfig
from .resources import OPERATOR_CPUS, OperatorResources, check_room, num_blocks, rows_per_block
from .stage_spec import StageInfo


class RequestBackend(Backend):
    """A backend that sends rows to a server that runs already, so that the backend starts nothing.

    Args:
        info: Name, settings and columns of the stage that sends requests to the server.
        make_stages: Function that makes this stage, in the worker.
        resources: Resources of the operator, as arguments of `Dataset.map_batches`.
        batch_size: Number of rows up to which small blocks are joined.
        check: Function that raises if the server does not exist. The driver calls it for each dataset.
    """

    def __init__(
        self,
        info: StageInfo,
        make_stages: MakeStages,
        resources: OperatorResources,
        batch_size: int,
        check: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(info, resources, batch_size)
        self._make_stages = make_stages
        self._check = check

    def start(self, operators: Sequence[OperatorResources]) -> MakeStages:
        """Checks that the cluster has room and that the server exists, and returns the maker of the stage."""
        check_room(operators)
        if self._check is not None:
            self._check()
        return self._make_stages


def http_backend(config: HttpRequestProcessorConfig) -> Backend:
    """Returns the backend of an HTTP endpoint."""
    stage = config.http_request_stage
    num_processes = _max_processes(config, stage)
    info = StageInfo("HttpRequestStage", stage, (columns.PAYLOAD,), (columns.MODEL,))
    make = functools.partial(make_http_stages, config, num_processes)
    return RequestBackend(info, make, _request_resources(config, stage), _batch_size(config, stage))


def serve_backend(config: ServeDeploymentProcessorConfig) -> Backend:
    """Returns the backend of a deployment of Ray Serve."""
    stage = StageConfig()
    num_processes = _max_processes(config, stage)
    info = StageInfo("ServeDeploymentStage", config, (columns.METHOD, columns.REQUEST_KWARGS), (columns.DTYPE,))
    make = functools.partial(make_serve_stages, config, num_processes)
    check = functools.partial(check_deployment, config.deployment_name, config.app_name)
    return RequestBackend(info, make, _request_resources(config, stage), _batch_size(config, stage), check)


def make_http_stages(config: HttpRequestProcessorConfig, num_processes: int) -> list[Stage]:
    """Returns a list with one stage, which posts the payloads of rows to the HTTP endpoint.

    Args:
        config: Settings of the processor, with limits on the requests of the whole job.
        num_processes: Number of processes of the operator; each stage gets an equal share of the limits.
    """
    from ..stages.backends.http import HttpRequestStage
    from ..stages.backends.pace import RetryRule

    stage = HttpRequestStage(
        config.url,
        headers={name: secret.get_secret_value() for name, secret in (config.headers or {}).items()},
        qps=None if config.qps is None else config.qps / num_processes,
        retry=RetryRule(config.max_retries, config.base_retry_wait_time_in_s, config.max_retry_wait_time_in_s),
        request_timeout_s=config.request_timeout_s,
        max_response_bytes=config.max_response_bytes,
        max_concurrent_requests=_share(config, num_processes),
        session_factory=config.session_factory,
        follow_other_origins=config.follow_other_origins,
        stop_on_error=config.stop_on_error,
    )
    return [stage]


def make_serve_stages(config: ServeDeploymentProcessorConfig, num_processes: int) -> list[Stage]:
    """Returns a list with one stage, which calls the Ray Serve deployment.

    Args:
        config: Settings of the processor, with limits on the requests of the whole job.
        num_processes: Number of processes of the operator; each stage gets an equal share of the limits.
    """
    from ..stages.backends.serve import ServeDeploymentStage, connect

    stage = ServeDeploymentStage(
        connect(config.deployment_name, config.app_name),
        dtype_mapping=config.dtype_mapping,
        stream=config.stream,
        request_timeout_s=config.request_timeout_s,
        max_concurrent_requests=_share(config, num_processes),
        stop_on_error=config.stop_on_error,
    )
    return [stage]


def check_deployment(deployment_name: str, app_name: str) -> None:
    """Raises if Ray Serve does not run a deployment.

    Args:
        deployment_name: Name of the deployment.
        app_name: Name of its application.

    Raises:
        ConfigError: The deployment does not exist, or Ray Serve is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"Ray Serve is not installed ({error}); run: pip install 'millrace[serve]'") from error
    applications = serve.status().applications
    if app_name not in applications:
        raise ConfigError(f"Ray Serve runs no application {app_name!r}; it runs: {_listed(applications)}")
    deployments = applications[app_name].deployments
    if deployment_name not in deployments:
        raise ConfigError(
            f"application {app_name!r} has no deployment {deployment_name!r}; it has: {_listed(deployments)}"
        )


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "none"


def _share(config: RequestProcessorConfig, num_processes: int) -> int:
    return max(1, config.max_concurrent_requests // num_processes)


def _batch_size(config: RequestProcessorConfig, stage: StageConfig) -> int:
    """Returns the rows of a block: `batch_size`, or more if the blocks under way would hold too few requests."""
    return rows_per_block(_share(config, _max_processes(config, stage)), stage.batch_size or config.batch_size)


def _max_processes(config: RequestProcessorConfig, stage: StageConfig) -> int:
    size = stage.concurrency or config.concurrency
    return size if isinstance(size, int) else size[1]


def _request_resources(config: RequestProcessorConfig, stage: StageConfig) -> dict[str, Any]:
    """Returns the resources of the operator: `concurrency` processes, each with a thread for every block under way."""
    size = stage.concurrency or config.concurrency
    low, high = size if isinstance(size, tuple) else (size, size)
    compute = ActorPoolStrategy(
        min_size=low,
        max_size=high,
        max_concurrent_calls_per_actor=num_blocks(_share(config, high), _batch_size(config, stage)),
        enable_true_multi_threading=True,
    )
    asked = {
        "num_cpus": stage.num_cpus or OPERATOR_CPUS,
        "memory": stage.memory,
        "runtime_env": stage.runtime_env or config.runtime_env,
        "compute": compute,
    }
    return {key: value for key, value in asked.items() if value is not None}
