"""Probes: one question a file. `PROBES` is the table of them all."""

from losslab.probes.alignment import AlignmentResult, align
from losslab.probes.base import Probe
from losslab.probes.convergence import ConvergenceResult, convergence
from losslab.probes.curve import CurveResult, curve
from losslab.probes.elastic_band import ElasticBandOptions, ElasticBandResult, elastic_band
from losslab.probes.generalization import GeneralizationOptions, GeneralizationResult, generalization
from losslab.probes.implicit_bias import ImplicitBiasResult, implicit_bias
from losslab.probes.interpolation import InterpolationResult, interpolate
from losslab.probes.intrinsic_dimension import (
    IntrinsicDimensionOptions,
    IntrinsicDimensionResult,
    intrinsic_dimension,
)
from losslab.probes.kernel import KernelResult, kernel
from losslab.probes.noise import NoiseResult, gradient_noise
from losslab.probes.paths.chain_training import CurveOptions
from losslab.probes.perturbation import PerturbationResult, perturbation
from losslab.probes.plane import LineResult, PlaneResult, line, plane
from losslab.probes.sharpness import SharpnessOptions, SharpnessResult, sharpness
from losslab.probes.spectrum import SpectrumOptions, SpectrumResult, spectrum
from losslab.probes.trajectories.waypoint import TrajectoryOptions
from losslab.probes.trajectory import TrajectoryResult, trajectory

PROBES = {
    probe.name: probe
    for probe in (
        Probe("spectrum", "How is the loss curved at this point?", spectrum, SpectrumResult, options=SpectrumOptions),
        Probe("sharpness", "How much can the loss rise nearby?", sharpness, SharpnessResult, options=SharpnessOptions),
        Probe("perturbation", "How far does the quadratic model hold?", perturbation, PerturbationResult),
        Probe("line", "What does the loss look like along one direction?", line, LineResult),
        Probe("plane", "What does the loss look like around the solution?", plane, PlaneResult),
        Probe("noise", "How noisy is one example's gradient?", gradient_noise, NoiseResult),
        Probe(
            "intrinsic_dimension",
            "In how few random directions can this network be trained?",
            intrinsic_dimension,
            IntrinsicDimensionResult,
            options=IntrinsicDimensionOptions,
        ),
        Probe("interpolation", "Is there a barrier between two solutions?", interpolate, InterpolationResult, 2),
        Probe("alignment", "Are two solutions the same but for the order of their units?", align, AlignmentResult, 2),
        Probe("curve", "Is there a curve of low loss between two solutions?", curve, CurveResult, 2, CurveOptions),
        Probe(
            "elastic_band",
            "Must the loss rise on the way from one solution to another?",
            elastic_band,
            ElasticBandResult,
            2,
            ElasticBandOptions,
        ),
        Probe(
            "trajectory",
            "How did training go, and how near the edge of stability?",
            trajectory,
            TrajectoryResult,
            options=TrajectoryOptions,
        ),
        Probe(
            "generalization",
            "How much worse is the network on new data, and what does flatness promise?",
            generalization,
            GeneralizationResult,
            options=GeneralizationOptions,
        ),
        Probe("implicit_bias", "Which loss does SGD with a finite step descend?", implicit_bias, ImplicitBiasResult),
        Probe("kernel", "Which functions does the network learn fast, and for how long?", kernel, KernelResult),
        Probe("convergence", "How fast does gradient descent go from here?", convergence, ConvergenceResult),
    )
}
