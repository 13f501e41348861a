"""A hub in memory: as much of its interface as publishing and downloading need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_COMMIT = "0" * 39 + "1"


class Hub:
    """Repositories by name: files by path. `token` is what writing needs."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.uploads: dict[str, bytes] = {}
        self.address = ""

    def app(self) -> Starlette:
        repo = "/{owner}/{name}"
        return Starlette(
            routes=[
                Route("/api/repos/create", self._create, methods=["POST"]),
                Route("/api/validate-yaml", self._validate, methods=["POST"]),
                Route(f"/api/models{repo}/preupload/main", self._preupload, methods=["POST"]),
                Route(f"/api/models{repo}/commit/main", self._commit, methods=["POST"]),
                Route(f"/api/models{repo}/tree/{{revision}}", self._tree),
                Route(f"/api/models{repo}/revision/{{revision}}", self._info),
                Route(f"/api/models{repo}", self._info),
                Route(f"{repo}.git/info/lfs/objects/batch", self._batch, methods=["POST"]),
                Route("/lfs/{oid}", self._put, methods=["PUT"]),
                Route(f"{repo}/resolve/{{revision}}/{{path:path}}", self._resolve),
            ]
        )

    def _may(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.token}"

    @staticmethod
    def _name(request: Request) -> str:
        return f"{request.path_params['owner']}/{request.path_params['name']}"

    async def _create(self, request: Request) -> Response:
        if not self._may(request):
            return JSONResponse({"error": "Invalid credentials"}, 401)
        asked = await request.json()
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return JSONResponse({"error": "exists", "url": f"{self.address}/{name}"}, 409)
        self.repositories[name], self.private[name] = {}, asked.get("visibility") == "private"
        return JSONResponse({"url": f"{self.address}/{name}", "name": name, "id": name})

    async def _validate(self, _: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        if not self._may(request):
            return JSONResponse({"error": "Invalid credentials"}, 401)
        files = (await request.json())["files"]
        modes = []
        for path in (file["path"] for file in files):
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        return JSONResponse({"files": modes})

    async def _batch(self, request: Request) -> Response:
        objects = []
        for wanted in (await request.json())["objects"]:
            has = wanted["oid"] in self.uploads
            actions = {} if has else {"upload": {"href": f"{self.address}/lfs/{wanted['oid']}"}}
            objects.append({**wanted, **({"actions": actions} if actions else {})})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _put(self, request: Request) -> Response:
        self.uploads[request.path_params["oid"]] = await request.body()
        return Response()

    async def _commit(self, request: Request) -> Response:
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        files = self.repositories[self._name(request)]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
        url = f"{self.address}/{self._name(request)}/commit/{_COMMIT}"
        return JSONResponse({"success": True, "commitOid": _COMMIT, "commitUrl": url})

    async def _tree(self, request: Request) -> Response:
        entries = []
        for path, content in sorted(self.repositories[self._name(request)].items()):
            oid = hashlib.sha1(content).hexdigest()
            entries.append({"type": "file", "path": path, "size": len(content), "oid": oid})
        return JSONResponse(entries)

    async def _info(self, request: Request) -> Response:
        name = self._name(request)
        if name not in self.repositories:
            return JSONResponse({"error": "none"}, 404, {"x-error-code": "RepoNotFound"})
        siblings = [{"rfilename": path} for path in sorted(self.repositories[name])]
        about = {"id": name, "modelId": name, "sha": _COMMIT, "siblings": siblings, "tags": []}
        return JSONResponse({**about, "private": False, "downloads": 0, "likes": 0})

    async def _resolve(self, request: Request) -> Response:
        content = self.repositories[self._name(request)].get(request.path_params["path"])
        if content is None:
            return JSONResponse({"error": "none"}, 404, {"x-error-code": "EntryNotFound"})
        etag = hashlib.sha256(content).hexdigest()
        return Response(content, headers={"etag": f'"{etag}"', "x-repo-commit": _COMMIT})


@contextmanager
def running(hub: Hub) -> Iterator[dict[str, str]]:
    """The hub on a free port; the environment in which programs take it for the real one."""
    server = uvicorn.Server(uvicorn.Config(hub.app(), port=0, log_level="error", lifespan="off"))
    listening = threading.Event()
    startup = server.startup

    async def tell(sockets: Any = None) -> None:
        await startup(sockets)
        listening.set()

    server.startup = tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    assert listening.wait(30)
    hub.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    finally:
        server.should_exit = True
        thread.join()
