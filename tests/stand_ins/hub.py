"""A stand-in for the Hub that speaks enough of its protocol for huggingface_hub's real client. Standard library only.

Repositories live in memory: a list of commits, each a whole tree, and branches that point at them. Tokens belong to
users, who may write to repositories below their own name and see their own private ones.
"""

import base64
import binascii
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".png", ".msgpack")
LFS_FROM = 10 * 2**20  # bytes; larger files go to LFS whatever their name
TYPES = ("models", "datasets", "spaces")
# What the real endpoint knows many more of; enough for our cards to be told that they are wrong.
CARD_VALUES = {
    "license": {"apache-2.0", "mit", "llama2", "llama3", "gemma", "cc-by-4.0", "cc-by-sa-4.0", "other", "unknown"},
    "pipeline_tag": {"image-text-to-text", "visual-question-answering", "text-generation"},
    "base_model_relation": {"adapter", "merge", "quantized", "finetune"},
}


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it lies in LFS."""

    content: bytes
    lfs: bool = False

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As the tree lists it."""
        found = {"type": "file", "oid": self.git_oid, "size": len(self.content), "path": path}
        if self.lfs:
            found["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return found


@dataclass
class Repo:
    """Commits by id, each with its tree, and the branches."""

    private: bool
    trees: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, Blob], message: str) -> str:
        text = json.dumps([len(self.messages), message, {path: blob.sha256 for path, blob in tree.items()}])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.trees[oid] = tree
        self.messages.append(message)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or commit id names."""
        return self.branches.get(revision, revision if revision in self.trees else None)


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str | None = None, message: str = "", body: Any = None, **headers: str):
        super().__init__(message or code)
        self.status, self.body = status, body if body is not None else {"error": message or code}
        self.headers = dict(headers)
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


class HubStandIn:
    """
    The server. `with HubStandIn({"hf_me": "me"}) as hub:` serves at `hub.endpoint`.

    Args:
        users (`dict[str, str]`): By token, the name of its user.
    """

    def __init__(self, users: dict[str, str]):
        self.users = users
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, user
        self.lock = threading.Lock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    # ---- what tests look at and prepare ----

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.repos[kind, name]

    def files(self, name: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        """Path and content of all files at a revision, `.gitattributes` aside."""
        repo = self.repo(name, kind)
        tree = repo.trees[repo.branches.get(revision, revision)]
        return {path: blob.content for path, blob in tree.items() if path != ".gitattributes"}

    def create(self, name: str, kind: str = "models", private: bool = False) -> Repo:
        repo = self.repos[kind, name] = Repo(private)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit")
        return repo

    def put(self, name: str, files: dict[str, bytes], kind: str = "models", private: bool = False) -> str:
        """A commit made by other means than the client. Returns its id."""
        repo = self.repos.get((kind, name)) or self.create(name, kind, private)
        new = {path: Blob(content, is_lfs(path, len(content))) for path, content in files.items()}
        return repo.commit("main", {**repo.trees[repo.branches["main"]], **new}, "put")


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_ENDINGS) or size > LFS_FROM)


def check_card(content: str) -> tuple[list[str], list[str]]:
    """What is wrong with the metadata of a card: errors and warnings."""
    header = re.match(r"---\n(.*?)\n---", content, re.S)
    if header is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for name, allowed in CARD_VALUES.items():
        for value in re.findall(rf"^{name}: *(.*)$", header[1], re.M):
            if value.strip("'\"") not in allowed:
                errors.append(f'"{name}" must be one of {sorted(allowed)}')
    for value in re.findall(r"^base_model: *(\S.*)$", header[1], re.M):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
            errors.append('"base_model" must be the name of a model on the Hub')
    return errors, []


class Handler(BaseHTTPRequestHandler):
    """One connection: reads a request, finds what it asks for, answers."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_request(self) -> None:
        body = self.read_body()
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        try:
            user = self.user()
            with self.hub.lock:
                self.hub.requests.append((self.command, unquote(url.path), user))
                answer = self.route(parts, parse_qs(url.query), body, user)
        except Refused as refused:
            return self.send(refused.status, json.dumps(refused.body).encode(), refused.headers)
        if isinstance(answer, tuple):
            status, content, headers = answer
            return self.send(status, content, headers)
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> str | None:
        """The user whose token came along; `None` without one."""
        given = self.headers.get("Authorization", "")
        if not given:
            return None
        token = given.removeprefix("Bearer ")
        if token not in self.hub.users:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.users[token]

    # ---- where requests go ----

    def route(self, parts: list[str], query: dict[str, list[str]], body: bytes, user: str | None) -> Any:
        if parts[0] == "lfs":
            return self.lfs_object(parts[1:], body)
        if parts[:2] == ["api", "whoami-v2"]:
            if user is None:
                raise Refused(401, message="Invalid username or password.")
            access = {"displayName": "test", "role": "write", "createdAt": "2026-01-01T00:00:00.000Z"}
            auth = {"type": "access_token", "accessToken": access}
            return {"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth}
        if parts[:2] == ["api", "validate-yaml"]:
            errors, warnings = check_card(json.loads(body)["content"])
            answer = {
                name: [{"message": m} for m in found] for name, found in (("errors", errors), ("warnings", warnings))
            }
            if errors:
                raise Refused(400, body=answer)
            return answer
        if parts == ["api", "repos", "create"]:
            return self.create_repo(json.loads(body), user)
        if parts[0] == "api" and parts[1] in TYPES and len(parts) >= 4:
            repo = self.visible(parts[1], f"{parts[2]}/{parts[3]}", user)
            return self.repo_api(repo, parts[1], f"{parts[2]}/{parts[3]}", parts[4:], query, body, user)
        kind = parts.pop(0) if parts[0] in TYPES else "models"
        if len(parts) > 4 and parts[2] == "resolve":
            repo = self.visible(kind, f"{parts[0]}/{parts[1]}", user)
            return self.file(repo, parts[3], "/".join(parts[4:]))
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            name = f"{parts[0]}/{parts[1].removesuffix('.git')}"
            self.visible(kind, name, user)
            self.may_write(name, user)
            return self.lfs_batch(json.loads(body))
        raise Refused(404, message=f"The stand-in does not know {self.command} {self.path}")

    def visible(self, kind: str, name: str, user: str | None) -> Repo:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def may_write(self, name: str, user: str | None) -> None:
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if user != name.split("/")[0]:
            raise Refused(403, message=f"{user} may not write to {name}")

    def create_repo(self, wanted: dict[str, Any], user: str | None) -> dict[str, str]:
        kind = f"{wanted.get('type') or 'model'}s"
        name = f"{wanted.get('organization') or user}/{wanted['name']}"
        prefix = "" if kind == "models" else f"{kind}/"
        url = f"{self.hub.endpoint}/{prefix}{name}"
        self.may_write(name, user)
        if (kind, name) in self.hub.repos:
            raise Refused(409, message="You already created this repo", body={"url": url, "error": "exists"})
        self.hub.create(name, kind, wanted.get("visibility") == "private")
        return {"url": url, "name": name, "id": name}

    def repo_api(
        self,
        repo: Repo,
        kind: str,
        name: str,
        rest: list[str],
        query: dict[str, list[str]],
        body: bytes,
        user: str | None,
    ) -> Any:
        what = rest[0] if rest else "revision"
        if what in ("preupload", "commit", "branch"):
            self.may_write(name, user)
        if what == "branch":
            return self.create_branch(repo, rest[1], json.loads(body or b"{}"))
        if what == "refs":
            refs = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
            return {"branches": refs, "converts": [], "tags": []}
        revision = rest[1] if len(rest) > 1 else "main"
        if what == "preupload":
            self.commit_of(repo, revision)
            modes = [
                (f["path"], "lfs" if is_lfs(f["path"], f["size"]) else "regular") for f in json.loads(body)["files"]
            ]
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes]}
        if what == "commit":
            oid = self.commit(repo, revision, [json.loads(line) for line in body.splitlines()])
            url = f"{self.hub.endpoint}/{name}/commit/{oid}"
            return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}
        oid = self.commit_of(repo, revision)
        tree = repo.trees[oid]
        if what == "tree":
            return self.tree(tree, "/".join(rest[2:]), query.get("recursive", ["false"])[0].lower() == "true")
        if what == "paths-info":
            return [tree[p].entry(p) for p in parse_qs(body.decode()).get("paths", []) if p in tree]
        if what == "revision":
            siblings = [{"rfilename": path} for path in tree]
            known = {"_id": name, "id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings}
            return {**known, ("modelId" if kind == "models" else "datasetId"): name, "downloads": 0, "likes": 0}
        raise Refused(404, message=f"The stand-in does not know {self.command} {self.path}")

    # ---- contents ----

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def create_branch(self, repo: Repo, branch: str, wanted: dict[str, str]) -> dict[str, str]:
        if branch in repo.branches:
            raise Refused(409, message=f"Reference already exists: {branch}")
        repo.branches[branch] = self.commit_of(repo, wanted.get("startingPoint", "main"))
        return {}

    def commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> str:
        if branch not in repo.branches:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        tree, message = dict(repo.trees[repo.branches[branch]]), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.branches[branch]):
                    raise Refused(412, message="A commit has happened since")
                continue
            path = value["path"]
            if path.startswith("/") or ".." in path.split("/"):
                raise Refused(400, message=f"Invalid path: {path}")
            if key == "file":
                tree[path] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refused(400, message=f"{path} was not uploaded to LFS")
                tree[path] = Blob(self.hub.lfs[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del tree[path]
            elif key == "deletedFolder":
                tree = {p: blob for p, blob in tree.items() if not p.startswith(path.rstrip("/") + "/")}
            else:
                raise Refused(400, message=f"The stand-in does not know {key} in a commit")
        return repo.commit(branch, tree, message)

    def tree(self, tree: dict[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
        start = f"{folder}/" if folder else ""
        below = {path: blob for path, blob in sorted(tree.items()) if path.startswith(start)}
        if folder and not below:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        found: dict[str, dict[str, Any]] = {}
        for path, blob in below.items():
            inside = path[len(start) :].split("/")
            for depth in range(1, len(inside)):
                if recursive or depth == 1:
                    name = start + "/".join(inside[:depth])
                    found[name] = {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "path": name}
                    found[name]["size"] = 0
            if recursive or len(inside) == 1:
                found[path] = blob.entry(path)
        return list(found.values())

    def file(self, repo: Repo, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        oid = self.commit_of(repo, revision)
        blob = repo.trees[oid].get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.sha256 if blob.lfs else blob.git_oid}"'}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, blob.content, headers
        size = len(blob.content)
        start, end = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        if start >= size:
            raise Refused(416, message="Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return 206, blob.content[start : end + 1], headers

    def lfs_batch(self, wanted: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for one in wanted["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.lfs:
                href = f"{self.hub.endpoint}/lfs/{one['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_object(self, parts: list[str], body: bytes) -> Any:
        oid = parts[0]
        if self.command == "PUT":
            if hashlib.sha256(body).digest() != binascii.unhexlify(oid):
                raise Refused(400, message=f"The content's digest is not {oid}")
            self.hub.lfs[oid] = body
            return {}
        if parts[1:] == ["verify"] and len(self.hub.lfs.get(oid, b"")) == json.loads(body)["size"]:
            return {}
        raise Refused(404, message=f"{oid} was not uploaded")
