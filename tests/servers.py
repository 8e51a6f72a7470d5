"""Servers on loopback that stores are read from: a web server with parts of files, and what goes wrong on the way."""

import http.server
import re
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote


class FileServer:
    """A plain web server of a folder. It sends parts of files, says nothing about what is in a folder, and can fail.

    Attributes:
        asked: How often each path was asked for.
        status: Answer this in place of a file.
        busy: Answer so many requests by 503 first.
        cuts: End so many connections in the middle of what was asked for, each path once.
        silent: Leave so many requests without any answer.
        has_parts: Whether it sends parts of files.
        delay_s: How long it waits before each answer, as a distant one would.
    """

    def __init__(self, folder: Path, delay_s: float = 0) -> None:
        self.delay_s = delay_s
        self.folder, self.asked, self.was_cut = folder, Counter(), set()
        self.status, self.busy, self.cuts, self.silent, self.has_parts = 0, 0, 0, 0, True
        self.waiting, self.lock = threading.Event(), threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize, disable_nagle_algorithm = 1 << 16, True

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                outer.answer(self)

            def do_GET(self):
                outer.answer(self)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # a client that has gone

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.waiting.set()
        self.server.shutdown()
        self.server.server_close()

    def _takes(self, name):
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return left > 0

    def answer(self, request):
        time.sleep(self.delay_s)
        path = unquote(request.path.partition("?")[0]).lstrip("/")
        with self.lock:
            self.asked[path] += 1
        if self._takes("silent"):
            self.waiting.wait(20)
            request.close_connection = True
            return
        file = self.folder / path
        status = self.status or (503 if self._takes("busy") else 200 if file.is_file() else 404)
        size = file.stat().st_size if status == 200 else 0
        asked, start, stop = request.headers.get("Range"), 0, size
        if asked and size and self.has_parts:
            first, last = asked.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, size - int(last))
            stop = min(int(last) + 1, size) if first and last else size
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            request.send_response(status)
        content = part_of(file, start, stop) if size else b""
        request.send_header("Content-Length", str(stop - start))
        request.end_headers()
        if request.command == "HEAD":
            return
        if len(content) > 1 and path not in self.was_cut and self._takes("cuts"):
            self.was_cut.add(path)
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True
            return
        request.wfile.write(content)


def part_of(file, start, stop):
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(stop - start)


@contextmanager
def serving(folder):
    """A `FileServer` of a folder."""
    server = FileServer(folder)
    try:
        yield server
    finally:
        server.close()


class CuttingProxy:
    """Passes connections on to a server, and cuts some of them in the middle of an answer.

    Attributes:
        cuts: How many answers are still to be cut.
        after: Bytes of an answer that pass before.
    """

    def __init__(self, port: int, after: int = 0) -> None:
        self.port, self.after, self.cuts, self.lock = port, after, 0, threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self.listener.close()

    def request(self, content: bytes) -> bytes:
        """What the server gets of a piece of a request."""
        return content

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.port))
            for source, target, is_answer in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass, args=(source, target, is_answer), daemon=True).start()

    def _pass(self, source, target, is_answer):
        passed = 0
        try:
            while content := source.recv(1 << 16):
                content = content if is_answer else self.request(content)
                passed += len(content)
                with self.lock:
                    cut = is_answer and self.cuts > 0 and passed > self.after
                    self.cuts -= cut
                target.sendall(content[: len(content) // 2] if cut else content)
                if cut:
                    break
        except OSError:
            pass
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class GoogleProxy(CuttingProxy):
    """Google's storage in front of an S3 server, which knows its XML requests but not the name of its condition."""

    def request(self, content):
        content = re.sub(rb"(?i)\r\nauthorization: [^\r]*", b"", content)  # an empty token, as nobody signs
        return re.sub(rb"(?i)x-goog-if-generation-match: 0\r\n", b"If-None-Match: *\r\n", content)


if __name__ == "__main__":  # FOLDER DELAY_S: serves until its input ends
    alone = FileServer(Path(sys.argv[1]), float(sys.argv[2]))
    print(alone.url, flush=True)
    sys.stdin.read()
