"""HTTP for the server: access, time limits for clients, errors in OpenAI's format.

mlx-lm's handler computes and formats the answers; what reaches it was validated by `requests`.
"""

from __future__ import annotations

import copy
import hmac
import io
import json
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from huggingface_hub import scan_cache_dir
from mlx_lm import server

from pagedkv.errors import OutOfBlocksError, PagedKVError
from pagedkv.mlx_lm.requests import ChatRequest, RequestError, TextRequest, parse, validated

LARGEST_BODY = 2**25  # bytes
TOGETHER = 16  # prompts of a request that are answered at once
LOOPBACK = "localhost", "127.0.0.1", "::1"
PATHS: dict[str, Any] = {
    "/v1/completions": TextRequest,
    "/v1/chat/completions": ChatRequest,
    "/chat/completions": ChatRequest,
}


@dataclass(frozen=True)
class Limits:
    """What clients are held to.

    Attributes
    ----------
    api_key : str or None
        Key expected in ``Authorization: Bearer``; None accepts any request.
    any_model : bool
        Whether clients may ask for other models than the command line's.
    request_templates : bool
        Whether a request may bring a chat template.
    read_seconds : float
        Time from the connection to the end of the request body.
    write_seconds : float
        Time that a client may take to read a part of the answer.
    connections : int
        At once.
    """

    api_key: str | None = None
    any_model: bool = False
    request_templates: bool = False
    read_seconds: float = 30.0
    write_seconds: float = 60.0
    connections: int = 512


class _Stopped(BaseException):
    """Leaves mlx-lm's handler, which catches each Exception and answers 404."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _Guarded:
    """What mlx-lm's handler sees of the `Responses`: an error of theirs comes out of it."""

    def __init__(self, own: Any, connection: socket.socket, salt: str | None) -> None:
        self._own, self._connection, self._salt = own, connection, salt

    @property
    def cli_args(self) -> Any:
        return self._own.cli_args

    def generate(self, request: Any, *arguments: Any, **options: Any) -> Any:
        request.salt = self._salt
        try:
            return self._own.generate_for(self._connection, request, *arguments, **options)
        except Exception as error:
            raise _Stopped(error) from None


class _Until(socket.SocketIO):
    """Reads from a socket until a time, on the clock of `time.monotonic`."""

    def __init__(self, connection: socket.socket, end: float) -> None:
        super().__init__(connection, "r")
        self._connection, self._end = connection, end

    def readinto(self, buffer: Any) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("expected the request sooner")
        self._connection.settimeout(left)
        return super().readinto(buffer)


class Handler(server.APIHandler):
    """Answers one request; the connection is closed then.

    Attributes
    ----------
    limits : Limits
        What clients are held to.
    hosts : frozenset of str or None
        Names that the Host header may have, None for any.
    """

    limits: Limits
    hosts: frozenset[str] | None
    response_generator: Any
    wfile: Any
    _headers_buffer: list[bytes]
    _is_part = False

    def setup(self) -> None:
        """Begin with a connection."""
        super().setup()
        end = time.monotonic() + self.limits.read_seconds
        self.rfile = io.BufferedReader(_Until(self.connection, end))
        self._index, self._began, self._streams, self._asked = 0, False, False, ""
        self._salt: str | None = None

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log a request."""
        logging.debug("%s %s", self.address_string(), format % arguments)

    def do_GET(self) -> None:  # noqa: N802
        """Answer what is asked of the server."""
        self._answer(self._get)

    def do_POST(self) -> None:  # noqa: N802
        """Answer a request to the model."""
        self._answer(self._post)

    def do_OPTIONS(self) -> None:  # noqa: N802
        """Answer a browser's preflight request."""
        self._answer(super().do_OPTIONS)

    def _answer(self, own: Callable[[], None]) -> None:
        """Run a method, and answer with its error if it has one."""
        self.path = self.path.partition("?")[0]
        try:
            self._admit()
            own()
        except _Stopped as stopped:
            self._refuse(stopped.error)
        except Exception as error:
            self._refuse(error)

    def _admit(self) -> None:
        """Raise RequestError for a client that may not ask."""
        host = self.headers.get("Host", "").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").rstrip(".")
        if self.hosts is not None and host and name not in self.hosts:
            # A page of any site can have its own name resolve to this machine.
            raise RequestError(f"expected a Host of {', '.join(sorted(self.hosts))}", status=403)
        origin, allowed = self.headers.get("Origin"), self._origins()
        if origin is not None and "*" not in allowed and origin not in allowed:
            raise RequestError(f"expected an origin of --allowed-origins, got {origin}", status=403)
        key = self.limits.api_key
        if key is not None and self.command != "OPTIONS" and self.path != "/health":
            said = self.headers.get("Authorization", "")
            if not hmac.compare_digest(said.encode(), f"Bearer {key}".encode()):
                raise RequestError(
                    "expected the API key in Authorization: Bearer",
                    status=401,
                    code="invalid_api_key",
                )

    def _origins(self) -> list[str]:
        origins: list[str] = self.response_generator.cli_args.allowed_origins
        return origins

    def _set_cors_headers(self) -> None:
        if self._origins():
            super()._set_cors_headers()  # type: ignore[no-untyped-call]

    def _get(self) -> None:
        if self.path == "/metrics":
            content, kind = self.response_generator.metrics.render()
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif self.path == "/health":
            self.handle_health_check()  # type: ignore[no-untyped-call]
        elif self.path == "/v1/models" or self.path.startswith("/v1/models/"):
            self._list_models()
        else:
            raise RequestError(f"there is no {self.path[:200]}", status=404)

    def _list_models(self) -> None:
        own = self.response_generator.cli_args.model
        names = [] if own is None else [own]
        if self.limits.any_model:
            try:
                found = scan_cache_dir().repos
                names += sorted(repo.repo_id for repo in found if repo.repo_type == "model")
            except Exception as error:  # no cache is there, or a broken one
                logging.info(f"No cached models are listed: {error}")
        models = [{"id": name, "object": "model", "created": self.created} for name in names]
        asked = unquote(self.path.removeprefix("/v1/models"))[1:]
        if not asked:
            self._send_json(200, {"object": "list", "data": models})
            return
        for model in models:
            if model["id"] == asked:
                self._send_json(200, model)
                return
        raise RequestError(f"there is no model {asked[:200]}", status=404, code="model_not_found")

    def _post(self) -> None:
        kind = PATHS.get(self.path)
        if kind is None:
            raise RequestError(f"there is no {self.path[:200]}", status=404)
        content = self._read()
        self.connection.settimeout(self.limits.write_seconds)
        body = parse(content)
        request = validated(kind, body)
        responses = self.response_generator
        if not responses.is_healthy:
            raise RequestError("the model is not loaded yet", status=503)
        self._check_model(request)
        provider = responses.model_provider
        self._asked = request.model or "default_model"
        prompts: list[Any] = []
        if isinstance(request, ChatRequest):
            request.check(
                allows_templates=self.limits.request_templates,
                has_images=provider.processor is not None,
            )
            provider.check_size(request.size, ())
        else:
            prompts = request.prompts
            for prompt in prompts:
                provider.check_size(len(prompt), prompt if isinstance(prompt, list) else ())
        self._salt = request.cache_salt
        own = request.normalized(body)
        if not self.limits.any_model:
            own["model"] = "default_model"  # another name for it would wait for running answers
        self._streams = own["stream"]
        if len(prompts) > 1:
            self._run_several(own, prompts)
            return
        if prompts:
            [own["prompt"]] = prompts
        self._run(own)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding"):
            raise RequestError("expected a Content-Length, got Transfer-Encoding", status=411)
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise RequestError("expected no Content-Encoding", status=415)
        lengths = {length.strip() for length in self.headers.get_all("Content-Length", ())}
        if not lengths:
            raise RequestError("expected a Content-Length", status=411)
        if len(lengths) > 1:
            raise RequestError("expected one Content-Length, got several")
        [said] = lengths
        if not (said.isascii() and said.isdigit()):
            raise RequestError(f"expected bytes as Content-Length, got {said[:50]!r}")
        if len(said) > 18 or int(said) > LARGEST_BODY:
            raise RequestError(f"expected a body of at most {LARGEST_BODY} bytes", status=413)
        content = self.rfile.read(int(said))
        if len(content) < int(said):
            raise ConnectionAbortedError(f"{len(content)} of {said} bytes came")
        return content

    def _check_model(self, request: Any) -> None:
        """Raise RequestError for another model than the server's, unless any may be asked for."""
        own = self.response_generator.cli_args.model
        if self.limits.any_model or own is None:
            self.response_generator.model_provider.check_paths(
                request.model, request.adapters, request.draft_model
            )
            return
        names = {None, "default_model", own, str(Path(own).resolve())}
        for field, known in (("model", names), ("draft_model", {None, "default_model"})):
            if (name := getattr(request, field)) not in known:
                raise RequestError(
                    f"expected the model {own}, which is the only one served, got {name}",
                    field,
                    status=404,
                    code="model_not_found",
                )
        if request.adapters is not None:
            raise RequestError("expected no adapters: --any-model allows them", "adapters")

    def _run(self, body: dict[str, Any]) -> None:
        """Have mlx-lm's handler answer a valid body."""
        content = json.dumps(body).encode()
        self.rfile = io.BufferedReader(io.BytesIO(content))
        del self.headers["Content-Length"]
        self.headers["Content-Length"] = str(len(content))
        own = self.response_generator
        self.response_generator = _Guarded(own, self.connection, self._salt)
        try:
            super().do_POST()  # type: ignore[no-untyped-call]
        finally:
            self.response_generator = own

    def _run_several(self, body: dict[str, Any], prompts: list[Any]) -> None:
        """Answer several prompts at once, a choice for each."""
        parts = []
        streams = body["stream"]
        if streams:
            self._set_stream_headers(200)
            self.end_headers()
            self._began = True
        events = _Events(self.wfile)
        for index in range(len(prompts)):
            part = copy.copy(self)
            part.headers = copy.copy(self.headers)
            part._index, part._is_part, part._headers_buffer = index, True, []
            part.wfile = events if streams else io.BytesIO()
            parts.append(part)
        waiting = deque(zip(parts, prompts, strict=True))
        errors: list[BaseException] = []

        def answer() -> None:
            with suppress(IndexError):
                while not errors:
                    part, prompt = waiting.popleft()
                    try:
                        part._run({**body, "prompt": prompt})
                    except BaseException as error:
                        errors.append(error)

        threads = [threading.Thread(target=answer, daemon=True) for _ in prompts[:TOGETHER]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        if streams:
            self.wfile.write(b"data: [DONE]\n\n")
            return
        answers = [json.loads(part.wfile.getvalue()) for part in parts]
        whole = answers[0] | {"choices": [choice for one in answers for choice in one["choices"]]}
        usage = [one["usage"] for one in answers]
        names = "prompt_tokens", "completion_tokens", "total_tokens"
        cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usage)
        whole["usage"] = {name: sum(one[name] for one in usage) for name in names}
        whole["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
        self._send_json(200, whole)

    def end_headers(self) -> None:
        """Send the headers, which parts of an answer have none of."""
        if self._is_part:
            self._headers_buffer = []
            return
        self._began = True
        super().end_headers()

    def generate_response(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """As mlx-lm's, with the index of the prompt that is answered."""
        response: dict[str, Any] = super().generate_response(*arguments, **options)
        response["choices"][0]["index"] = self._index
        return response | {"model": self._asked}

    def completion_usage_response(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """As mlx-lm's, with the model that the request named."""
        response: dict[str, Any] = super().completion_usage_response(*arguments, **options)
        return response | {"model": self._asked}

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that `http.server` refuses."""
        said = message or explain or "the request cannot be answered"
        self._refuse(RequestError(said, status=code))

    def _send_json(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, error: Exception) -> None:
        """Answer with an error; an answer that has begun ends with it, if it is a stream."""
        self.close_connection = True
        if isinstance(error, (ConnectionError, TimeoutError)):
            logging.info(f"A client left, or took too long: {error}")
            return
        if not isinstance(error, RequestError):
            error = refusal_of(error)
        if error.status < 500:
            self.response_generator.metrics.refused()
        try:
            if not self._began:
                self._headers_buffer = []
                self._send_json(error.status, error.body())
            elif self._streams:
                self.wfile.write(f"data: {json.dumps(error.body())}\n\n".encode())
        except OSError as gone:
            logging.info(f"A client left: {gone}")


class _Events(io.RawIOBase):
    """Writes events of a stream that several answers share, each whole, but for its end."""

    def __init__(self, out: Any) -> None:
        self._out, self._lock, self._is_broken = out, threading.Lock(), False

    def write(self, content: Any) -> int:
        if content != b"data: [DONE]\n\n":
            with self._lock:
                if self._is_broken:
                    raise ConnectionAbortedError("the client has left")
                self._is_broken = True
                self._out.write(content)
                self._is_broken = False
        return len(content)

    def flush(self) -> None:
        with self._lock:
            self._out.flush()


def refusal_of(error: Exception) -> RequestError:
    """Return the error that a client gets for a server error."""
    if isinstance(error, OutOfBlocksError):
        return RequestError(str(error), status=503)
    if isinstance(error, (ValueError, PagedKVError)):
        return RequestError(str(error))
    logging.error("A request failed", exc_info=error)
    return RequestError(f"the server failed: {error}", status=500)


def is_gone(connection: socket.socket) -> bool:
    """Whether a client has closed its side of a connection."""
    ready, closed = select.poll(), getattr(select, "POLLRDHUP", 0)  # Linux's
    try:
        ready.register(connection, select.POLLIN | closed)
        found = [events for _, events in ready.poll(0)]
        if closed:
            return any(events & (closed | select.POLLHUP | select.POLLERR) for events in found)
        return bool(found) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


class Server(ThreadingHTTPServer):
    """A server with a limited number of connections; more wait in the socket's queue.

    Parameters
    ----------
    address : (str, int)
        Host and port.
    connections : int
        How many.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], connections: int) -> None:
        info, *_ = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, _, _, _, found = info
        self._free, self._connections = threading.Semaphore(connections), connections
        super().__init__(found[:2], Handler)  # type: ignore[arg-type]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread when one is free; close connections that would wait too long."""
        if not self._free.acquire(timeout=5):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and free the thread for the next connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error that a handler did not answer."""
        logging.info("A connection failed", exc_info=True)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` until no connection is open; return whether none is."""
        end = time.monotonic() + seconds
        return all(
            self._free.acquire(timeout=max(end - time.monotonic(), 0.001))
            for _ in range(self._connections)
        )
