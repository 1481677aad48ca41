# SPDX-License-Identifier: Apache-2.0
"""FAISS: an exact inner-product search against numpy; the instruction sets and GPUs that this build uses."""

import faiss
import numpy as np

from pipelines.doctor.probes import Trial, expect


def probe() -> Trial:
    """Try what the dense index needs."""
    trial = Trial(faiss.__version__)
    trial.attempt("exact search", _search)
    trial.attempt("threads", lambda: str(faiss.omp_get_max_threads()))
    trial.attempt("GPUs", lambda: str(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else "not in this build")
    return trial


def _search() -> None:
    rng = np.random.default_rng(0)
    items, queries = rng.standard_normal((100, 8), dtype=np.float32), rng.standard_normal((3, 8), dtype=np.float32)
    index = faiss.IndexFlatIP(8)
    index.add(items)
    _, found = index.search(queries, 5)
    expect((found == np.argsort(-(queries @ items.T), axis=1)[:, :5]).all(), "the nearest vectors")
