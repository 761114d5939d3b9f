"""The few endpoints of the Hugging Face Hub that a push uses, on loopback; what was sent is kept."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """repos: name -> {"private": bool, "files": {path: bytes}, "commits": [...]}; `fail`: path part -> status."""

    def __init__(self):
        self.repos, self.blobs, self.requests, self.fail = {}, {}, [], {}
        self.role = "write"
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def _answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, found = hub.answer(self.command, self.path.partition("?")[0], body, self.headers)
                text = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                if isinstance(found, dict) and "error" in found:
                    self.send_header("X-Error-Message", found["error"])
                    if status == 404:
                        self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = _answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, method, path, body, headers):
        self.requests.append((method, path))
        for part, status in self.fail.items():
            if part in path:
                return status, {"error": f"refused {part}"}
        if path.startswith("/blobs/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if headers.get("Authorization") != "Bearer good":
            return 401, {"error": "Invalid token"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in self.repos:
                return 409, {"error": "exists", "url": f"{self.url}/{name}"}
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.repos[name] = {"private": private, "files": {}, "commits": []}
            return 200, {"url": f"{self.url}/{name}"}
        name, _, rest = path.removeprefix("/api/models/").lstrip("/").partition(".git/")
        if not rest:
            owner, short, *more = name.split("/")
            name, rest = f"{owner}/{short}", "/".join(more)
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        return self._of_repo(name, self.repos[name], rest, body)

    def _of_repo(self, name, repo, rest, body):
        if rest == "info/lfs/objects/batch":
            asked = json.loads(body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{self.url}/blobs/{one['oid']}"}}} for one in asked]
            return 200, {"transfer": "basic", "objects": actions}
        if rest.startswith("preupload/"):
            asked = json.loads(body)["files"]
            mode = [("lfs" if one["path"].endswith(".safetensors") else "regular") for one in asked]
            return 200, {
                "files": [{"path": o["path"], "uploadMode": m, "shouldIgnore": False} for o, m in zip(asked, mode)]
            }
        if rest.startswith("commit/"):
            return 200, self._commit(name, repo, [json.loads(line) for line in body.splitlines()])
        if rest.startswith("tree/"):
            return 200, [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in repo["files"].items()]
        siblings = [{"rfilename": path} for path in repo["files"]]
        return 200, {"id": name, "modelId": name, "private": repo["private"], "siblings": siblings, "sha": "0" * 40}

    def _commit(self, name, repo, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                repo["files"][value["path"]] = content
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]
        repo["commits"].append(lines)
        return {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40}
