"""One module a probe: records of the runs -> charts; none where no run was measured.

A figure function takes the folder's contents and the runs' colours, the same through all pictures, and returns charts.
To add one: its module here, and its name in FIGURES.
"""

from losslab.report.chart import Chart, colour
from losslab.report.charts.alignment import alignment
from losslab.report.charts.attention import attention
from losslab.report.charts.convergence import convergence
from losslab.report.charts.curve import curve
from losslab.report.charts.elastic_band import elastic_band
from losslab.report.charts.feature_maps import feature_maps
from losslab.report.charts.generalization import generalization
from losslab.report.charts.homotopy import homotopy
from losslab.report.charts.implicit_bias import implicit_bias
from losslab.report.charts.interpolation import interpolation
from losslab.report.charts.intrinsic_dimension import intrinsic_dimension
from losslab.report.charts.kernel import kernel
from losslab.report.charts.noise import noise
from losslab.report.charts.perturbation import perturbation
from losslab.report.charts.plane import planes, slices
from losslab.report.charts.sharpness import sharpness
from losslab.report.charts.spectrum import density, spectrum
from losslab.report.charts.training import training
from losslab.report.charts.trajectory import trajectory
from losslab.report.contents import Contents
from losslab.studies.batch_file import together

# In the page's order.
FIGURES = (
    training,
    homotopy,
    spectrum,
    density,
    planes,
    slices,
    sharpness,
    perturbation,
    noise,
    interpolation,
    alignment,
    curve,
    elastic_band,
    trajectory,
    intrinsic_dimension,
    generalization,
    implicit_bias,
    kernel,
    convergence,
    feature_maps,
    attention,
)


def charts(contents: Contents) -> list[Chart]:
    """All pictures that the folder's records allow, in the page's order."""
    groups = enumerate(together(contents.runs).values())
    colours = {run.name: colour(index) for index, group in groups for run in group}
    return [chart for figure in FIGURES for chart in figure(contents, colours)]
