"""Sends rows to an endpoint with OpenAI's protocol; here a small server takes its place.

python examples/ray_data_llm/04_http_endpoint.py
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray

from millrace.pipeline import HttpRequestProcessorConfig, build_processor

WORDS = ["mill", "race", "wheel"]


class Parrot(BaseHTTPRequestHandler):
    """Answers a conversation with its last message, in capitals."""

    def do_POST(self) -> None:
        """Answers one request."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": asked["messages"][-1]["content"].upper()}
        body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Writes no log."""


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the payload to post."""
    return {"payload": {"model": "parrot", "messages": [{"role": "user", "content": row["item"]}]}}


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the columns to keep of the response."""
    return {"word": row["item"], "answer": row["http_response"]["choices"][0]["message"]["content"]}


def main() -> None:
    """Starts the server and sends it the rows."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Parrot) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = HttpRequestProcessorConfig(
            url=f"http://127.0.0.1:{server.server_port}/v1/chat/completions",
            headers={"Authorization": "Bearer none"},
            qps=100,
            max_retries=2,
        )
        with build_processor(config, preprocess=preprocess, postprocess=postprocess) as processor:
            for row in processor(ray.data.from_items(WORDS)).take_all():
                print(json.dumps(row))
        server.shutdown()


if __name__ == "__main__":
    main()
