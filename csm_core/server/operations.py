"""The routes of operators: whether the process lives, whether it takes calls, and its figures."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from csm_core.server.desk import Desk
from csm_core.server.refusals import json_response

PUBLIC = ("/health", "/ready", "/ping")

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """Alive: 200 while it makes sense to let the process run, also while the model is loading or a drain goes on."""
    desk: Desk = request.state.desk
    about: dict[str, object] = {"status": "failed" if desk.state == "failed" else "ok", "state": desk.state}
    if desk.generator is not None:
        generator = desk.generator
        about |= {"model": generator.model_name, "sample_rate": generator.sample_rate, "device": generator.device}
    return json_response(about, 503 if desk.state == "failed" else 200)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Takes calls: 200, else 503 with the state."""
    state = request.state.desk.state
    return json_response({"status": state}, 200 if state == "ready" else 503)


@router.get("/ping")
async def ping(request: Request) -> Response:
    """For balancers that know one address (RunPod): 200 ready, 204 loading, 503 not any more."""
    state = request.state.desk.state
    if state == "loading":
        return Response(status_code=204)
    return json_response({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The figures, for Prometheus."""
    return Response(request.state.desk.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
