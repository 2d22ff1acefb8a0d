"""Which values to try next, and which parameters decided how good the trials were.

Both rest on the order of the trials alone, from good to bad: a loss of 10⁵ at a learning rate far too large counts as
the last place, not as 10⁵, and trials that were ended early have their place in it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from losslab.studies.spaces import Choice, Range
from losslab.studies.tuning.backend import coded, decoded, distribution, optuna, quietly
from losslab.studies.tuning.result import Trial, ranking

FEWEST = 4  # trials, for importances

Space = Mapping[str, Range | Choice]


def next_parameters(
    space: Space, ended: Sequence[Trial], in_work: Sequence[Mapping[str, Any]], *, maximize: bool, seed: int
) -> dict[str, Any]:
    """Values for the trial after these, by a tree-structured Parzen estimator; at random for the first ten.

    They depend on the arguments alone, so that a study that was killed goes on as if it had not been.

    Args:
        space: What may vary.
        ended: The trials that ended, by number.
        in_work: The values of those that others are at: near them nothing new is to be learnt.
        maximize: Whether large values are good.
        seed: Of the study. The number of the trial makes another one of it for each.

    Source: J. Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011; over all parameters
    jointly, as S. Falkner et al., "BOHB", ICML 2018.
    """
    package = optuna()
    drawn = np.random.SeedSequence([seed, len(ended) + len(in_work)]).generate_state(1)
    distributions = {key: distribution(entry) for key, entry in space.items()}
    with quietly():
        sampler = package.samplers.TPESampler(seed=int(drawn[0]), multivariate=True, constant_liar=True)
        study = package.create_study(sampler=sampler)
        for trial, place in _places(ended, maximize=maximize):
            study.add_trial(_known(space, distributions, trial.parameters, place))
        for parameters in in_work:
            study.add_trial(_known(space, distributions, parameters, None))
        asked = study.ask(distributions).params
    return {key: decoded(entry, asked[key]) for key, entry in space.items()}


def importances(space: Space, ended: Sequence[Trial], *, maximize: bool) -> dict[str, float]:
    """How much of the variation in the trials' order each parameter alone explains, in sum 1, largest first.

    By fANOVA on a random forest: the order as a function of the parameters, ranges on their own scale. Empty for fewer
    than four trials.

    Source: F. Hutter, H. Hoos, K. Leyton-Brown, "An efficient approach for assessing hyperparameter importance", ICML
    2014.
    """
    if len(ended) < FEWEST:
        return {}
    package = optuna()
    linear = {key: _linear(entry) for key, entry in space.items()}
    distributions = {key: distribution(entry) for key, entry in linear.items()}
    with quietly():
        study = package.create_study()
        for trial, place in _places(ended, maximize=maximize):
            moved = {key: _on_scale(space[key], value) for key, value in trial.parameters.items()}
            study.add_trial(_known(linear, distributions, moved, place))
        evaluator = package.importance.FanovaImportanceEvaluator(seed=0)
        found = package.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(share) for key, share in found.items()}


def _places(ended: Sequence[Trial], *, maximize: bool) -> list[tuple[Trial, float]]:
    """Each trial, by number, and its place in the order."""
    place = {trial.number: float(index) for index, trial in enumerate(ranking(ended, maximize=maximize))}
    return [(trial, place[trial.number]) for trial in sorted(ended, key=lambda trial: trial.number)]


def _known(space: Space, distributions: Mapping[str, Any], parameters: Mapping[str, Any], place: float | None) -> Any:
    """A trial for Optuna: one that ended at a place, or one in work."""
    states = optuna().trial.TrialState
    return optuna().trial.create_trial(
        state=states.RUNNING if place is None else states.COMPLETE,
        value=place,
        params={key: coded(space[key], value) for key, value in parameters.items()},
        distributions=dict(distributions),
    )


def _linear(entry: Range | Choice) -> Range | Choice:
    """A range on the scale on which it is uniform: fANOVA averages over that, and knows no logarithms."""
    if isinstance(entry, Choice):
        return entry
    return Range(_on_scale(entry, entry.low), _on_scale(entry, entry.high))


def _on_scale(entry: Range | Choice, value: Any) -> Any:
    return value if isinstance(entry, Choice) else math.log(value) if entry.log else float(value)
