"""A web service whose model learns from its users' feedback; their text does not leave the machine it runs on.

    pip install pocketfed fastapi uvicorn
    POCKETFED_COORDINATOR=127.0.0.1:8765 POCKETFED_HOME=app-home uvicorn --app-dir examples fastapi_app:app

One worker: the device's folder belongs to one process. See http://127.0.0.1:8000/docs for the calls.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from pocketfed.client_sdk import Device, PocketfedError


class Text(BaseModel):
    text: str = Field(min_length=1, max_length=10_000)


class Feedback(BaseModel):
    label: str = Field(min_length=1, max_length=200)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with Device(
        os.environ["POCKETFED_COORDINATOR"],
        os.environ.get("POCKETFED_HOME", "app-home"),
        enrolment_key=os.environ.get("POCKETFED_ENROLMENT_KEY", ""),
        max_age_days=30,
    ) as device:
        device.start()
        app.state.device = device
        yield
        await run_in_threadpool(device.stop)


app = FastAPI(title="pocketfed example", lifespan=lifespan)


@app.exception_handler(PocketfedError)
async def unavailable(_: Request, error: PocketfedError) -> JSONResponse:
    """No coordinator and no model yet, or no space: the errors are sentences."""
    return JSONResponse({"detail": str(error)}, status_code=503)


# `def`, not `async def`: FastAPI runs these in threads, and a device may be used from several.


@app.post("/predictions")
def predict(body: Text, request: Request) -> dict[str, str | float | int]:
    found = request.app.state.device.predict(body.text, keep=True)
    return {"id": found.example_id, "label": found.label, "probability": found.probability}


@app.put("/predictions/{example_id}/label", status_code=204)
def correct(example_id: int, body: Feedback, request: Request) -> None:
    if not request.app.state.device.correct(example_id, body.label):
        raise HTTPException(404, f"there is no text {example_id}, or {body.label!r} cannot be a label")


@app.delete("/predictions/{example_id}", status_code=204)
def forget(example_id: int, request: Request) -> None:
    if not request.app.state.device.forget(example_id):
        raise HTTPException(404, f"there is no text {example_id}; it may have been too old")


@app.get("/status")
def status(request: Request) -> dict[str, str | int]:
    device = request.app.state.device
    return {"status": device.status(), "texts": device.count(), "labelled": device.count(labelled=True)}
