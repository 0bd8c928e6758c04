"""A server on this machine that answers like an OpenAI-compatible endpoint, well or badly."""

import json
import socketserver
import threading
from contextlib import contextmanager

PROGRAM = "def merge_models(task_vectors):\n    return 0\n"


def http(body: bytes | str, status: str = "200 OK", *headers: str, length: int | None = None):
    """Return the bytes of a response."""
    body = body.encode() if isinstance(body, str) else body
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {size}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def completion(content=f"Here it is:\n```python\n{PROGRAM}```", finish="stop", usage=(10, 20)):
    answer = {"choices": [{"message": {"content": content}, "finish_reason": finish}]}
    if usage is not None:
        answer["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
    return http(json.dumps(answer))


class Server(socketserver.ThreadingTCPServer):
    """Answers each request with the next of some responses, and then with the last one again.

    A response that is None never comes.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, *responses: bytes | None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.responses = responses
        self.requests: list[tuple[str, dict]] = []
        self.lock, self.end = threading.Lock(), threading.Event()
        self.running = self.most_running = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        head = b"".join(iter(self.rfile.readline, b"\r\n")).decode()
        (length,) = (s.split(":")[1] for s in head.lower().split("\r\n") if "content-length" in s)
        body = json.loads(self.rfile.read(int(length)))
        server = self.server
        with server.lock:
            number = min(len(server.requests), len(server.responses) - 1)
            server.requests.append((head, body))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        response = server.responses[number]
        if response is None:
            server.end.wait(20)
        else:
            self.wfile.write(response)
        with server.lock:
            server.running -= 1


@contextmanager
def serving(*responses):
    server = Server(*responses)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.end.set()
        server.shutdown()
        thread.join()
        server.server_close()
