"""What a Hub remembers: who holds which token, and repositories as branches of commits of files.

It knows nothing of HTTP. What it refuses is a `RefusedError`, with the status and code of the real Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


FIRST_COMMIT = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
# As the Hub does, large files and those that are binary by name go to large-file storage.
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")


@dataclass(frozen=True)
class User:
    """Somebody with a token."""

    name: str
    role: str = "write"


class RefusedError(Exception):
    """A request that the Hub turns down."""

    def __init__(self, status: int, text: str, code: str | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.code = status, text, code


@dataclass
class Repository:
    """Branches that point at commits, each of which is a whole tree of files."""

    name: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.branches["main"] = self._add(FIRST_COMMIT, "initial commit")

    def _add(self, files: dict[str, bytes], message: str) -> str:
        self.messages.append(message)
        commit = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        return commit

    def commit(self, revision: str, changes: dict[str, bytes | None], message: str) -> str:
        """Put files on a branch; None deletes. Returns the new commit."""
        if revision not in self.branches:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = {**self.commits[self.branches[revision]], **changes}
        kept = {path: content for path, content in files.items() if content is not None}
        self.branches[revision] = self._add(kept, message)
        return self.branches[revision]

    def resolve(self, revision: str) -> str:
        """Return the commit that a branch or a hash names."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a branch or commit."""
        return self.commits[self.resolve(revision)]


class Store:
    """All users, repositories and large files of a Hub."""

    def __init__(self) -> None:
        self.users = {
            "hf_write": User("ann"),
            "hf_read": User("ann", "read"),
            "hf_other": User("bob"),
            "hf_user": User("user"),
        }
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}

    def user(self, token: str | None) -> User | None:
        """Return who holds a token; a token that nobody holds is refused."""
        if token is None:
            return None
        if token not in self.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def create(self, token: str | None, wanted: dict[str, Any]) -> tuple[str, bool]:
        """Make a repository; returns its name and whether it is new."""
        user = self.user(token)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        owner = wanted.get("organization") or user.name
        if user.role != "write" or owner != user.name:
            raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        if name in self.repositories:
            return name, False
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repositories[name] = Repository(name, private)
        return name, True

    def find(self, token: str | None, name: str, *, write: bool = False) -> Repository:
        """Return a repository that this user may see, or write to."""
        user = self.user(token)
        repository = self.repositories.get(name)
        owner = name.partition("/")[0]
        if repository is None or (repository.private and (user is None or user.name != owner)):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise RefusedError(401, "Invalid username or password.")
        if write and (user.role != "write" or user.name != owner):
            raise RefusedError(403, f"Forbidden: you have no write access to {name}")
        return repository

    def upload(self, sha256: str, content: bytes) -> None:
        """Keep a large file, if it is what its name says."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise RefusedError(400, "The content does not match its sha256")
        self.large[sha256] = content

    def changes(self, lines: list[dict[str, Any]]) -> tuple[dict[str, bytes | None], dict[str, Any]]:
        """Read a commit as the client sends it: files by path, and the header."""
        changes: dict[str, bytes | None] = {}
        header: dict[str, Any] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    raise RefusedError(400, f"LFS object {value['oid']} of {value['path']} was never uploaded")
                changes[value["path"]] = self.large[value["oid"]]
            else:
                changes[value["path"]] = None
        return changes, header


def is_large(path: str) -> bool:
    """Tell whether a file goes to large-file storage."""
    return path.endswith(LARGE)


def oid(path: str, content: bytes) -> str:
    """Return the name that a file's content has: sha256 in large-file storage, else git's own."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def pipeline_tag(files: dict[str, bytes]) -> str | None:
    """Guess the task as the Hub does, from the class named in `config.json`."""
    architecture = (json.loads(files.get("config.json", b"{}")).get("architectures") or [""])[0]
    tags = {"SequenceClassification": "text-classification", "CausalLM": "text-generation"}
    return next((tag for suffix, tag in tags.items() if architecture.endswith(suffix)), None)
