from ke_ray import callbacks as callbacks
from ke_ray.api.scan import scan as scan
from ke_ray.api.score import score_model as score_model
from ke_ray.api.series import series as series

__version__: str
