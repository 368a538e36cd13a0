"""What the commands do, from Python.

    series    the checkpoints that a SPEC names as models in memory, one after the other
    scan      a scan, run whole
    score     measures of a model in hand
    publish   picture, report and MLflow artifacts of results

``ke_ray.series``, ``ke_ray.scan`` and ``ke_ray.score_model`` lead here.
"""
