"""A small Hugging Face Hub on this machine: repositories, revisions, downloads and commits."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """`repositories` is {"org/name": [{path: bytes}, …]}, one dict per commit; `requests` are those received."""

    def __init__(self):
        self.repositories, self.requests = {}, []
        self.cut_downloads = False  # send half of each file, then close
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    half = hub.cut_downloads and "resolve" in self.path
                    self.wfile.write(body[: len(body) // 2] if half else body)
                    if half:
                        self.close_connection = True

            def answer_json(self, content, status=200):
                self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

            def missing(self, code):
                self.answer(404, b"{}", X_Error_Code=code, X_Error_Message=code)

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/main", path)
                if match and match[1] in hub.repositories:
                    files = hub.repositories[match[1]][-1]
                    return self.answer_json(
                        [
                            {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                            for name, body in files.items()
                        ]
                    )
                match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
                if match is None:
                    return self.missing("RepoNotFound")
                repository, revision, name = match.groups()
                commits = hub.repositories.get(repository)
                if commits is None:
                    return self.missing("RepoNotFound")
                number = len(commits) - 1 if revision == "main" else hub.number_of(revision)
                if not 0 <= number < len(commits):
                    return self.missing("RevisionNotFound")
                if name not in commits[number]:
                    return self.missing("EntryNotFound")
                body = commits[number][name]
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                self.answer(200, body, ETag=etag, X_Repo_Commit=hub.commit(number))

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                path = urllib.parse.urlsplit(self.path).path
                hub.requests.append(("POST", path))
                if self.headers.get("Authorization") != "Bearer hf_test":
                    return self.answer_json({"error": "Unauthorized"}, 401)
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    hub.repositories.setdefault(repository, [{}])
                    return self.answer_json({"url": f"{hub.url}/{repository}", "name": repository})
                if path == "/api/validate-yaml":
                    return self.answer_json({"errors": [], "warnings": []})
                match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
                if match is None:
                    return self.missing("RepoNotFound")
                repository = match[1]
                if match[2] == "preupload":
                    files = [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                    return self.answer_json({"files": files})
                files = dict(hub.repositories[repository][-1])
                for line in body.decode().splitlines():
                    row = json.loads(line)
                    if row["key"] == "file":
                        files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                    elif row["key"] == "deletedFile":
                        files.pop(row["value"]["path"])
                hub.repositories[repository].append(files)
                number = len(hub.repositories[repository]) - 1
                url = f"{hub.url}/{repository}/commit/{hub.commit(number)}"
                return self.answer_json({"commitUrl": url, "commitOid": hub.commit(number), "success": True})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @staticmethod
    def commit(number):
        """Forty digits that name a commit."""
        return f"{number:040x}"

    @staticmethod
    def number_of(revision):
        """The number of a commit, or -1."""
        return int(revision, 16) if re.fullmatch(r"[0-9a-f]{40}", revision) else -1


@contextlib.contextmanager
def fake_hub():
    """Runs a hub while the context lasts."""
    hub = FakeHub()
    threading.Thread(target=hub.server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
