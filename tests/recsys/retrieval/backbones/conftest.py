# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder for each kind of model, with a tokenizer."""
    from tests.recsys.retrieval.backbones.tiny import KINDS, save  # transformers, which not every file here needs

    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in found.items():
        save(kind, folder)
    return found
