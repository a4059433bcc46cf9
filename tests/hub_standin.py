"""A stand-in for the Hub's API on loopback: what huggingface_hub asks for while it creates a repository, uploads to it
and loads from it.

What is not here: Xet storage (set `HF_HUB_DISABLE_XET=1`), branches, organisations, quotas.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER = "tester"
COMMIT = "0" * 40
LARGE = (".safetensors", ".bin", ".pt")
MISSING = {"error": "Entry not found"}


@dataclass
class Repo:
    private: bool
    messages: list[str] = field(default_factory=list)  # of its commits
    files: dict[str, bytes] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)  # files that came by LFS


class HubStandIn:
    """
    Serves `repos` at `url`.

    Args:
        tokens (`dict[str, float]`): Commits that each token is good for; after them it is refused, like an unknown
            one.
    """

    def __init__(self, tokens: dict[str, float]):
        self.tokens = {f"Bearer {token}": commits for token, commits in tokens.items()}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.asked.append(f"{self.command} {self.path}")
                code, payload = hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                self.send_response(code)
                if code == 401:
                    self.send_header("X-Error-Message", payload["error"])
                if payload is MISSING:
                    self.send_header("X-Error-Code", "EntryNotFound")
                if isinstance(payload, bytes):
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                else:
                    self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_HEAD = answer

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> tuple[int, dict | bytes]:
        path = path.partition("?")[0]
        if method == "PUT" and path.startswith("/storage/"):  # a signed address: no token is shown there
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if self.tokens.get(authorization, 0) <= 0:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if (method, path) == ("POST", "/api/repos/create"):
            asked = json.loads(body)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            known = name in self.repos
            self.repos.setdefault(name, Repo(private=asked.get("visibility") == "private"))
            return 409 if known else 200, {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if (method, path) == ("GET", "/api/whoami-v2"):
            return 200, {"type": "user", "name": USER, "orgs": []}
        if (method, path) == ("POST", "/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if method == "POST" and path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.url}/storage/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        for name, repo in self.repos.items():
            start = f"/api/models/{name}"
            if (method, path) == ("POST", f"{start}/preupload/main"):
                # The Hub knows all of gitignore's patterns; here a line is the name of a folder
                ignored = tuple((json.loads(body).get("gitIgnore") or "").split())
                return 200, {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": bool(ignored) and file["path"].startswith(ignored),
                            "oid": None,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            if (method, path) == ("POST", f"{start}/commit/main"):
                self.tokens[authorization] -= 1
                return self.commit(repo, [json.loads(line) for line in body.splitlines()], name)
            if method == "GET" and path in (start, f"{start}/revision/main"):
                siblings = [{"rfilename": file} for file in repo.files]
                return 200, {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": repo.private}
            if method == "GET" and path.startswith(f"{start}/tree/"):
                return 404, MISSING  # asked for folders of chat templates alone
            for revision in ("main", COMMIT):
                if method in ("GET", "HEAD") and path.startswith(f"/{name}/resolve/{revision}/"):
                    content = repo.files.get(path.removeprefix(f"/{name}/resolve/{revision}/"))
                    return (404, MISSING) if content is None else (200, content)
        return 404, {"error": f"{method} {path} is not served here"}

    def commit(self, repo: Repo, items: list[dict], name: str) -> tuple[int, dict]:
        for item in items:
            value = item["value"]
            if item["key"] == "header":
                repo.messages.append(value["summary"])
            elif item["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repo.files[value["path"]] = self.objects[value["oid"]]
                repo.large.add(value["path"])
            else:
                return 400, {"error": f"{item['key']} is not served here"}
        oid = f"{len(repo.messages):040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}
