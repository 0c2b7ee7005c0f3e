"""Two processors that call one deployment of Ray Serve; here a small class takes the place of a served model.

python examples/ray_data_llm/15_serve_deployment.py
"""

import json
from typing import Any

import ray
from ray import serve

from millrace.pipeline import ServeDeploymentProcessorConfig, build_processor

WORDS = ["mill", "race", "wheel"]


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Parrot:
    """Answers a conversation with its last message. Its methods are streams, like those of Ray Serve LLM."""

    async def chat(self, request: dict[str, Any]) -> Any:
        """Answers in capitals."""
        yield {"answer": request["messages"][-1]["content"].upper()}


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the method to call, and its arguments."""
    return {"method": "chat", "request_kwargs": {"messages": [{"role": "user", "content": row["item"]}]}}


def again(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a request about the answer."""
    return {"method": "chat", "request_kwargs": {"messages": [{"role": "user", "content": row["answer"] + "!"}]}}


def main() -> None:
    """Serves the class, and sends rows through it twice."""
    serve.start(http_options={"location": "NoServer"})
    serve.run(Parrot.bind(), name="parrots", route_prefix=None)
    config = ServeDeploymentProcessorConfig(deployment_name="Parrot", app_name="parrots")
    keep = ["item", "answer"]
    with (
        build_processor(config, preprocess, lambda row: {name: row[name] for name in keep}) as first,
        build_processor(config, again, lambda row: {name: row[name] for name in keep}) as second,
    ):
        for row in second(first(ray.data.from_items(WORDS))).take_all():
            print(json.dumps(row))
    serve.shutdown()


if __name__ == "__main__":
    main()
