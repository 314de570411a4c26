"""Noise levels to step along, and paths through them: sigma(t) and s(t) (EDM, arXiv 2206.00364, table 1).

All of it is numpy in float64, on the host, before anything is compiled.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

VP_END = 1e-3  # time of VP's lowest noise level but 0; its highest is at time 1
IDDPM_TIMES = 1000
IDDPM_OFFSET = 0.008  # C_2 of table 1
IDDPM_LEAST = 0.001  # C_1 of table 1


def sigma_grid(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """Noise levels [num_steps + 1] from sigma_max down to sigma_min, then 0; float64 (EDM, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + _ramp(num_steps) * (low - high)) ** rho, 0.0)


def vp_grid(num_steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Noise levels [num_steps + 1] at even times of the VP schedule through both ends, then 0.

    Those of beta_d = 19.1 and beta_min = 0.1 are about 0.01047 and 124.6.
    """
    times = 1 + _ramp(num_steps) * (VP_END - 1)
    return np.append(vp_schedule(sigma_min, sigma_max).sigma(times), 0.0)


def ve_grid(num_steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Noise levels [num_steps + 1] in even ratios, then 0. EDM's ends are 0.02 and 100."""
    return np.append(sigma_max * (sigma_min / sigma_max) ** _ramp(num_steps), 0.0)


def iddpm_grid(num_steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """Noise levels [num_steps + 1]: evenly many of iDDPM's thousand that lie between both ends, then 0.

    u_{j-1} = √((u_j² + 1) / max(ᾱ_{j-1} / ᾱ_j, C_1) - 1) down from u_M = 0, with
    ᾱ_j = sin²(π/2 · j / (M·(C_2 + 1))). EDM's ends are 0.002 and 81.
    """
    alpha_bar = np.sin(np.pi / 2 * np.arange(IDDPM_TIMES + 1) / (IDDPM_TIMES * (IDDPM_OFFSET + 1))) ** 2
    ratios = np.maximum(alpha_bar[:-1] / alpha_bar[1:], IDDPM_LEAST)
    u = np.sqrt(1 / np.cumprod(ratios[::-1])[::-1] - 1)  # u² + 1 is the product of all 1 / ratio
    within = u[(sigma_min <= u) & (u <= sigma_max)]
    chosen = np.floor((len(within) - 1) * _ramp(num_steps) + 0.5).astype(int)
    return np.append(within[chosen], 0.0)


def timestep_grid(num_steps: int, levels: np.ndarray) -> np.ndarray:
    """Noise levels [num_steps + 1] of timesteps -1 + ⌊T·i / num_steps⌋, from T - 1 down to -1, which is 0.

    levels [T]: the noise level of each timestep.
    """
    times = len(levels) * np.arange(num_steps, -1, -1) // num_steps - 1
    return np.append(0.0, levels)[times + 1]


def respaced_grid(num_steps: int, levels: np.ndarray) -> np.ndarray:
    """Noise levels [num_steps + 1] of evenly many timesteps, the first and the last among them, then 0.

    levels [T], as of `timestep_grid`. A point between two timesteps is rounded to the nearer; a single step
    starts at the first.
    """
    distance = (len(levels) - 1) / max(num_steps - 1, 1)
    # Added up, as the published processes were made: between two timesteps the last bit decides.
    times = np.round(np.cumsum([0, *[distance] * (num_steps - 1)])).astype(int)
    return np.append(levels[times][::-1], 0.0)


def stride_of(num_steps: int, timesteps: int) -> int:
    """The smallest with which num_steps of so many timesteps are passed, from the first; 0: there is none."""
    stride = -(-timesteps // num_steps)
    return stride if -(-timesteps // stride) == num_steps else 0


def strided_grid(num_steps: int, levels: np.ndarray) -> np.ndarray:
    """Noise levels [num_steps + 1] of the timesteps 0, s, 2·s, … (DDIM, app. D.3), then 0; levels [T]."""
    return np.append(levels[:: stride_of(num_steps, len(levels))][::-1], 0.0)


def _ramp(num_steps: int) -> np.ndarray:
    """From 0 to 1 [num_steps]; a single step starts at the highest level."""
    return np.arange(num_steps) / max(num_steps - 1, 1)


class Schedule(NamedTuple):
    """Of the noise over time: sigma(t), its inverse, and its slope dsigma/dt."""

    sigma: Callable[[np.ndarray], np.ndarray]
    time: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]


def linear_schedule(sigma_min: float, sigma_max: float) -> Schedule:
    """sigma(t) = t."""
    return Schedule(lambda t: t, lambda sigma: sigma, np.ones_like)


def ve_schedule(sigma_min: float, sigma_max: float) -> Schedule:
    """sigma(t) = √t."""
    return Schedule(np.sqrt, np.square, lambda t: 0.5 / np.sqrt(t))


def vp_schedule(sigma_min: float, sigma_max: float) -> Schedule:
    """sigma(t) = √(exp(beta_d·t² / 2 + beta_min·t) - 1): sigma_max at time 1, sigma_min at VP_END."""
    low, high = np.log1p(np.square([sigma_min, sigma_max]))
    beta_d = 2 * (low / VP_END - high) / (VP_END - 1)
    beta_min = high - beta_d / 2

    def sigma(t):
        return np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t))

    def slope(t):
        level = sigma(t)
        return (beta_d * t + beta_min) * (level + 1 / level) / 2

    def time(sigma):
        exponent = np.log1p(np.square(sigma))
        root = (np.sqrt(beta_min**2 + 2 * beta_d * exponent) - beta_min) / beta_d
        return np.where(exponent == 0, 0.0, root)  # a negative beta_min has two roots there

    return Schedule(sigma, time, slope)


SCHEDULES = {"linear": linear_schedule, "vp": vp_schedule, "ve": ve_schedule}
# (sigma, its slope) → the scale s of the state over time, its slope.
Scaling = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
SCALINGS: dict[str, Scaling] = {
    "none": lambda sigma, slope: (np.ones_like(sigma), np.zeros_like(sigma)),
    "vp": lambda sigma, slope: ((1 + sigma**2) ** -0.5, -sigma * slope * (1 + sigma**2) ** -1.5),
}


class Points(NamedTuple):
    """Points of a path, [n] each: time, noise level, scale, and the slopes of these two over time."""

    time: np.ndarray
    sigma: np.ndarray
    sigma_slope: np.ndarray
    scale: np.ndarray
    scale_slope: np.ndarray


class Path(NamedTuple):
    """A way to go through noise levels: a schedule, and one of SCALINGS."""

    schedule: Schedule
    scaling: Scaling

    def at(self, sigma: np.ndarray) -> Points:
        """The points of these noise levels; slopes at sigma 0 may not be finite."""
        return self._points(self.schedule.time(sigma), sigma)

    def at_time(self, time: np.ndarray) -> Points:
        """The points of these times."""
        return self._points(time, self.schedule.sigma(time))

    def _points(self, time, sigma):
        with np.errstate(all="ignore"):
            slope = self.schedule.slope(time)
            return Points(time, sigma, slope, *self.scaling(sigma, slope))
