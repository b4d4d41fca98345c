"""The laboratory: benchmarks, evaluation, calibration, and what they write their results with."""
