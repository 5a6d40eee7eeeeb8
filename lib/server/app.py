"""The server: this project's routes around MONAI Label's app.

python -m lib.server start_server --app apps/unetr_radiology --studies DIR --uvicorn_app lib.server.app:app
"""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

from lib.dicom.remote import RemoteSource

from lib.server.stock import refuse_unknown, running_stock_app  # isort: skip  (sets how MONAI Label loads lib)

import anyio.to_thread
from fastapi import FastAPI
from fastapi.params import File
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from starlette.routing import Match
from starlette.types import Scope

from lib.configs.settings import Settings
from lib.server.http.connections import Limits, serving_uvicorn
from lib.server.http.encryption import limit_connections
from lib.server.http.errors import register_error_handlers
from lib.server.http.events import called_by_signal, closed_by_signals
from lib.server.http.exposure import warn_if_closed_to_all, warn_if_exposed
from lib.server.http.logs import access_lines_aside, set_log_format
from lib.server.http.middleware import Surroundings
from lib.server.http.origins import Origins
from lib.server.http.proxies import Clients
from lib.server.http.tokens import WatchedTokens
from lib.server.http.uploads import spool_little
from lib.server.pages import documentation, page_routes, sign_in
from lib.server.pages.cases import clicks as click_routes
from lib.server.pages.cases import routes as case_routes
from lib.server.pages.drawing import ASSETS
from lib.server.priority import limit_threads, switching_often
from lib.server.routes import app as app_routes
from lib.server.routes import auth as auth_routes
from lib.server.routes import datastore as datastore_routes
from lib.server.routes import dicomweb as dicomweb_routes
from lib.server.routes import health
from lib.server.routes import infer as infer_routes
from lib.server.routes import labels as label_routes
from lib.server.routes import leases as lease_routes
from lib.server.routes import logs as log_routes
from lib.server.routes import models as model_routes
from lib.server.routes import ohif as ohif_routes
from lib.server.routes import runs as run_routes
from lib.server.routes import sessions as session_routes
from lib.server.routes import train as train_routes
from lib.server.routes import uncertainty as uncertainty_routes
from lib.server.services import Services
from lib.server.trimming import trimming
from lib.server.work.parent import end_with_parent
from lib.server.work.retraining import Retrainer
from lib.server.work.temporary import own_temporary_folder, remove_log_configuration
from lib.server.work.waiting_for_room import WaitingForRoom

ROUTERS = (
    health.router,
    app_routes.router,
    infer_routes.router,
    label_routes.router,
    datastore_routes.router,
    lease_routes.router,
    train_routes.train_router,
    train_routes.batch_router,
    train_routes.scoring_router,
    run_routes.runs_router,
    run_routes.retrain_router,
    session_routes.router,
    model_routes.router,
    log_routes.router,
    dicomweb_routes.router,
    auth_routes.router,
    ohif_routes.router,
    uncertainty_routes.router,
    documentation.router,
    sign_in.router,
    page_routes.router,
    case_routes.router,
    click_routes.router,
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start and stop the process-wide services and the server."""
    end_with_parent()
    uvicorn = serving_uvicorn()
    remove_log_configuration(uvicorn.config.log_config if uvicorn else None)
    with own_temporary_folder(), access_lines_aside(), switching_often():
        async with running_server(app):
            yield


@asynccontextmanager
async def running_server(app: FastAPI) -> AsyncIterator[None]:
    """MONAI Label's own start and stop, with the server's services created and closed inside it."""
    async with running_stock_app() as instance:
        app.state.services = services = Services.of(instance)
        set_log_format(services.settings.log_format)
        warn_if_exposed(sys.argv, services.authenticator.enabled)
        tokens = services.authenticator.tokens
        warn_if_closed_to_all(None if tokens is None else tokens.count)
        limit_connections(limits_of(services.settings))
        services.submissions.hooks.append(services.segmentations.show)
        app.state.retrainer = retrainer = Retrainer(
            services.settings,
            services.train_tasks,
            services.datastore,
            services.jobs,
            services.journal,
            services.inferences,
            services.pause,
            services.segmentation_tasks,
            services.changes,
        )
        services.submissions.hooks.append(retrainer.on_label_saved)
        # interrupted jobs resume first, or the retraining policy would see no running training and start another one
        services.jobs.recover(services.journal.take_over())
        retrainer.start()
        waiting = WaitingForRoom(services.jobs, services.journal.folder_of)
        waiting.start()
        source = services.store.source
        limit_threads(waits_for_pacs=isinstance(source, RemoteSource))
        source.start()
        try:
            async with services.prefetcher.running(), services.scoring.running(), trimming():
                with closed_by_signals(services.changes), read_again_by_signal(tokens):
                    await anyio.to_thread.run_sync(page_routes.prepare, services.pool_knowledge)
                    spare_what_stays()
                    yield
        finally:
            waiting.stop()
            await anyio.to_thread.run_sync(retrainer.stop)
            await anyio.to_thread.run_sync(services.jobs.shut_down)
            await anyio.to_thread.run_sync(source.stop)
            await anyio.to_thread.run_sync(services.store.close)


def limits_of(settings: Settings) -> Limits:
    """The configured limits on connections."""
    return Limits(
        settings.connection_limit,
        settings.client_connection_limit,
        settings.header_seconds,
        settings.body_seconds,
        settings.trusted_proxies,
    )


def read_again_by_signal(tokens: WatchedTokens | None) -> AbstractContextManager[None]:
    """Let SIGUSR1 make the server read the token file again, until the block ends."""
    return nullcontext() if tokens is None else called_by_signal("SIGUSR1", tokens.read_again)


def spare_what_stays() -> None:
    """Exclude the objects that exist after the start from garbage collection.

    With 10,000 cases these are over a million objects, whose traversal stopped every response for half a second.
    """
    gc.collect()
    gc.freeze()
    # a full collection runs when new objects exceed a quarter of those that survived the last one, which is none from
    # now on
    gc.collect()


FILE_ROUTES = tuple(
    route
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute)
    and (
        route.endpoint in dicomweb_routes.STREAMED
        or (route.body_field and isinstance(route.body_field.field_info, File))
    )
)


def takes_files(scope: Scope) -> bool:
    """Whether a route receives files, which go into a temporary folder and not into memory."""
    return any(route.matches(scope)[0] is Match.FULL for route in FILE_ROUTES)


def create_app() -> FastAPI:
    """Build the application."""
    spool_little()
    app = FastAPI(title="UNETR for MONAI Label", version="0.1.0", docs_url=None, redoc_url=None, lifespan=lifespan)
    for router in ROUTERS:
        app.include_router(router)
    app.mount("/page/assets", StaticFiles(directory=ASSETS))
    app.mount("/docs/scripts", documentation.scripts)
    app.router.default = refuse_unknown
    app.add_middleware(Origins)
    app.add_middleware(Surroundings, takes_files=takes_files)  # added later, so it wraps the other one
    app.add_middleware(Clients)
    register_error_handlers(app)
    return app


app = create_app()
