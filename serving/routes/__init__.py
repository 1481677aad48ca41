# SPDX-License-Identifier: Apache-2.0
"""The routes. Each module has ``routes(engine, settings) -> APIRouter``; `serving.app.create_app` lists them."""
