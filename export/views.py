"""Fit confidence for several photographs of one thing to sets of the queries that one photograph's is fitted to.

The service combines photographs into one query embedding (`core.arrays.combined`), so a set is searched like a query.

Shapes: N queries, V photographs of a set, S sets, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np

from core.arrays import Float32Array, Int64Array, combined
from core.errors import UserError
from export.calibrate import NotFitted, calibrate, fit_to_scores
from export.config import ExportConfig
from export.levels import add_level_model
from export.model import ExportModel
from export.queries import LabelledQueries, LabelledSearch, search_labelled
from index.calibration import Calibration
from index.search import EntityIndex
from index.store import EntityStore

MAX_FITTED = 4  # photographs of a set; more of them have the fit of four
_SETS_OF_ENTITY = 6
_MIN_SETS, _MAX_SETS = 30, 4096


def calibrate_on(
    validation: LabelledQueries, config: ExportConfig, model: ExportModel, index: EntityIndex, store: EntityStore
) -> Calibration:
    """Fit a calibration to validation queries, and to sets of them. Raise `UserError` if nothing can be fitted."""
    found = search_labelled(validation, config, index)
    try:
        calibration = calibrate(found, config, model, index)
    except NotFitted as error:
        raise UserError(f"{error}; give more validation queries, or leave --validation out") from error
    return fit_views(
        calibration, found, lambda views: search_labelled(validation_sets(validation, views), config, index), store
    )


def fit_views(
    calibration: Calibration,
    single: LabelledSearch,
    search: Callable[[int], LabelledSearch],
    store: EntityStore | None = None,
) -> Calibration:
    """Add the calibrations of one to four photographs, as far as there are enough sets.

    `single` is what was found for one photograph, and `search` returns that for sets of more. `known` of one photograph
    stays as it is. With a `store`, each calibration gets a level model.
    """
    if store is not None:
        calibration = add_level_model(calibration, single, store)
    views = {}
    for number in range(1, MAX_FITTED + 1):
        found = single if number == 1 else search(number)
        if len(found.own_N) < _MIN_SETS:
            break
        try:
            fitted = fit_to_scores(found)
        except NotFitted:
            continue
        if number == 1:
            kept = {name: getattr(calibration, name) for name in ("open_set_model", "abstain_below", "level")}
            fitted = replace(fitted, **kept)
        elif store is not None:
            fitted = add_level_model(fitted, found, store)
        views[number] = fitted
    return replace(calibration, views=views)


def sets_of(group_N: Int64Array, views: int, *, spare: int = 0) -> Int64Array:
    """Return sets of queries of one group `[S, V]`, up to six of each group with `spare` queries more than a set."""
    rng = np.random.default_rng(0)
    order_N = np.argsort(group_N, kind="stable")
    groups = np.split(order_N, np.flatnonzero(np.diff(group_N[order_N])) + 1)
    sets: list[tuple[int, ...]] = []
    for number in rng.permutation(len(groups)):
        members = groups[number]
        if len(members) < views + spare:
            continue
        if comb(len(members), views) <= _SETS_OF_ENTITY:
            sets += combinations(members.tolist(), views)
        else:
            drawn = {tuple(sorted(rng.permutation(members)[:views].tolist())) for _ in range(_SETS_OF_ENTITY)}
            sets += sorted(drawn)
        if len(sets) >= _MAX_SETS:
            break
    return np.array(sets, np.int64).reshape(-1, views)


def validation_sets(validation: LabelledQueries, views: int) -> LabelledQueries:
    """Return sets of several validation queries for one entity, as queries."""
    sets_SV = sets_of(validation.group_N, views)
    return LabelledQueries(
        own_N=validation.own_N[sets_SV[:, 0]],
        group_N=validation.group_N[sets_SV[:, 0]],
        embeddings_ND=combine_sets(validation.embeddings_ND, sets_SV),
    )


def combine_sets(embeddings_ND: Float32Array, sets_SV: Int64Array) -> Float32Array:
    """Return the query embeddings `[S, D]` of sets."""
    queries = [combined(embeddings_ND[each_V]) for each_V in sets_SV]
    return np.array(queries, np.float32).reshape(-1, embeddings_ND.shape[1])
