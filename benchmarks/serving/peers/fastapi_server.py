# SPDX-License-Identifier: Apache-2.0
"""A bare FastAPI application on uvicorn: each request by itself, on FastAPI's pool of threads as it has it for calls that block."""

import os

import orjson
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

from benchmarks.serving.behind import PORT, Asked, Scores, of_environment


class Body(BaseModel):
    user_id: str
    item_ids: list[str]


def create_app(scores: Scores) -> FastAPI:
    """The application."""
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/predict")
    def predict(body: Body) -> Response:
        (found,) = scores([Asked(body.user_id, body.item_ids)])
        return Response(orjson.dumps({"scores": found}), media_type="application/json")

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(of_environment()), host="127.0.0.1", port=int(os.environ[PORT]), log_level="warning", access_log=False)
