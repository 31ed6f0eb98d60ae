"""As much of a W&B server as its client needs to record, resume and sync runs, with outages on request."""

import contextlib
import gzip
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal


@dataclass
class Run:
    """What was recorded of a run: {file: {line number: text}}, as its client streams it."""

    streams: dict[str, dict[int, str]] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)  # its group, job type and tags
    uploads: dict[str, bytes] = field(default_factory=dict)
    complete: bool = False

    @property
    def rows(self) -> list[dict]:
        """The history without the client's own columns. A line that came twice counts once, as on a real server."""
        lines = self.streams.get("wandb-history.jsonl", {})
        rows = [json.loads(lines[number]) for number in sorted(lines)]
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]

    @property
    def numbers(self) -> list[int]:
        """W&B's own number of each row, as it came in."""
        lines = self.streams.get("wandb-history.jsonl", {})
        return [json.loads(lines[number])["_step"] for number in sorted(lines)]

    @property
    def summary(self) -> dict:
        lines = self.streams.get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}


class FakeWandb(contextlib.AbstractContextManager):
    """`with FakeWandb() as server:` serves on `server.url`, in threads of this process.

    `state` may be changed at any time: "up"; "down" cuts every connection; "hanging" never answers;
    "unauthorized" refuses the key; "failing" answers 500.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.views: list[dict] = []  # saved workspaces
        self.sweeps: list[str] = []  # YAML
        self.commands: list[dict] = []  # what the next agent that asks is to do
        self.state: Literal["up", "down", "hanging", "unauthorized", "failing"] = "up"
        self.unknown: list[str] = []  # what it was asked and does not know
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that is killed cuts its connections
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeWandb":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.state = "down"  # lets go of requests that hang
        self._server.shutdown()
        self._server.server_close()

    def graphql(self, query: str, variables: dict) -> dict:
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = name.group(1) if name else ""
        project = {"id": "p", "name": variables.get("project") or "dfer", "entity": {"id": "e", "name": "me"}}
        if name == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], Run())
            run.config |= json.loads(variables.get("config") or "{}")
            run.about |= {key: variables[key] for key in ("groupName", "jobType", "tags") if variables.get(key)}
            bucket = {"id": "r", "name": variables["name"], "displayName": variables["name"], "config": "{}"}
            bucket |= {"description": "", "sweepName": "", "historyLineCount": len(run.rows), "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            return {"model": project | {"bucket": None if run is None else self._bucket(variables["name"], run)}}
        if name in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/upload/{variables['run']}/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if name == "ArtifactType":  # of artifacts that there are; none is remembered
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":
            artifact = {"id": variables["input"]["runName"], "state": "PENDING"}
            return {"createArtifact": {"artifact": artifact | {"artifactSequence": {"latestArtifact": None}}}}
        if name == "CreateArtifactManifest":
            file = {"id": "f", "uploadHeaders": []}
            file["uploadUrl"] = f"{self.url}/upload/{variables['runName']}/manifest-{variables['digest']}"
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if name == "CreateArtifactFiles":
            files = variables["input"]["artifactFiles"]
            nodes = [
                {
                    "uploadUrl": f"{self.url}/upload/{file['artifactID']}/artifact/{file['name']}", "uploadHeaders": [],
                    "storagePath": file["name"], "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]},
                }
                for file in files
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}
        if name == "ArtifactByID":
            artifact = dict.fromkeys(("description", "metadata", "historyStep", "commitHash"))
            sequence = {"__typename": "ArtifactSequence", "name": "a", "project": project | {"internalId": "p"}}
            artifact |= {
                "__typename": "Artifact", "id": variables["id"], "artifactSequence": sequence, "versionIndex": 0,
                "artifactType": {"name": "model"}, "ttlDurationSeconds": 0, "ttlIsInherited": False, "tags": [],
                "state": "COMMITTED", "size": 0, "digest": "d", "fileCount": 1, "createdAt": "2026-01-01T00:00:00Z",
                "updatedAt": None, "aliases": [],
            }  # fmt: skip
            return {"artifact": artifact}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if name == "OrganizationCoreWeaveOrganizationID":
            return {"entity": {"organization": None}}
        if name == "UpsertView2":
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}
        if name == "UpsertSweep":
            self.sweeps.append(variables["config"])
            return {"upsertSweep": {"sweep": {"name": f"sweep{len(self.sweeps) - 1}", "project": project}}}
        if name == "SweepWithRuns":
            config = self.sweeps[int(variables["sweep"].removeprefix("sweep"))]
            sweep = {"id": "s", "name": variables["sweep"], "method": "grid", "state": "RUNNING", "config": config}
            return {"project": {"sweep": sweep | {"runs": {"edges": []}}}}
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "a"}}}
        if name == "Heartbeat":
            commands, self.commands = self.commands, []
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}
        self.unknown.append(name)
        return {}

    def _bucket(self, name: str, run: Run) -> dict:
        def tail(file: str) -> str:
            lines = run.streams.get(file, {})
            return json.dumps([lines[max(lines)]] if lines else [])

        counts = {
            f"{kind}LineCount": len(run.streams.get(file, {}))
            for kind, file in (("history", "wandb-history.jsonl"), ("events", "wandb-events.jsonl"))
        }
        return counts | {
            "id": "r", "name": name, "displayName": name, "logLineCount": 0, "wandbConfig": json.dumps({"t": 1}),
            "historyTail": tail("wandb-history.jsonl"), "eventsTail": tail("wandb-events.jsonl"),
            "summaryMetrics": json.dumps(run.summary), "config": json.dumps(run.config), "tags": [],
        }  # fmt: skip

    def stream(self, name: str, body: dict) -> None:
        run = self.runs.setdefault(name, Run())
        for file, part in (body.get("files") or {}).items():
            lines = run.streams.setdefault(file, {})
            lines |= {part["offset"] + i: text for i, text in enumerate(part["content"])}
        run.complete |= bool(body.get("complete"))


class _Handler(BaseHTTPRequestHandler):
    fake: FakeWandb
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        fake = self.fake
        while fake.state == "hanging":
            time.sleep(0.02)
        if fake.state == "down":
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        code, reply = {"unauthorized": 401, "failing": 500}.get(fake.state, 200), {}
        if code != 200:
            reply = {"errors": [{"message": fake.state}]}
        elif self.path == "/graphql":
            question = json.loads(body)
            reply = {"data": fake.graphql(question["query"], question.get("variables") or {})}
        elif match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            fake.stream(match.group(1), json.loads(body))
        elif match := re.fullmatch(r"/upload/([^/]+)/(.+)", self.path):
            fake.runs.setdefault(match.group(1), Run()).uploads[match.group(2)] = body
        data = json.dumps(reply).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer
