"""A server of buckets in memory: as much of Google Cloud Storage's JSON API as gcsfs, tensorstore and orbax use.

Uploads appear once they are complete, and conditions on generations hold, as in a real bucket; a listing shows at once
what was written.
"""

import contextlib
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = 7  # the most objects and folders in one answer, so that listings have several pages


class FakeBucket(ThreadingHTTPServer):
    """One bucket: `objects` {name: (generation, bytes)}. `refuses(method, name)` decides what is answered with 403."""

    daemon_threads = True

    def __init__(self, name: str):
        super().__init__(("localhost", 0), Handler)
        self.name, self.lock = name, threading.Lock()
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, bytes]] = {}  # {id: (name of the object, bytes received)}
        self.refuses: Callable[[str, str], bool] = lambda method, name: False
        self.last = 1000  # generation, or id of an upload

    def handle_error(self, request, client_address):
        """A client that hangs up is no error: gcsfs sends two requests at once, and takes the first answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def following(self) -> int:
        with self.lock:
            self.last += 1
            return self.last


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    server: FakeBucket

    def log_message(self, *_):
        pass

    def answer(self, status: int, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status: int, message: str):
        self.answer(status, {"error": {"code": status, "message": message}})

    def handle_request(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client was killed
            self.close_connection = True
            return
        parts = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/([^/]+))?)?", url.path)
        if parts is None:
            return self.error(501, f"this server knows no {self.command} {self.path}")
        kind, bucket, listing, name = (part and urllib.parse.unquote(part) for part in parts.groups())
        name = name or self.query.get("name", "")
        if bucket != self.server.name:
            return self.error(404, "The specified bucket does not exist.")
        if self.server.refuses(self.command, name):
            return self.error(403, f"somebody does not have storage access to {name or bucket}")
        if listing is None:
            return self.answer(200, {"kind": "storage#bucket", "name": bucket})
        if kind == "/upload":
            return self.upload(name, body)
        if not name:
            return self.answer(200, self.listed())
        with self.server.lock:
            generation, content = self.server.objects.get(name, (0, b""))
            unmet = self.unmet(generation)
            if self.command == "DELETE" and generation and not unmet:
                del self.server.objects[name]
        if not generation:
            return self.error(404, f"No such object: {bucket}/{name}")
        if unmet:
            return self.error(unmet, "a condition is not met")
        if self.command == "DELETE":
            return self.answer(204)
        if self.query.get("alt") != "media":
            return self.answer(200, self.resource(name))
        self.content(generation, content)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def unmet(self, generation: int) -> int | None:
        """The status for a condition in the query that does not hold."""
        if "ifGenerationMatch" in self.query and int(self.query["ifGenerationMatch"]) != generation:
            return 412
        return 304 if self.query.get("ifGenerationNotMatch") == str(generation) else None

    def content(self, generation, content):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {"X_Goog_Generation": str(generation), "Content_Type": "application/octet-stream"}
        if wanted is None:
            return self.answer(200, content, **headers)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if begin >= len(content):
            return self.error(416, "beyond the end")
        self.answer(206, content[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{len(content)}", **headers)

    def resource(self, name: str) -> dict:
        generation, content = self.server.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.server.name,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "contentType": "application/octet-stream",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def listed(self) -> dict:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        with self.server.lock:
            found = {}  # {name, or the part of it up to the delimiter: its resource, or None for a folder}
            for name in sorted(self.server.objects):
                if name.startswith(prefix):
                    head, mark, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                    found[prefix + head + mark if mark else name] = None if mark else self.resource(name)
        rest = [entry for entry in found if entry > self.query.get("pageToken", "")]
        page = rest[: min(int(self.query.get("maxResults", PAGE)), PAGE)]
        return {
            "kind": "storage#objects",
            "items": [found[entry] for entry in page if found[entry]],
            "prefixes": [entry for entry in page if not found[entry]],
        } | ({"nextPageToken": page[-1]} if page and len(page) < len(rest) else {})

    def upload(self, name: str, body: bytes):
        kind = self.query["uploadType"]
        if kind == "media":
            return self.stored(name, body)
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()
            head, content = body.split(b"--" + boundary)[1:3]
            head, content = (part.lstrip().partition(b"\n\n")[2] for part in (head, content))
            return self.stored(name or json.loads(head)["name"], content.removesuffix(b"\n"))
        if "upload_id" not in self.query:
            name, number = name or json.loads(body)["name"], str(self.server.following())
            self.server.uploads[number] = name, b""
            host, port = self.server.server_address
            address = f"http://{host}:{port}/upload/storage/v1/b/{self.server.name}/o"
            return self.answer(200, Location=f"{address}?uploadType=resumable&upload_id={number}")
        name, before = self.server.uploads[self.query["upload_id"]]
        self.server.uploads[self.query["upload_id"]] = name, before + body
        total = re.fullmatch(r"bytes .+/(\d+|\*)", self.headers.get("Content-Range") or "bytes */0")[1]
        if total == "*" or len(before + body) < int(total):
            return self.answer(308, Range=f"bytes=0-{len(before + body) - 1}")
        del self.server.uploads[self.query["upload_id"]]
        self.stored(name, before + body)

    def stored(self, name: str, content: bytes):
        generation = self.server.following()
        with self.server.lock:
            unmet = self.unmet(self.server.objects.get(name, (0, b""))[0])
            if not unmet:
                self.server.objects[name] = generation, content
        if unmet:
            return self.error(unmet, "a condition is not met")
        self.answer(200, self.resource(name))


@contextlib.contextmanager
def running(name: str) -> Iterator[tuple[FakeBucket, dict[str, str]]]:
    """Yields the bucket and the environment in which libraries take it for Google's."""
    with FakeBucket(name) as bucket:
        thread = threading.Thread(target=bucket.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        address = f"http://localhost:{bucket.server_port}"
        try:
            yield (
                bucket,
                {
                    "STORAGE_EMULATOR_HOST": address,
                    "TENSORSTORE_GCS_HTTP_URL": address,
                    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                },
            )
        finally:
            bucket.shutdown()
            thread.join()
