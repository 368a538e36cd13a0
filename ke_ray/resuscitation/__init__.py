"""Resuscitation of a checkpoint (Algorithm 1): all that surrounds the equations in ``core``.

``coefficients`` finds mean coefficients, ``apply`` scales a model's weights in memory and records
what that predicts, ``export`` writes a modified checkpoint, ``prediction`` compares the predicted
knowledge entropy with the measured one.
"""
