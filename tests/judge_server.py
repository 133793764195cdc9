"""An OpenAI-compatible server on 127.0.0.1 that judges by a rule and fails on demand.

The judge prefers the longer answer, p(first) = sigma((length of first - length of second) / 10), and believes in that
whatever the order. `plan` maps a prompt (a word in its text) to the faults of its first requests, in turn.
"""

import gc
import json
import math
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789"


def top_logprobs(p_first: float, mass: float = 0.98) -> list[dict[str, Any]]:
    """Each identifier under two spellings, and something else: what tokenizers really give."""
    shares = [("m", 0.75 * p_first), (" m", 0.25 * p_first), ("M", 0.9 * (1 - p_first)), ("M\n", 0.1 * (1 - p_first))]
    found = [{"token": t, "logprob": math.log(max(mass * p, 1e-30)), "bytes": None} for t, p in shares]
    return [*found, {"token": "The", "logprob": math.log(1 - mass), "bytes": None}]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, plan: dict[str, list[str]], style: str, delay: float, mass: float, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.plan, self.style, self.delay, self.mass = plan, style, delay, mass
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
            prompt = next((name for name in self.server.plan if name in text), "")
            faults = self.server.plan.get(prompt, [])
            fault = faults[self.server.asked[prompt]] if self.server.asked[prompt] < len(faults) else ""
            self.server.asked[prompt] += 1
        time.sleep(self.server.delay)
        self.fail(fault) if fault else self.answer(body, text)

    def fail(self, fault: str) -> None:
        error = {"error": {"message": f"made to fail: {fault}; key {KEY}", "type": "test", "code": None}}
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "truncated":
            self.reply(200, b'{"id": "x", "object": "chat.completion", "choices": [{"index": 0, "mess')
        elif fault == "empty":
            self.reply(200, {"id": "x", "object": "chat.completion", "choices": []})
        elif fault == "text":
            self.reply(200, b"<html>busy</html>", Content_Type="text/html")
        elif fault == "hang":
            time.sleep(3)
            self.close_connection = True
        elif fault == "429 soon":
            self.reply(429, error, Retry_After="0.2")
        elif fault == "429 in an hour":
            self.reply(429, error, Retry_After="3600")
        elif fault == "quota":
            self.reply(429, {"error": error["error"] | {"code": "insufficient_quota"}})
        else:
            self.reply(int(fault), error)

    def answer(self, body: dict[str, Any], text: str) -> None:
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        head = {"id": "x", "created": 0, "model": "judge-2026-01-01", "system_fingerprint": "fp_1", "usage": usage}
        if "prompt" in body:
            found = {"index": 0, "text": f" Answer to {body['prompt']} ", "finish_reason": "stop", "logprobs": None}
            self.reply(200, head | {"object": "text_completion", "choices": [found]})
            return
        style = self.server.style
        if style == "refuses" and "logprobs" in body:
            self.reply(400, {"error": {"message": "logprobs are not supported", "type": "test", "code": None}})
            return
        shown, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])
        first, second = (len(a["text"]) for a in shown["answers"])
        p = 1 / (1 + math.exp((second - first) / 10))
        label = "neither" if style == "babbles" else "m" if p > 0.5 else "M"
        logprobs = None
        if body.get("logprobs") and style == "log-probs":
            logprobs = {
                "content": [{"token": label, "logprob": 0.0, "top_logprobs": top_logprobs(p, self.server.mass)}]
            }
        message = {"role": "assistant", "content": label}
        choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": logprobs}
        self.reply(200, head | {"object": "chat.completion", "choices": [choice]})


@contextmanager
def serve(
    plan: dict[str, list[str]] | None = None, style: str = "log-probs", delay: float = 0.0, mass: float = 0.98
) -> Iterator[Server]:
    """style: "log-probs", "text" (answers without them), "refuses" (status 400 for them) or "babbles"."""
    with Server(plan or {}, style, delay, mass) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            gc.collect()  # a connection that was left open fails the test that left it, not a later one


if __name__ == "__main__":  # python -m tests.judge_server SECONDS: prints its URL, answers after that delay
    server = Server({}, "log-probs", float(sys.argv[1]), 0.98)
    print(server.url, flush=True)
    server.serve_forever()
