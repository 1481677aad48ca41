# SPDX-License-Identifier: Apache-2.0
"""The retrievers that ship with the framework. Importing this package registers them."""

from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.models.setrec import SETRec

__all__ = ["SASRec", "SETRec"]
