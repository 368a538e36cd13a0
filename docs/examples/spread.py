"""How much the use of a memory varies from token to token, as a measure of your own."""

from ke_ray.core.measure import Measure
from ke_ray.core.sums import Sum


def coefficient_of_variation(mean, mean_square):  # [n_layers, d_mlp] each -> [n_layers]
    variance = (mean_square - mean.square()).clamp_min(0)
    return variance.sqrt().sum(dim=-1) / mean.sum(dim=-1)


squares = Sum(
    name="mean_squares",
    tap="coefficients",
    of_instance=lambda rows: rows.square().mean(dim=0),  # tokens [T, d_mlp] -> [d_mlp]
    axes=("d_mlp",),
)
spread = Measure(
    name="spread",
    title="Spread of memories over tokens",
    doc="Σ_i s_i / ΣC̄, s_i the standard deviation of |C_i| over tokens",
    unit="fraction",
    needs=("coefficients", squares),
    values=coefficient_of_variation,
    total="mean",
)
