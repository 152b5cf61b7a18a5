"""What exact losses tell about those that were not evaluated, given the first-order ones (P, `proxy`).

The loss L of Eq. (9) of a layer, a choice and a state is taken for

    L[unit, choice, state] = c[unit, choice] (Q[unit, choice, state] + e),    Var(e) = s[unit, choice] Q mean(Q),
    Q = P^g[stage, choice], scaled to the mean of P.

g is below 1 where losses saturate, as at 2 bits. With a variance that grows as Q, the ratio of the sums of L and Q is
the best linear estimate of c (the ratio estimator of survey sampling). Its logarithm y[unit], over the B choices, is
what is observed of x = ln c, with a diagonal error covariance D[unit]. Layers of one stage differ little (0.01 at 8
bits, 0.05 at 4, 0.1 to 0.2 at 2); the head, the only layer of its kind, may lie far from the others, so a stage is
believed only as far as its own layers were evaluated. That is a random-effects model (Laird and Ware, Biometrics 38,
1982):

    y[unit] ~ N(x[unit], D[unit]),    x[unit] ~ N(m[stage], Sigma),    m[stage] ~ N(median of y, T),

T known, Sigma unknown with an inverse-Wishart prior around Sigma0 that is worth `_PRIOR_FREEDOM` layers. Sigma is found
by EM (Dempster, Laird and Rubin, J. R. Stat. Soc. B 39, 1977), whose E step gives x and m under it:

    E    W[unit] = (Sigma + D[unit])^-1                          the precision with which y tells m
         V[stage] = (T^-1 + sum of W)^-1,    u[stage] = median + V (sum of W (y - median)),    over the stage's layers
                                                                 m is N(u, V)
         G[unit] = Sigma W,    R[unit] = Sigma - G Sigma         x, given m, is N(m + G (y - m), R)
    M    Sigma = (_PRIOR_FREEDOM Sigma0 + sum of E (x - m)(x - m)^T) / (_PRIOR_FREEDOM + number of layers),
         E (x - m)(x - m)^T = R + G V G^T + (G (y - u)) (G (y - u))^T
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

DRAWS = 256
_EM_STEPS = 30
# What is believed of a stage before any of its layers is evaluated, as much as this many evaluations would tell: that
# predictions are off by a half and by 0.2 more from layer to layer (standard deviations of ln c), by a half from state
# to state (variance 0.25), and in proportion (a slope of 1, with this sum of squares behind it).
_PRIOR_FREEDOM = 4.0
_STAGE_DEVIATION = 0.5
_LAYER_DEVIATION = 0.2
_NOISE = 0.25
_SLOPE_PRIOR = 4.0
_LEAST_RATIO = 1e-3
_NOTHING_KNOWN = 1e6
_TINY = 1e-30


def membership(index: np.ndarray) -> np.ndarray:
    """[U, K], 1 where a layer belongs to a set: `index` [U] names each layer's among K."""
    return (index[:, None] == np.arange(index.max() + 1)).astype(float)


@dataclass(frozen=True)
class _Levels:
    """Posterior of x = ln c of U layers in S stages in B choices, under one Sigma; other letters as in the module.

    stage: [U], index of the layer's stage. observed: [U, B], y; anything where nothing is known. gain, own: [U, B, B],
    G and R. centre: [S, B], u. doubt: [S, B, B], V.
    """

    stage: np.ndarray
    observed: np.ndarray
    gain: np.ndarray
    own: np.ndarray
    centre: np.ndarray
    doubt: np.ndarray

    @staticmethod
    def fit(observed: np.ndarray, error: np.ndarray, stage: np.ndarray) -> "_Levels":
        """EM. observed: [U, B], y. error: [U, B], the diagonals of D; `_NOTHING_KNOWN` where y was not observed."""
        prior = spread = _alike(_LAYER_DEVIATION, observed.shape[1])
        for _ in range(_EM_STEPS):
            levels = _Levels.expectation(spread, observed, error, stage)
            spread = levels.maximisation(prior)
        return levels

    @staticmethod
    def expectation(spread: np.ndarray, observed: np.ndarray, error: np.ndarray, stage: np.ndarray) -> "_Levels":
        """The E step. spread: [B, B], Sigma."""
        choices = observed.shape[1]
        known = error < _NOTHING_KNOWN
        median = np.asarray([np.median(observed[known[:, column], column]) for column in range(choices)])
        in_stage = membership(stage)
        precision = np.linalg.inv(spread + error[..., None] * np.eye(choices))
        of_stages = np.linalg.inv(_alike(_STAGE_DEVIATION, choices))
        doubt = np.linalg.inv(of_stages + np.einsum("us,ubc->sbc", in_stage, precision))
        pull = np.einsum("us,ubc,uc->sb", in_stage, precision, observed - median)
        centre = median + np.einsum("sbc,sc->sb", doubt, pull)
        gain = spread @ precision
        return _Levels(stage, observed, gain, spread - gain @ spread, centre, doubt)

    def maximisation(self, prior: np.ndarray) -> np.ndarray:
        """The M step: Sigma, [B, B]. prior: Sigma0."""
        moved = np.einsum("ubc,uc->ub", self.gain, self.observed - self.centre[self.stage])
        of_centre = self.gain @ self.doubt[self.stage] @ self.gain.swapaxes(1, 2)
        moment = self.own + of_centre + moved[:, :, None] * moved[:, None, :]
        return (_PRIOR_FREEDOM * prior + moment.sum(0)) / (_PRIOR_FREEDOM + len(moment))

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of every ln c, [U, B] each, with the stages' levels integrated out."""
        centre = self.centre[self.stage]
        mean = centre + np.einsum("ubc,uc->ub", self.gain, self.observed - centre)
        rest = np.eye(centre.shape[1]) - self.gain
        covariance = self.own + rest @ self.doubt[self.stage] @ rest.swapaxes(1, 2)
        return mean, np.diagonal(covariance, axis1=1, axis2=2)

    def draw(self, overdispersion: float, generator: np.random.Generator) -> np.ndarray:
        """Draws of ln c, [draws, U, B]. overdispersion: factor of all variances."""
        centre = (self.centre + _normal(overdispersion * self.doubt, generator))[:, self.stage]
        pull = np.einsum("ubc,tuc->tub", self.gain, self.observed - centre)
        return centre + pull + _normal(overdispersion * self.own, generator)


def _alike(deviation: float, choices: int) -> np.ndarray:
    """Covariance [B, B] of a quantity with this standard deviation that is half the same in all choices."""
    return deviation**2 * (np.eye(choices) + 1) / 2


def _normal(covariance: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws around 0, [draws, K, B], of K normals with `covariance` [K, B, B]."""
    count, choices, _ = covariance.shape
    roots = np.linalg.cholesky(covariance + 1e-9 * np.eye(choices))
    return np.einsum("kbc,tkc->tkb", roots, generator.standard_normal((DRAWS, count, choices)))


@dataclass(frozen=True)
class LossModel:
    """Posterior of c and s in L = c (Q + e), Var(e) = s Q mean(Q).

    predicted: [U, B, N], Q. scale: [U, B], s mean(Q). freedom: [U, B], degrees of freedom that s is known with.
    """

    predicted: np.ndarray
    levels: _Levels
    scale: np.ndarray
    freedom: np.ndarray

    @staticmethod
    def fit(losses: np.ndarray, first_order: np.ndarray, stage: np.ndarray) -> "LossModel":
        """losses: [U, B, N], NaN where not evaluated. first_order: [U, B, N], P. stage: [U], indices."""
        seen = np.isfinite(losses)
        predicted = _bent(losses, first_order, stage)
        count = seen.sum(-1)
        total = np.where(seen, predicted, 0.0).sum(-1)
        ratio = np.maximum((np.nansum(losses, -1) + _TINY) / (total + _TINY), _LEAST_RATIO)
        typical = predicted.mean(-1)
        squares = (losses / ratio[..., None] - predicted) ** 2 / (predicted * typical[..., None])
        noise, freedom = _noise(squares, count, stage)
        error = np.where(count > 0, noise * typical / np.maximum(total, _TINY), _NOTHING_KNOWN)
        return LossModel(predicted, _Levels.fit(np.log(ratio), error, stage), noise * typical, freedom)

    def miss(self, unit: int, columns: Sequence[int], states: Sequence[int], losses: np.ndarray) -> list[float]:
        """Squared errors of the sums of `losses` [columns, states] in units of the variances that were expected."""
        pairs = unit, list(columns)
        mean, variance = (each[pairs] for each in self.levels.moments)
        total = self.predicted[unit][np.ix_(columns, states)].sum(-1)
        expected = variance * total**2 + self.scale[pairs] * total
        return list((losses.sum(-1) / np.exp(mean) - total) ** 2 / expected)

    def draw(
        self,
        losses: np.ndarray,
        phases: np.ndarray,
        overdispersion: float,
        generator: np.random.Generator,
    ) -> np.ndarray:
        """Every pair's mean loss per phase, [draws, U, B, phases that have states]: evaluated states as they are.

        The sum over the others is gamma: never negative, with the model's mean and variance. overdispersion: factor of
        all variances.
        """
        ratio = np.exp(self.levels.draw(overdispersion, generator))
        freedom = np.broadcast_to(self.freedom, ratio.shape)
        scale = overdispersion * self.scale * freedom / generator.chisquare(freedom)
        means = []
        for phase in np.unique(phases):
            here = losses[..., phases == phase]
            unseen = np.where(np.isnan(here), self.predicted[..., phases == phase], 0.0).sum(-1)
            rest = ratio * scale * generator.gamma(unseen / scale)
            means.append((np.nansum(here, -1) + rest) / here.shape[-1])
        return np.stack(means, -1)


def _bent(losses: np.ndarray, first_order: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Q: P^g scaled to the mean of P, with one g per stage and choice from all its layers' evaluated states: the slope
    of ln L over ln P within a layer, shrunk to 1. All arrays as in `LossModel.fit`."""
    seen = np.isfinite(losses)
    count = np.maximum(seen.sum(-1, keepdims=True), 1)
    typical = first_order.mean(-1, keepdims=True)
    size = np.log(first_order / typical)
    ratio = np.log(np.where(seen, np.maximum(losses / first_order, _LEAST_RATIO), 1.0))
    size_here = np.where(seen, size - np.where(seen, size, 0.0).sum(-1, keepdims=True) / count, 0.0)
    slope = _by_stage((size_here * ratio).sum(-1), stage) / (_by_stage((size_here**2).sum(-1), stage) + _SLOPE_PRIOR)
    bent = np.exp((1 + slope)[..., None] * size)
    return bent * typical / bent.mean(-1, keepdims=True)


def _by_stage(values: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """`values` [U, B] summed over the layers of each layer's stage: [U, B]."""
    in_stage = membership(stage)
    return in_stage @ (in_stage.T @ values)


def _noise(squares: np.ndarray, count: np.ndarray, stage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s by unit and choice, and its degrees of freedom: s of the stage and choice, times a factor of the layer that is
    shrunk to 1. A stage is only believed to be predicted well as far as its own layers have shown it.

    squares: [U, B, N], squared residuals in units of Q mean(Q), NaN where not evaluated.
    """
    freedom = np.maximum(count - 1, 0)
    squares = np.where(freedom > 0, np.nansum(squares, -1), 0.0)
    expected = (_by_stage(squares, stage) + _PRIOR_FREEDOM * _NOISE) / (_by_stage(freedom, stage) + _PRIOR_FREEDOM)
    of_unit = freedom.sum(1) + _PRIOR_FREEDOM
    factor = ((squares / expected).sum(1) + _PRIOR_FREEDOM) / of_unit
    return factor[:, None] * expected, np.repeat(of_unit[:, None].astype(float), squares.shape[1], 1)
