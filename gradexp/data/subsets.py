"""Class-balanced subsets of a training set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from gradexp.base.errors import UserError


def nested(labels: np.ndarray, *, per_class: int | None, seed: int) -> np.ndarray:
    """Indices of `per_class` images of every class, in ascending order; all of them for None.

    The subset of k images per class contains that of every smaller k with the same seed, and depends on
    nothing else: every method of a table trains on the same images.
    labels (N,) -> (K * per_class,) int64. Raises UserError when a class is too small.
    """
    if per_class is None:
        return np.arange(len(labels))
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise UserError(
                f"data.per_class={per_class}: class {label} has {len(members)} training images; "
                f"ask for at most {np.bincount(labels).min()} (data.per_class=null takes all of them)"
            )
        chosen.append(np.random.default_rng([seed, int(label)]).permutation(members)[:per_class])
    return np.sort(np.concatenate(chosen))


def only(labels: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(indices, new labels) of the images whose label is in `classes`; the new label is its position there.

    Raises UserError for a label that no image has.
    """
    absent = sorted(set(classes) - set(labels.tolist()))
    if absent:
        raise UserError(f"data.only_classes: there is no image of class {absent[0]}")
    rows = np.flatnonzero(np.isin(labels, classes))
    positions = {label: position for position, label in enumerate(classes)}
    return rows, np.array([positions[label] for label in labels[rows].tolist()], dtype=np.int64)


def split_off(labels: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(kept, held out): a class-balanced `fraction` of every class is held out. Indices in ascending order."""
    held = []
    for label in np.unique(labels):
        members = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        held.append(members[: round(fraction * len(members))])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def fingerprint(indices: np.ndarray) -> str:
    """SHA-256 of the indices, shortened to 16 digits."""
    return hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest()[:16]
