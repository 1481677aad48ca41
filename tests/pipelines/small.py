# SPDX-License-Identifier: Apache-2.0
"""Overrides that make a whole run small."""

SMALL = (
    "dataset={name: synthetic}",
    "text.encoder={name: hashing}",
    "ranker.training.trainer.epochs=1",
    "collaborative.training.trainer.epochs=1",
    "retriever.training.trainer.epochs=1",
    "lists.candidates=10",
    "lists.validation_steps=50",
    "evaluation.resamples=100",
    "evaluation.explained_requests=3",
)
