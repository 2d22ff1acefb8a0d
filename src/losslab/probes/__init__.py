"""Probes: one question a file. `PROBES` is the table of them all."""

from losslab.probes.base import Probe
from losslab.probes.interpolation import InterpolationResult, interpolate
from losslab.probes.noise import NoiseResult, gradient_noise
from losslab.probes.plane import LineResult, PlaneResult, line, plane
from losslab.probes.sharpness import SharpnessResult, sharpness
from losslab.probes.spectrum import SpectrumOptions, SpectrumResult, spectrum

PROBES = {
    probe.name: probe
    for probe in (
        Probe("spectrum", "How is the loss curved at this point?", spectrum, SpectrumResult, options=SpectrumOptions),
        Probe("sharpness", "How much can the loss rise nearby?", sharpness, SharpnessResult),
        Probe("line", "What does the loss look like along one direction?", line, LineResult),
        Probe("plane", "What does the loss look like around the solution?", plane, PlaneResult),
        Probe("noise", "How noisy is one example's gradient, measured by the curvature?", gradient_noise, NoiseResult),
        Probe("interpolation", "Is there a barrier between two solutions?", interpolate, InterpolationResult, 2),
    )
}
