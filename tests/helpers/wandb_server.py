"""A minimal W&B server on the loopback, enough for a run to be online; it can stop answering."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "p", "name": "cifar_dist", "entity": {"id": "e", "name": "me"}}
BUCKET = {"id": "b", "displayName": "x", "description": "", "config": "{}", "sweepName": None}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect: the tests do that."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.deaf = threading.Event()  # all requests wait from now on
        self.over = threading.Event()
        self.rows: list[Any] = []  # of W&B's history

    @property
    def environment(self) -> dict[str, str]:
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}",
            "WANDB_API_KEY": "0" * 40,
            "no_proxy": "127.0.0.1",
        }


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.deaf.is_set():
            self.server.over.wait()
            return
        answer: dict[str, Any] = {}
        if self.command == "POST" and self.path == "/graphql":
            answer = {"data": self.data(json.loads(body))}
        elif self.path.endswith("file_stream"):
            files = json.loads(body).get("files") or {}
            lines = files.get("wandb-history.jsonl", {"content": []})["content"]
            self.server.rows += [json.loads(line) for line in lines]
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_HEAD = do_GET

    def data(self, asked: dict[str, Any]) -> dict[str, Any]:
        query, variables = asked["query"], asked.get("variables") or {}
        if "UpsertBucket" in query:
            bucket = BUCKET | {"name": variables.get("name"), "project": PROJECT}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        if "CreateRunFiles" in query:
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        return {"viewer": USER, "serverInfo": None}


@contextmanager
def wandb_server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
