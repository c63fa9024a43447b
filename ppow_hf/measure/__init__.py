"""What a drafter gains: evaluation, calibration, costs, benchmarks, window studies, plots."""
