"""What the commands do, from Python.

    series    iterate over the checkpoints of a series as models
    scan      run a scan
    score     measure a loaded model
    publish   picture, report and MLflow artifacts of results

``ke_ray.series``, ``ke_ray.scan`` and ``ke_ray.score_model`` lead here.
"""
