# SPDX-License-Identifier: Apache-2.0
"""Online stores, and the reader that answers requests from one."""

from feature_store.online.base import FeatureStoreError, OnlineStore, Snapshot, Transaction, ViewState
from feature_store.online.bundled import BundledReader
from feature_store.online.memory import MemoryStore
from feature_store.online.reader import OnlineReader
from feature_store.online.redis import RedisStore
from feature_store.online.sqlite import SQLiteStore

__all__ = [
    "BundledReader",
    "FeatureStoreError",
    "MemoryStore",
    "OnlineReader",
    "OnlineStore",
    "RedisStore",
    "SQLiteStore",
    "Snapshot",
    "Transaction",
    "ViewState",
]
