"""A Hugging Face Hub on this machine, with all that ``huggingface_hub`` needs to download files.

with HubServer({"org/name": {"config.json": b"..."}}) as hub:
    ...  # HF_ENDPOINT=hub.url in a new process; hub.requests lists the requests
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves repositories.

    repositories: {name: {file name: bytes}}.   gated: names of those that answer "ask for access".
    """

    def __init__(self, repositories, gated=()):
        self.repositories, self.gated = repositories, set(gated)
        self.requests = []

    def commit(self, name):
        """The one commit of a repository, on its branch main."""
        return hashlib.sha1(name.encode()).hexdigest()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def respond(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
        else:
            name = path[1:].partition("/resolve/")[0]
        if name not in hub.repositories:
            return self.fail(401, "RepoNotFound", "Repository Not Found")
        if name in hub.gated:
            return self.fail(403, "GatedRepo", "Access to this repository is restricted")
        if path.startswith("/api/models/"):
            return self.api(name, path.split("/")[5:])
        revision, _, file = path.partition("/resolve/")[2].partition("/")
        if revision not in ("main", hub.commit(name)):
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in hub.repositories[name]:
            return self.fail(404, "EntryNotFound", "Entry not found", commit=hub.commit(name))
        data = hub.repositories[name][file]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self.send(200, data, {"X-Repo-Commit": hub.commit(name), "ETag": etag})

    def api(self, name, rest):
        files = self.hub.repositories[name]
        commit = self.hub.commit(name)
        if rest[:1] == ["tree"]:
            folder = "/".join(rest[2:])
            if folder:
                return self.fail(404, "EntryNotFound", "Entry not found", commit=commit)
            listing = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for file, data in files.items()
            ]
        else:
            listing = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": []}
            listing["siblings"] = [{"rfilename": file} for file in files]
        self.send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def fail(self, status, code, message, commit=None):
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        if commit:
            headers["X-Repo-Commit"] = commit
        self.send(status, message.encode(), headers)

    def send(self, status, data, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(data)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass
