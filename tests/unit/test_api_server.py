"""The HTTP server of one process, as it is started."""

from __future__ import annotations

import asyncio
import gc

import uvicorn
from fastapi import FastAPI

from services.api.__main__ import Server


def test_what_is_there_at_the_start_is_left_to_no_collection() -> None:
    """Else every full collection looks through all modules and schemas, while all requests wait."""
    app = FastAPI()
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None)
    frozen: list[int] = []

    async def start_and_stop() -> None:
        config.load()
        server = Server(config, app)
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        frozen.append(gc.get_freeze_count())
        frozen.append(len(gc.get_objects()))
        await server.shutdown()

    before = gc.get_freeze_count()
    try:
        asyncio.run(start_and_stop())
    finally:
        gc.unfreeze()
    assert before == 0
    assert frozen[0] > 10 * frozen[1]
