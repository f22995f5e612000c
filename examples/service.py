"""Answers to questions about pictures over HTTP, with FastAPI: uvicorn examples.service:app

    curl -F image=@examples/scene.png -F question="How many shapes are there?" http://127.0.0.1:8000/ask

The model is loaded once. Requests that come at the same time are computed together, up to `n_parallel`; the others wait.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.concurrency import run_in_threadpool

import pyllava

MOST_BYTES = 20_000_000


@asynccontextmanager
async def with_model(app: FastAPI) -> AsyncIterator[None]:
    with pyllava.Llava(os.environ.get("MODEL"), n_parallel=8, kv_cells="pictures") as app.state.model:
        yield


app = FastAPI(lifespan=with_model)


@app.post("/ask")
async def ask(request: Request, image: UploadFile, question: Annotated[str, Form()]) -> dict[str, object]:
    if (image.size or 0) > MOST_BYTES:
        raise HTTPException(413, f"a picture of {image.size} bytes, need {MOST_BYTES} at most")
    data = await image.read()
    try:
        answer = await run_in_threadpool(
            request.app.state.model.ask, data, question, max_tokens=256, timeout=60.0
        )
    except (pyllava.ImageError, pyllava.ContextOverflowError, ValueError) as error:
        raise HTTPException(422, str(error)) from None
    return {"answer": str(answer), "finish_reason": answer.finish_reason}
