"""A server on this machine that answers like an OpenAI-compatible endpoint, well or badly."""

import contextlib
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

    A response that is None never comes. A response may be a function of the request's body; it is
    called in the order of the requests. Nothing is answered before there are `together` requests.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, *responses, together=1):
        super().__init__(("127.0.0.1", 0), Handler)
        self.responses, self.together = responses, together
        self.requests: list[tuple[str, dict]] = []
        self.lock = threading.Lock()
        self.answering, self.end = threading.Event(), threading.Event()
        self.running = self.most_running = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        request = self._read()
        if request is None:
            return
        server = self.server
        with server.lock:
            response = server.responses[min(len(server.requests), len(server.responses) - 1)]
            if callable(response):
                response = response(request[1])
            server.requests.append(request)
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            if len(server.requests) >= server.together:
                server.answering.set()
        (server.end if response is None else server.answering).wait()
        with server.lock:  # before the client can know, and send the next request
            server.running -= 1
        with contextlib.suppress(OSError):  # the client has gone
            self.wfile.write(response or b"")

    def _read(self):
        """Return head and body of the request; None if the client has gone before its end."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return None
            head += line
        text = head.decode()
        (length,) = (s.split(":")[1] for s in text.lower().split("\r\n") if "content-length" in s)
        body = self.rfile.read(int(length))
        return (text, json.loads(body)) if len(body) == int(length) else None


@contextmanager
def serving(*responses, **options):
    server = Server(*responses, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.end.set()
        server.answering.set()
        server.shutdown()
        thread.join()
        server.server_close()
